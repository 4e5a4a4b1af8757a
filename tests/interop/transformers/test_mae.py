"""Ours against transformers' ViTMAEForPreTraining: the same weights and noise, the same loss, prediction and mask."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from vit2dpe import MAE, CheckpointError, ConfigError, ViT, to_timm
from vit2dpe.interop.transformers.mae import to_original, to_transformers
from vit2dpe.models.mae_names import from_transformers
from vit2dpe.testing import randomise

GRID = 5  # patches along a side; 25 x (1 - 0.75) is no whole number


def theirs(norm_pix=False, **changes):
    torch.manual_seed(0)
    sizes = dict(
        image_size=4 * GRID,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
        layer_norm_eps=1e-6,  # the original's; transformers' own default is 1e-12
        norm_pix_loss=norm_pix,
    )
    model = ViTMAEForPreTraining(ViTMAEConfig(**{**sizes, **changes})).eval()
    # transformers 5.23 leaves both tables at zero in a model that is built and not loaded; these are its own formulas.
    model.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(GRID * GRID)
    tables = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    kept = {name: value.clone() for name, value in tables.items()}
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
        for name, value in kept.items():
            tables[name].copy_(value)
    assert len(kept) == 2
    return model


def ours(position="sincos", decoder_position="sincos", norm_pix=False, **changes):
    torch.manual_seed(1)
    sizes = dict(img_size=4 * GRID, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    encoder = ViT(position, **{**sizes, **changes})
    decoder = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=4)
    return MAE(encoder, decoder_position=decoder_position, norm_pix=norm_pix, **decoder).eval()


def inputs(channels=3, batch=3):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(batch, channels, 4 * GRID, 4 * GRID, generator=generator)
    return images, torch.rand(batch, GRID * GRID, generator=generator)


@pytest.mark.parametrize("position", ["sincos", "learned"])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_prediction_and_mask_are_transformers(norm_pix, position):
    original, model = theirs(norm_pix), ours(position, position, norm_pix)
    model.load_state_dict(from_transformers(original.state_dict()))
    images, noise = inputs()
    with torch.no_grad():
        expected = original(images, noise=noise)
        loss, prediction, mask = model(images, 0.75, noise)
        other = model(images.transpose(2, 3), 0.75, noise)[1]
    torch.testing.assert_close(prediction, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-5)
    assert torch.equal(mask, expected.mask)
    assert int(mask[0].sum()) == 19
    assert float(prediction.std()) > 0.1
    assert float((other - prediction).abs().max()) > 1e-2


@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.9])
def test_gradients_are_transformers(ratio):
    original, model = theirs(True, mask_ratio=ratio), ours(norm_pix=True)
    model.load_state_dict(from_transformers(original.state_dict()))
    images, noise = inputs()
    original(images, noise=noise).loss.backward()
    model(images, ratio, noise)[0].backward()
    grads = {name: value.grad for name, value in original.named_parameters() if value.grad is not None}
    mine = {name.removeprefix("encoder."): value.grad for name, value in model.named_parameters()}
    found = to_transformers(mine)
    assert grads.keys() == found.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_one_channel_is_transformers():
    original, model = theirs(num_channels=1), ours(in_chans=1)
    model.load_state_dict(from_transformers(original.state_dict()))
    images, noise = inputs(channels=1)
    with torch.no_grad():
        torch.testing.assert_close(model(images, 0.75, noise)[0], original(images, noise=noise).loss)


def test_the_way_back_is_exact():
    original = theirs()
    for position in ("sincos", "learned"):
        model = ours(position, position)
        model.load_state_dict(from_transformers(original.state_dict()))
        back = to_transformers(to_original(model))
        assert back.keys() == original.state_dict().keys()
        for name, value in original.state_dict().items():
            torch.testing.assert_close(back[name], value, rtol=0, atol=1e-6, msg=name)
        theirs().load_state_dict(back)


def test_names_from_before_transformers_5_are_read():
    state = theirs().state_dict()
    older = {
        name.replace("vit.layers.", "vit.encoder.layer.")
        .replace(".attention.q_proj.", ".attention.attention.query.")
        .replace(".attention.k_proj.", ".attention.attention.key.")
        .replace(".attention.v_proj.", ".attention.attention.value.")
        .replace(".attention.o_proj.", ".attention.output.dense.")
        .replace(".mlp.fc1.", ".intermediate.dense.")
        .replace(".mlp.fc2.", ".output.dense."): value
        for name, value in state.items()
    }
    assert older.keys() != state.keys()
    new, old = from_transformers(state), from_transformers(older)
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in new)


def test_a_name_that_is_not_theirs_is_refused():
    with pytest.raises(CheckpointError, match=r"vit\.head\.weight"):
        from_transformers({"vit.head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no place for head\.weight"):
        to_transformers({"head.weight": torch.zeros(1)})


# the sin-cos table ------------------------------------------------------------------------------------------------


def test_the_table_is_maes_by_name():
    table = theirs().vit.embeddings.position_embeddings
    state = from_transformers(theirs().state_dict())
    model = ours("sincos(layout=mae)", "sincos(layout=mae)")
    torch.testing.assert_close(to_timm(model.encoder)["pos_embed"], table, rtol=0, atol=1e-6)
    model.load_state_dict(state)
    for half in ("encoder", "decoder"):
        layouts = {"encoder": "sincos", "decoder": "sincos"} | {half: "sincos(layout=timm)"}
        other = ours(layouts["encoder"], layouts["decoder"])
        with pytest.raises(CheckpointError, match=r"not the table of this model's formula.*layouts"):
            other.load_state_dict(state)


# timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["sincos", "learned", "sincos+learned", "none"])
def test_the_encoder_is_a_plain_timm_checkpoint(position):
    model = ours(position)
    randomise(model)
    sizes = dict(img_size=4 * GRID, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    plain = timm.models.VisionTransformer(**sizes, pos_embed="none" if position == "none" else "learn").eval()
    plain.load_state_dict(to_timm(model.encoder), strict=True)
    images, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            model.encoder.forward_features(images), plain.forward_features(images), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("position", ["rope", "relative", "rope_mixed", "sincos+alibi"])
def test_what_timm_cannot_hold_is_refused(position):
    with pytest.raises(ConfigError, match="does more"):
        to_original(ours(position))
    with pytest.raises(ConfigError, match="does more"):
        to_original(ours(decoder_position=position))


def test_the_originals_flat_list_loads_back():
    for position in ("sincos", "learned", "none"):
        model, again = ours(position, position), ours(position, position)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        flat = to_original(model)
        assert not any(name.startswith("encoder.") for name in flat)
        again.load_state_dict(flat)
        images, noise = inputs()
        with torch.no_grad():
            assert torch.equal(again(images, 0.75, noise)[1], model(images, 0.75, noise)[1])


@pytest.mark.parametrize("names", ["original", "transformers", "ours"])
def test_a_whole_file_goes_into_an_mae_and_its_encoder_into_a_vit(names, tmp_path):
    """{"model": ...} as published, with an optimizer beside it."""
    source = randomise(ours("learned", "learned"))
    state = {"original": to_original, "transformers": lambda m: to_transformers(to_original(m))}
    file = {"model": state.get(names, lambda m: m.state_dict())(source), "epoch": 7}
    torch.save(file, tmp_path / "checkpoint.pth")
    file = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    kept = {name: value.clone() for name, value in file["model"].items()}
    whole = ours("learned", "learned")
    whole.load_state_dict(file)
    images, noise = inputs()
    alone = ViT("learned", img_size=4 * GRID, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    alone.load_state_dict(file)
    with torch.no_grad():
        assert torch.equal(whole(images, noise=noise)[1], source(images, noise=noise)[1])
        assert torch.equal(alone(images), source.encoder(images))
    assert file.keys() == {"model", "epoch"}, "what was given is left as it is"
    assert file["model"].keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in file["model"].items())


def test_an_encoder_alone_is_named_as_such():
    model = ours()
    with pytest.raises(CheckpointError, match=r"an encoder alone.*mae\.encoder"):
        model.load_state_dict(to_timm(model.encoder))
    model.encoder.load_state_dict(to_timm(model.encoder))


def test_a_table_goes_to_the_term_that_has_one():
    state = from_transformers(theirs().state_dict())
    model = ours("sincos", "rope+learned")
    model.load_state_dict(state)
    table = model.decoder_position.terms[1].pos_embed.detach()
    assert torch.equal(table.flatten(1, 2), state["decoder_pos_embed"][:, 1:])


def test_tables_that_do_not_fit_are_refused():
    state = from_transformers(theirs().state_dict())
    moved = {name: value.clone() for name, value in state.items()}
    moved["decoder_pos_embed"][:, 0] = 1
    with pytest.raises(CheckpointError, match="moves the class token"):
        ours("learned", "learned").load_state_dict(moved)
    with pytest.raises(CheckpointError, match="no place in this decoder"):
        ours("sincos", "rope").load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"no place in this decoder, which has a grid of \(6, 6\)"):
        ours("learned", "learned", img_size=24).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"gives \(1, 24, 32\).*img_size"):
        ours("sincos", "sincos", img_size=(16, 24)).load_state_dict(
            {name: value for name, value in state.items() if name != "decoder_pos_embed"}
            | {"pos_embed": state["pos_embed"][:, :20]}
        )
