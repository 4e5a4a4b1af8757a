"""`set_policy` of a model without timm's record is saved with it and read back."""

import pytest
import torch

from vit2dpe import MAE, Seq2Seq, TextDecoder, TextEncoder, ViT, load_run, set_policy
from vit2dpe.training import save_model

SIZES = dict(context=7, embed_dim=24, depth=1, num_heads=2)
MODELS = {
    "TextDecoder": (TextDecoder, dict(position="rope", vocab_size=12, **SIZES)),
    "TextEncoder": (TextEncoder, dict(position="alibi+learned", vocab_size=12, num_classes=3, pool="mean", **SIZES)),
    "Seq2Seq": (Seq2Seq, dict(position="rope", source_vocab=12, target_vocab=12, **SIZES)),
}


def tokens(length):
    return torch.arange(length)[None] % 12


def logits(model, length=20):
    with torch.no_grad():
        return model(*[tokens(length)] * (2 if isinstance(model, Seq2Seq) else 1))


@pytest.mark.parametrize("name", MODELS)
def test_a_text_model_keeps_its_own_policy(name, tmp_path):
    make, arguments = MODELS[name]
    torch.manual_seed(0)
    model = make(**arguments).eval()
    plain = logits(model)
    set_policy(model, "interpolate(power=0.5)", temperature="log")
    wanted = logits(model)
    assert not torch.equal(wanted, plain)
    save_model(tmp_path, model, arguments)
    again = load_run(tmp_path)
    assert torch.equal(logits(again), wanted)
    save_model(tmp_path, again, arguments)
    assert torch.equal(logits(load_run(tmp_path)), wanted), "and once more"


def test_parts_of_a_sum_that_cannot_take_it_keep_what_they_had(tmp_path):
    arguments = dict(position="rope+alibi", vocab_size=12, **SIZES)
    torch.manual_seed(0)
    model = TextDecoder(**arguments).eval()
    set_policy(model, "interpolate")
    set_policy(model, "yarn")  # of rope alone: alibi interpolates
    save_model(tmp_path, model, arguments)
    assert torch.equal(logits(load_run(tmp_path)), logits(model))


def test_a_masked_autoencoder_keeps_it_too(tmp_path):
    encoder = dict(img_size=[12, 16], patch_size=4, embed_dim=24, depth=1, num_heads=2, position="rope", num_classes=0)
    decoder = dict(decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
    model = MAE(ViT(**encoder), **decoder).eval()
    set_policy(model, "interpolate")
    save_model(tmp_path, model, dict(encoder=encoder, **decoder))
    x = torch.randn(1, 3, 20, 24)
    again = load_run(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.encoder(x), model.encoder(x))
    assert [e.own_policy for e in (again.encoder.position, again.decoder_position)] == [
        e.own_policy for e in (model.encoder.position, model.decoder_position)
    ]
