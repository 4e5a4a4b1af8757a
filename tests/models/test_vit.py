"""ViT: equal to timm's with timm's weights, any encoding at any size, and the places really matter."""

from __future__ import annotations

import copy

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import vit2dpe.models  # noqa: F401 - registers the names with timm
from tests.helpers import randn, shaken, within
from vit2dpe import ENCODINGS, ConfigError, Dims, PositionEncoding, Positions, ViT, build
from vit2dpe.encodings import MixedRoPE, RelativeBias, SinCos
from vit2dpe.models.layers import add_branch
from vit2dpe.models.parts import LayerScale

SIZES = [(224, 224), (224, 320), (96, 160)]
MICRO = dict(img_size=(8, 12), patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=8)


def micro(position="learned", **changes):
    torch.manual_seed(0)
    return ViT(position, **{**MICRO, **changes})


def images(batch=2, height=8, width=12, seed=2):
    return randn(batch, 3, height, width, seed=seed)


close = within(1e-5)


# timm's weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_timms_weights_give_timms_logits(size):
    theirs = timm.create_model("vit_tiny_patch16_224", depth=3, dynamic_img_size=size != (224, 224))
    shaken(theirs, 0.05)
    ours = timm.create_model("vit2dpe_tiny_patch16_224", depth=3).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(1, *size)
    expected = theirs(x)
    assert float(expected.std()) > 0.1
    close(ours(x), expected)


VARIANTS = {
    "average": dict(global_pool="avg"),
    "average, no class token": dict(global_pool="avg", class_token=False),
    "attention pooling": dict(global_pool="map", class_token=False),
    "registers": dict(reg_tokens=4),
    "qk_norm, LayerScale": dict(qk_norm=True, init_values=0.5),
    "no bias, two to one": dict(qkv_bias=False, mlp_ratio=2.0),
    "norm after": dict(global_pool="avg", fc_norm=False),
    "no head": dict(num_classes=0),
    "attention pooling over all tokens": dict(global_pool="map", pool_include_prefix=True),
    "average over all tokens": dict(global_pool="avg", reg_tokens=2, pool_include_prefix=True),
    "norm before, no norm after": dict(pre_norm=True, final_norm=False),
    "norms inside, no biases": dict(scale_attn_norm=True, scale_mlp_norm=True, proj_bias=False),
    "grey": dict(in_chans=1),
}


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_the_variants_are_timms(kwargs):
    sizes = {**MICRO, **kwargs}
    torch.manual_seed(0)
    theirs = shaken(timm.models.VisionTransformer(**sizes))
    ours = ViT(**sizes).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images()[:, : sizes.get("in_chans", 3)]
    close(ours(x), theirs(x))
    close(ours.forward_features(x), theirs.forward_features(x))
    close(
        ours.forward_head(ours.forward_features(x), pre_logits=True),
        theirs.forward_head(theirs.forward_features(x), pre_logits=True),
    )


@torch.no_grad()
def test_a_copy_takes_timms_weights_too():
    theirs = shaken(timm.models.VisionTransformer(**MICRO))
    ours = copy.deepcopy(micro()).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    close(ours(images()), theirs(images()))


def test_weights_of_another_grid_are_refused_and_the_given_dict_is_left_alone():
    state = timm.models.VisionTransformer(**MICRO).state_dict()
    before = set(state)
    micro().load_state_dict(state)
    assert set(state) == before
    with pytest.raises(ValueError, match="pos_embed has 7 rows, the model needs 3x3 = 9"):
        micro(img_size=12).load_state_dict(state)


# any encoding, any size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ENCODINGS)
@torch.no_grad()
def test_every_encoding_runs_at_every_size(name, size):
    torch.manual_seed(0)
    model = timm.create_model("vit2dpe_small_patch16_224", position=name, depth=1, num_classes=10)
    logits = shaken(model, 0.02)(images(1, *size))
    assert logits.shape == (1, 10)
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0.01


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("reg_tokens", [0, 3])
@pytest.mark.parametrize("pool", ["avg", "token", "map", ""])
def test_leading_tokens_and_pools(class_token, reg_tokens, pool):
    if pool == "token" and not class_token:
        with pytest.raises(ConfigError, match="needs class_token=True"):
            micro(global_pool=pool, class_token=False, reg_tokens=reg_tokens)
        return
    model = shaken(micro("sincos+relative", global_pool=pool, class_token=class_token, reg_tokens=reg_tokens))
    prefix = class_token + reg_tokens
    features = model.forward_features(images()).detach()
    assert features.shape == (2, prefix + 6, 32)
    logits = model.forward_head(features)
    close(model(images()), logits)
    assert logits.shape == ((2, prefix + 6, 8) if pool == "" else (2, 8))

    patches = range(prefix, prefix + 6)
    used = {"avg": patches, "map": patches, "token": [0], "": range(prefix + 6)}[pool]
    for token in range(prefix + 6):
        changed = features.clone()
        changed[:, token] += torch.randn(32)
        moved = (model.forward_head(changed) - logits).detach().abs().max()
        assert (moved > 1e-4) == (token in used), token


