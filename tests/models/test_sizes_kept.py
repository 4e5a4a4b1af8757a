"""A model that was given another size is the same function after it was saved and built again, with every encoding."""

from functools import partial

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import vit2dpe.models
from tests.helpers import MICRO, micro_vit, randn
from vit2dpe.encodings import ENCODINGS
from vit2dpe.models import MAE, ViT
from vit2dpe.models.spec import ModelSpec
from vit2dpe.testing import randomise
from vit2dpe.training.checkpoint import load_run, save_model, write_checkpoint

WORDS = [*ENCODINGS, "logcpb(shared=true)", "relative(resize=geometric)", "learned+rope_golden"]
SIZES = dict(img_size=(32, 24), patch_size=4)
WIDE = (40, 56)
X = randn(2, 3, *WIDE)
create = partial(micro_vit, **SIZES)


def logits(model, x=X):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("position", WORDS)
def test_in_a_hub_folder_and_in_a_checkpoint(tmp_path, position):
    model = create(position)
    at_home = logits(model, X[..., :32, :24])
    model.set_input_size(WIDE)
    expected = logits(model)
    save_for_hf(model, tmp_path / "hub")
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert again.train_grid == (10, 14)
    assert torch.equal(logits(again), expected)
    save_model(tmp_path / "ours", model, dict(position=position, **SIZES, **MICRO))
    again = load_run(tmp_path / "ours")
    assert again.train_grid == (10, 14)
    assert torch.equal(logits(again), expected)
    if not any(word in position for word in ("learned", "windowed", "factorized", "relative", "decomposed")):
        assert torch.equal(logits(again, X[..., :32, :24]), at_home), "nothing to resize, and yet another function"


@pytest.mark.parametrize("position", WORDS)
def test_weights_in_a_model_of_another_size_are_what_set_input_size_gives(tmp_path, position):
    model = create(position)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.set_input_size(WIDE)
    wide = create(position, img_size=WIDE)
    wide.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(wide), logits(model))
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=7)
    wide = create(position, img_size=WIDE, pretrained=True, pretrained_cfg_overlay=overlay)
    other = create(position, img_size=WIDE)
    other.load_state_dict(wide.state_dict())
    assert torch.equal(logits(wide), logits(other))


@pytest.mark.parametrize("position", ["relative", "logcpb", "rope_golden", "learned+rope_mixed"])
def test_a_swin_too(tmp_path, position):
    sizes = dict(img_size=(32, 48), embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=7)
    make = dict(position=position, window_policy="scale", **sizes)
    name = "vit2dpe_swin_tiny_patch2_window4_32"
    model = randomise(timm.create_model(name, **make)).eval()
    model.set_input_size((64, 96))
    x = torch.randn(1, 3, 64, 96)
    save_for_hf(model, tmp_path / "hub")
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert again.window_sizes == model.window_sizes != timm.create_model(name, **make).window_sizes
    assert torch.equal(logits(again, x), logits(model, x))
    spec = ModelSpec("timm", dict(model_name=name, **make))
    write_checkpoint(tmp_path / "ours", spec, {"model": model.state_dict()}, grid=model.train_grid)
    again = load_run(tmp_path / "ours")
    assert again.window_sizes == model.window_sizes
    assert torch.equal(logits(again, x), logits(model, x))


@pytest.mark.need("B15")
def test_a_swin_keeps_windows_that_were_set_later(tmp_path):
    name = "vit2dpe_swin_tiny_patch2_window4_32"
    sizes = dict(img_size=(32, 48), embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=7)
    model = randomise(timm.create_model(name, position="relative", pretrained_window_sizes=8, **sizes)).eval()
    vit2dpe.set_policy(model, "scale")
    for size in ((32, 48), (64, 96), (32, 48)):
        model.set_input_size(size)
        save_for_hf(model, tmp_path)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        for x in (randn(1, 3, *size), randn(1, 3, 48, 48)):
            assert torch.equal(logits(again, x), logits(model, x))


@pytest.mark.parametrize("position", ["logcpb+learned", "rope_golden"])
def test_both_halves_of_an_mae(position):
    def make(size):
        encoder = ViT(position, img_size=size, patch_size=4, **MICRO | dict(num_classes=0))
        sizes = dict(decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3)
        return MAE(encoder, decoder_position=position, **sizes).eval()

    model, noise = randomise(make((32, 24))), torch.rand(2, 140)
    wide = make(WIDE)
    wide.load_state_dict(model.state_dict())
    model.set_input_size(WIDE)
    with torch.no_grad():
        assert torch.equal(wide(X, noise=noise)[1], model(X, noise=noise)[1])


@pytest.mark.parametrize("position", ["logcpb", "rope_golden"])
def test_weights_that_do_not_say_their_grid_take_the_models(position):
    model, wide = create(position), create(position, img_size=WIDE)
    bare = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    assert len(bare) < len(model.state_dict())
    wide.load_state_dict(bare)
    model.load_state_dict(bare)
    assert not torch.equal(logits(wide), logits(model))
    line = vit2dpe.encodings.build(position, vit2dpe.encodings.Dims(48, 3, (9,)))
    square = vit2dpe.encodings.build(position, vit2dpe.encodings.Dims(48, 3, (9, 9)))
    with pytest.raises(ValueError, match="grid of 2 axes"):
        line.load_state_dict({**line.state_dict(), "_extra_state": square.state_dict()["_extra_state"]})


@pytest.mark.parametrize("position", ["logcpb", "rope_golden"])
def test_the_grid_is_a_number_wherever_it_is_asked_for(position):
    """Not on the device of the day: from the meta device nothing could be read back."""
    with torch.device("meta"):
        encoding = vit2dpe.encodings.build(position, vit2dpe.encodings.Dims(48, 3, (9, 4)))
        state = encoding.state_dict()["_extra_state"]
    assert state.tolist() == [9, 4]
