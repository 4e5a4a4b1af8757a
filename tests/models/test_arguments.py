"""Numbers that no model can have are refused when it is built, by the name of the argument."""

import pytest
import torch
from torch import nn

from vit2dpe import MAE, Dims, Seq2Seq, Swin, TextDecoder, TextEncoder, ViT, build, set_policy
from vit2dpe.attention.modules import Attention
from vit2dpe.errors import ConfigError
from vit2dpe.models.simmim import SimMIM

NAN = float("nan")
IMAGES = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
STAGES = dict(img_size=32, patch_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 2), window_size=4)
LINE = dict(vocab_size=30, context=8, embed_dim=48, depth=1, num_heads=3)
PAIRS = dict(source_vocab=30, target_vocab=30, context=8, embed_dim=48, depth=1, num_heads=3)
DECODER = dict(decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3)


def mae(_: str, **more: object) -> nn.Module:
    return MAE(ViT("none", num_classes=0, **IMAGES), **more)


def simmim(_: str, **more: object) -> nn.Module:
    return SimMIM(ViT("none", num_classes=0, **IMAGES), **more)


def refused(make, usual: dict, bad: dict) -> None:
    make("none", **usual)
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ConfigError, match=rf"^{name} must"):
                make("none", **{**usual, name: value})


RATES = dict.fromkeys(("drop_rate", "attn_drop_rate", "drop_path_rate"), (2, -0.1, NAN))
SIZES = dict.fromkeys(("img_size", "patch_size"), (0, -8, "x", 2.5, NAN, (0, 8), (3, 32, 32), (8,)))
WIDTHS = dict(embed_dim=(0, -48, 48.5, "48", NAN), in_chans=(0, -3), num_classes=(-1, 1.5))


@pytest.mark.need("D15a")
def test_numbers_of_image_models():
    refused(ViT, IMAGES, RATES | SIZES | WIDTHS)
    refused(ViT, IMAGES, dict(depth=(-1, 1.5), num_heads=(0, -3, 1.5), mlp_ratio=(NAN, -1), reg_tokens=(-1,)))
    refused(Swin, STAGES, RATES | SIZES | WIDTHS)
    refused(Swin, STAGES, dict(depths=(2, (-1, 1), (1.5, 1)), num_heads=(3, (0, 1), (2, -2)), mlp_ratio=(NAN, "x")))
    for size in (2.5, "8", (3, 4, 4, 4)):
        with pytest.raises(ConfigError, match=r"size is a whole number or two|windows are a side"):
            Swin(**{**STAGES, "window_size": size})


@pytest.mark.need("D15a")
def test_numbers_of_masked_models():
    refused(mae, DECODER, dict(decoder_embed_dim=(0, -48), decoder_depth=(-1,), decoder_num_heads=(0, 1.5)))
    refused(mae, DECODER, dict(decoder_mlp_ratio=(NAN, 0)))
    refused(simmim, dict(mask_unit=8), dict(mask_unit=(0, -8, 2.5, "8", (8, 8, 8))))


@pytest.mark.need("D15a")
def test_numbers_of_text_models():
    bad = RATES | dict(depth=(-1, 1.5), num_heads=(0, -3), kv_heads=(0, -1), mlp_ratio=(NAN, -1), hidden=(-3,))
    bad |= dict(context=(0, 1.5), embed_dim=(0, -48), window=(-2,), token_types=(-1,), norm_eps=(NAN,), scale=(NAN,))
    for make in (TextEncoder, TextDecoder):
        refused(make, LINE, bad | dict(vocab_size=(0, -1, 2.5)))
    refused(TextEncoder, LINE, dict(num_classes=(-1, 2.5)))
    refused(Seq2Seq, PAIRS, bad)


@pytest.mark.need("D15a")
def test_another_size_and_an_attention_by_itself():
    model = ViT("learned", **IMAGES)
    for size in (2.5, "32", (3, 32, 32)):
        with pytest.raises(ConfigError, match="a whole number or two"):
            model.set_input_size(size)
    for sizes in ((48, 0), (0, 1), (-48, 3)):
        with pytest.raises(ValueError, match="multiple of the heads"):
            Attention(*sizes)
    with pytest.raises(ConfigError, match="a policy is a word"):
        set_policy(model, 3)


@pytest.mark.need("D15b")
@pytest.mark.parametrize(
    "word", ["rope(base=B)", "rope_dinov3(shift=B)", "sincos(base=B)", "fourier(hidden=B)", "windowed(window=B)"]
)
def test_options_that_no_tensor_holds(word: str):
    with pytest.raises(ConfigError, match="must lie within"):
        build(word.replace("B", "9" * 20), Dims(48, 3, (4, 4)))


@pytest.mark.need("D7b")
@pytest.mark.parametrize("word", ["rope", "rope_mixed", "relative"])
def test_a_batch_of_no_image(word: str):
    for model in (ViT(word, num_classes=5, **IMAGES), Swin(word, num_classes=5, **STAGES)):
        out = model(torch.zeros(0, 3, 32, 32))
        assert out.shape == (0, 5)
        out.sum().backward()