def test_leading_tokens_have_no_place():
    at = micro(reg_tokens=2).positions(16, 12)
    assert (at.prefix, at.extent, at.coords.shape) == (3, (4, 3), (1, 12, 2))
    signal = build("sincos+alibi+rope", Dims(32, 2, (2, 3)))(at)
    assert not signal.token[:, :3].any()
    assert bool((signal.q_rotation.cos[:, :, :3] == 1).all())
    assert not signal.bias[0].dense()[:, :, :3].any()
    assert not signal.bias[0].dense()[..., :3].any()


@pytest.mark.parametrize(
    ("size", "message"),
    [((230, 224), "16x16: got 230x224"), ((224, 8), "16x16: got 224x8; nearest: 224x16")],
)
def test_an_image_that_the_patch_does_not_divide_is_refused(size, message):
    model = timm.create_model("vit2dpe_tiny_patch16_224", depth=1)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=message):
        ViT(img_size=size, depth=1)


# where encodings live ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_encoding_before_every_block():
    model = shaken(micro("none", block_position="sincos"))
    plain = micro("none").eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    token = SinCos(32)(plain.positions(8, 12)).token
    close(model(images()), model(images()))
    assert float((plain(images()) - model(images())).abs().max()) > 1e-2
    for block in plain.blocks:
        block.register_forward_pre_hook(lambda _, args: (args[0] + token, *args[1:]))
    close(plain(images()), model(images()), 1e-6)


def test_per_block_encodings_live_in_blocks_and_shared_ones_in_the_model():
    model = micro("sincos+rope_mixed+alibi")
    assert [type(term).__name__ for term in model.position.terms] == ["SinCos", "Alibi"]
    own = [block.attn.position for block in model.blocks]
    assert all(isinstance(part, MixedRoPE) for part in own)
    assert not torch.equal(own[0].freqs, own[1].freqs)
    names = {f"blocks.{i}.attn.position.freqs" for i in range(2)}
    assert names == {name for name, _ in model.named_parameters() if "position" in name}

    shared = micro("relative(shared=true)")
    assert all(block.attn.position is None for block in shared.blocks)
    assert isinstance(shared.position, RelativeBias)

    both = micro("learned", block_position="relative+sincos")
    assert [name for name, _ in both.named_parameters() if "position" in name] == [
        "position.pos_embed",
        *(f"blocks.{i}.attn.position.terms.0.relative_position_bias_table" for i in range(2)),
    ]


@torch.no_grad()
def test_a_blocks_own_signal_joins_the_shared_one():
    one = shaken(micro("sincos+rope+alibi+relative(shared=true)"), 0.3)
    each = micro("sincos+rope+alibi+relative").eval()
    missing, unexpected = each.load_state_dict(one.state_dict(), strict=False)
    assert unexpected == ["position.terms.3.relative_position_bias_table"]
    assert len(missing) == len(each.blocks)
    for block in each.blocks:
        block.attn.position.relative_position_bias_table.copy_(one.position.terms[3].relative_position_bias_table)
    close(each(images()), one(images()), 1e-6)


@pytest.mark.parametrize("argument", ["position", "block_position"])
def test_a_block_gets_a_copy_of_an_instance_with_parameters_drawn_anew(argument):
    instance = RelativeBias(2, (2, 3))
    with torch.no_grad():
        instance.relative_position_bias_table.fill_(7.0)
    model = micro(**{"position": "none", argument: instance})
    first, second = (block.attn.position.relative_position_bias_table for block in model.blocks)
    assert len({id(first), id(second), id(instance.relative_position_bias_table)}) == 3
    assert float(first.detach().abs().max()) < 1
    assert not torch.equal(first, second)
    assert bool((instance.relative_position_bias_table == 7.0).all())


def test_two_models_made_from_one_instance_share_nothing():
    instance = build("learned+relative", Dims(32, 2, (2, 3)))
    one, other = micro(instance), micro(instance)
    shared = {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}
    assert not shared


