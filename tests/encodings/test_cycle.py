"""Words by block: `rope/rope/rope/none` over the depth, in every model; tokens once, what is shared computed once."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

from tests.helpers import randn, shaken
from vit2dpe import MAE, ConfigError, Dims, Signal, Swin, ViT, build, explain, from_timm, frozen, to_timm, use_policy
from vit2dpe.encodings import Alibi, AxialRoPE, Cycle, MixedRoPE, RelativeBias, SinCos
from vit2dpe.models.card import encoding_of
from vit2dpe.models.layers import block_inputs
from vit2dpe.models.spec import ModelSpec
from vit2dpe.models.text.heads import TextEncoder
from vit2dpe.resolution.apply import policies_of
from vit2dpe.stock import attach

MICRO = dict(img_size=(16, 24), patch_size=4, embed_dim=24, num_heads=2, depth=4, num_classes=5)
FOUR = "sincos+rope/alibi/none/relative(shared=true)+rope"
IMAGES = randn(2, 3, 20, 12)


def vit(position, **changes):
    torch.manual_seed(0)
    return shaken(ViT(position, **MICRO | changes), 0.3)


@torch.no_grad()
def test_each_block_gets_the_signal_of_its_word():
    """By hand: the encodings built one by one, each block called with the sum of its own."""
    model, at = vit(FOUR), None
    dims = Dims(24, 2, (4, 6), depth=4)
    table = build("relative(shared=true)", dims)
    table.load_state_dict({"relative_position_bias_table": model.position.state_dict()[
        "terms.3.relative_position_bias_table"]})  # fmt: skip
    at = model.positions(20, 12)
    x = model._prepend(model.patch_embed(IMAGES)[0])
    rope = build("rope", dims)
    x, _ = block_inputs(x, build("sincos", dims)(at))
    for block, parts in zip(model.blocks, [[rope], [build("alibi", dims)], [], [table, rope]], strict=True):
        signal = Signal()
        for part in parts:
            signal = signal.plus(part.eval()(at))
        x = block(x, signal, at)
    torch.testing.assert_close(model(IMAGES), model.forward_head(model.norm(x)), rtol=0, atol=1e-6)
    one = vit("sincos+rope")
    one.load_state_dict(model.state_dict(), strict=False)
    assert (one(IMAGES) - model(IMAGES)).abs().max() > 0.01
    last = model.forward_intermediates(IMAGES, intermediates_only=True)[-1]
    torch.testing.assert_close(last, x[:, 1:].transpose(1, 2).unflatten(2, (5, 3)), rtol=0, atol=1e-6)


def test_the_words_follow_one_another_over_the_depth():
    used = [line.rotation.path != "none" for line in explain(vit("rope/rope/rope/none", depth=9), (16, 24))]
    assert used == [True, True, True, False, True, True, True, False, True]
    model = vit("rope_mixed/relative+rope/none", depth=5)
    own = [block.attn.position for block in model.blocks]
    assert [type(part) for part in own] == [MixedRoPE, RelativeBias, type(None), MixedRoPE, RelativeBias]
    assert model.position.order == [(), (0,), ()]


def test_what_is_shared_is_computed_once(monkeypatch):
    angle, calls = AxialRoPE.angle, []
    monkeypatch.setattr(AxialRoPE, "angle", lambda self, at: calls.append(at) or angle(self, at))
    vit("rope/none/rope(base=10)+alibi/rope")(IMAGES)
    assert len(calls) == 2  # rope, and rope(base=10)
    model = vit("relative(shared=true)/relative(shared=true)/none")
    _, signal = block_inputs(randn(1, 16, 24), model.position(model.positions(20, 12)))
    assert (len(signal.blocks), signal.order) == (2, (0, 0, 1))  # a matrix of biases for both words


@torch.no_grad()
def test_a_list_a_text_and_json_are_one_model():
    text = vit("rope/none")
    listed = vit(["rope", "none"])
    assert torch.equal(text(IMAGES), listed(IMAGES))
    instances = vit([AxialRoPE(head_dim=12, axes=2), "none"])
    assert torch.equal(text(IMAGES), instances(IMAGES))
    assert torch.equal(text(IMAGES), vit(text.position)(IMAGES))
    arguments = json.loads(json.dumps(MICRO | dict(position=["rope", "none"])))
    again = ModelSpec("ViT", arguments).build().eval()
    again.load_state_dict(text.state_dict())
    assert torch.equal(text(IMAGES), again(IMAGES))


@pytest.mark.parametrize("position", ["rope/none", ["rope", "none"]])
def test_timm_builds_and_saves_it(position, tmp_path):
    small = dict(depth=4, embed_dim=48, num_heads=3, num_classes=5)
    model = shaken(timm.create_model("vit2dpe_tiny_patch8_64", position=position, **small))
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = randn(1, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    assert encoding_of(again) == "`rope/none` (`AxialRoPE`)"


@torch.no_grad()
def test_policies_temperatures_and_frozen_signals():
    model = vit("rope/none/alibi")
    assert policies_of(model) == ("extrapolate", "interpolate")
    plain = model(IMAGES)
    with use_policy(model, "interpolate"):
        assert (model(IMAGES) - plain).abs().max() > 1e-3
    with use_policy(model, "extrapolate", temperature="log"):
        signal = model.position(model.positions(20, 12))
        assert all(signal.of_block(i).temperature == signal.temperature != 1 for i in range(4))
    with frozen(model):
        assert torch.equal(model(IMAGES), plain)
        assert torch.equal(model(IMAGES), plain)


@torch.no_grad()
def test_it_is_traced_whole():
    model = vit("rope/none/relative(shared=true)", depth=3)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(IMAGES), model(IMAGES), rtol=0, atol=1e-5)


def test_every_shared_parameter_gets_its_gradient():
    model = vit("learned+relative(shared=true)/fire/none").train()
    model.set_grad_checkpointing()
    model(IMAGES).square().sum().backward()
    tables = {name: p for name, p in model.named_parameters() if "position" in name}
    assert len(tables) > 3
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tables.values())
    assert model.no_weight_decay() >= tables.keys()


@torch.no_grad()
def test_a_decoder_a_swin_and_text():
    encoder = ViT("rope/none", **MICRO | dict(num_classes=0, depth=2))
    mae = shaken(MAE(encoder, decoder_position="sincos+rope/rope/none", decoder_embed_dim=24, decoder_depth=3,
                     decoder_num_heads=2))  # fmt: skip
    paths = [line.rotation.path == "none" for line in explain(mae, IMAGES)]
    assert paths == [False, True, False, False, True]
    swin = Swin("sincos+rope/none/relative", img_size=(16, 24), patch_size=2, embed_dim=12, depths=(2, 2),
                num_heads=(1, 2), window_size=(2, 3), num_classes=5)  # fmt: skip
    assert isinstance(swin.position, SinCos)
    used = [(line.rotation.path != "none", line.bias.path != "none") for line in explain(swin, (16, 24))]
    assert used == [(True, False), (False, False), (False, True), (True, False)]
    assert swin.layers[0].position(swin.positions(4, 6)).of_block(0).q_rotation is not None
    small = dict(vocab_size=7, context=9, embed_dim=24, depth=3, num_heads=2)
    assert [line.bias.path != "none" for line in explain(TextEncoder("alibi/none", **small),
            torch.ones(1, 5, dtype=torch.long))] == [True, False, True]  # fmt: skip


def test_weights_of_timm_keep_their_own_encoding_where_a_word_has_it():
    theirs = timm.create_model("vit_relpos_small_patch16_224", img_size=32, embed_dim=48, depth=3, num_heads=3)
    ours = from_timm(theirs.eval(), position="logcpb/none")
    assert [block.attn.position is None for block in ours.blocks] == [False, True, False]
    whole = from_timm(theirs)
    kept = ours.blocks[2].attn.position.state_dict()
    assert all(torch.equal(value, whole.blocks[2].attn.position.state_dict()[name]) for name, value in kept.items())
    for position in ("rope/none", "rope_mixed/none"):
        with pytest.raises(ConfigError, match="no ViT whose blocks have different encodings"):
            to_timm(vit(position))


def test_every_second_layer_of_a_stock_stack():
    stack = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 2, 24, batch_first=True), 3, enable_nested_tensor=False
    )
    with pytest.raises(ConfigError, match="every_layer=True"):
        attach(stack, "alibi/none", grid=5)
    attach(stack, "alibi/none", grid=5, every_layer=True)
    assert [bool(layer.position.gives) for layer in stack.layers] == [True, False, True]


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("rope/learned", "LearnedTable adds to tokens once, before the first block: write it into the first word"),
        ("rope/none/rope/none/rope", "5 words, one for each block in turn, and the model has 4 blocks"),
        ("rope/", "cannot read ''"),
        ("rope/roope", "did you mean 'rope'"),
        ([], "or a list of them, one for each block"),
        (["rope", 3], "or a list of them, one for each block"),
    ],
)
def test_what_means_nothing_is_refused(position, message):
    with pytest.raises(ConfigError, match=message):
        ViT(position, **MICRO)


def test_a_pattern_is_no_encoding_by_itself():
    with pytest.raises(ConfigError, match="an encoding for each block of a model in turn"):
        build("rope/none", Dims(24, 2, (4, 6)))
    assert isinstance(build("rope/alibi", Dims(24, 2, (4, 6), block=3, depth=4)), Alibi)
    model = vit("rope/none")
    signal = model.position(model.positions(16, 24))
    with pytest.raises(ValueError, match="give each block"):
        model.blocks[0](randn(1, 25, 24), signal, model.positions(16, 24))
    with pytest.raises(ValueError, match="of two Signals by block"):
        signal.plus(signal)
    assert isinstance(model.position, Cycle)