@pytest.mark.parametrize("position", [*ENCODINGS, "learned+relative"])
def test_no_weight_decay_names_every_table_token_and_frequency(position):
    model = micro(position, block_position=position, reg_tokens=2)
    inside = {
        f"{owner}.{name}"
        for owner, part in model.named_modules()
        if isinstance(part, PositionEncoding)
        for name, _ in part.named_parameters()
    }
    assert model.no_weight_decay() == inside | {"cls_token", "reg_token"}
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    kept = [p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    kept = {id(p) for p in kept}
    parameters = dict(model.named_parameters())
    assert all(id(parameters[name]) in kept for name in inside | {"cls_token", "reg_token"})
    assert id(parameters["blocks.0.attn.qkv.weight"]) not in kept


def test_layer_decay_puts_a_blocks_encoding_into_its_block():
    model = micro("learned+relative")
    groups = timm.optim.param_groups_layer_decay(model, 0.1, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale["position.pos_embed"] == scale["cls_token"] == scale["patch_embed.proj.weight"]
    for i in range(2):
        own = f"blocks.{i}.attn.position.relative_position_bias_table"
        assert scale[own] == scale[f"blocks.{i}.attn.qkv.weight"]
    assert scale["position.pos_embed"] < scale["blocks.0.attn.qkv.weight"] < scale["blocks.1.attn.qkv.weight"]


def test_the_class_token_cannot_be_pooled_where_there_is_none():
    model = micro(global_pool="avg", class_token=False)
    with pytest.raises(ValueError, match="class_token"):
        model.reset_classifier(8, "token")


# training ----------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for enable in (False, True):
        # Pooled by "avg": a class token has no place, so it would leave the last block's relative table untouched.
        model = micro("learned+rope_mixed+relative", block_position="learned", global_pool="avg")
        model = shaken(model).train()
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(bool(grad.any()) for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("name", ENCODINGS)
def test_one_batch_is_learned_by_heart(name):
    model, x, labels = micro(name, global_pool="avg"), images(8), torch.arange(8)
    nn.init.normal_(model.head.weight, std=0.3)
    model.head.requires_grad_(False)  # the head alone would do it in one step
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    for step in range(50):
        logits = model(x)
        loss = cross_entropy(logits, labels)
        if step == 0:
            assert float(loss.detach()) > 1
        elif float(loss.detach()) < 0.05:
            assert torch.equal(logits.argmax(1), labels)
            assert not [n for n, p in trained.items() if torch.equal(p, start[n])], "nothing is left untrained"
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"loss {float(loss.detach()):.2f} after 50 steps")


@pytest.mark.parametrize("name", ENCODINGS)
@torch.no_grad()
def test_only_without_places_may_patches_be_permuted(name):
    model = shaken(micro(name, global_pool="avg", class_token=False), 0.3)
    x = images()
    patches = nn.functional.unfold(x, 4, stride=4)  # (B, C p p, 6)
    swapped = nn.functional.fold(patches[..., [1, 0, 2, 3, 4, 5]], (8, 12), 4, stride=4)
    moved = float((model(x) - model(swapped)).abs().max())
    assert (moved < 1e-5) if name == "none" else (moved > 1e-3)


# the words on the way in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(global_pool="median"), "unknown global_pool 'median'"),
        (dict(embed_dim=30, num_heads=4), "got 30 and 4"),
        (dict(position="rop"), "unknown encoding 'rop'; did you mean 'rope'"),
        (dict(position=3), "a word, a PositionEncoding or a list"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        micro(**arguments)


def test_the_model_says_where_its_tokens_are():
    model = micro()
    seen = []
    model.position.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images(2, 12, 20))
    assert isinstance(seen[0], Positions)
    assert torch.equal(seen[0].coords, model.positions(12, 20).coords)
    assert (seen[0].extent, seen[0].prefix) == ((3, 5), 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_branch_ends_as_timms_does_and_its_hooks_are_called(training, rate):
    generator = torch.Generator().manual_seed(0)
    x, branch = torch.randn(2, 8, 3, 6, generator=generator).unbind(0)
    scale, theirs = LayerScale(6, 0.5), timm.layers.LayerScale(6, 0.5)
    drop_path = (timm.layers.DropPath(rate) if rate else nn.Identity()).train(training)
    seen = []
    scale.register_forward_hook(lambda *given: seen.append(given))
    torch.manual_seed(0)
    ours = add_branch(x, branch, scale, drop_path)
    torch.manual_seed(0)
    assert torch.equal(ours, x + drop_path(theirs(branch)))
    assert len(seen) == 1
    assert (ours == x).all(dim=(1, 2)).any() == bool(training and rate)


def test_a_drop_path_of_another_kind_is_called():
    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    x, branch = torch.randn(2, 2, 3, 4).unbind(0)
    scale = LayerScale(4, 0.5)
    assert torch.equal(add_branch(x, branch, scale, Half()), x + scale(branch) / 2)
