"""timm's masks and its names for features: `attn_mask`, `is_causal`, `get_intermediate_layers`, pooling, attributes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models._features_fx import create_feature_extractor
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from tests.helpers import randn, shaken, within
from vit2dpe import MAE, ConfigError, Swin, ViT, from_timm
from vit2dpe.models.simmim import SimMIM

pytestmark = pytest.mark.need("B9")
close = within(2e-5)
SIZES = dict(img_size=(16, 24), patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
BATCH, TOKENS = 2, 8  # a class token, a register, six patches
X = randn(BATCH, 3, 16, 24)


def boolean(*shape: int) -> torch.Tensor:
    allowed = randn(*shape, seed=5) > -0.3
    allowed[..., 0] = True  # timm promises nothing for a query that may attend to no key
    return allowed


MASKS = {
    "tokens": boolean(TOKENS, TOKENS),
    "keys": boolean(BATCH, 1, 1, TOKENS),
    "samples": boolean(BATCH, 1, TOKENS, TOKENS),
    "heads": boolean(1, 3, TOKENS, TOKENS),
    "samples and heads": boolean(BATCH, 3, TOKENS, TOKENS),
    "numbers": randn(BATCH, 3, TOKENS, TOKENS, seed=6),
    "numbers for all": randn(TOKENS, TOKENS, seed=7),
    "minus infinity": torch.zeros(TOKENS, TOKENS).masked_fill(~boolean(TOKENS, TOKENS), float("-inf")),
}


def timm_vit(**more):
    torch.manual_seed(0)
    return shaken(VisionTransformer(**SIZES, reg_tokens=1, **more))


def timm_eva():
    torch.manual_seed(0)
    return shaken(Eva(**SIZES, use_rot_pos_emb=True, use_abs_pos_emb=True, num_reg_tokens=1))


@pytest.mark.need("B9b")
def test_a_mask_on_another_device_is_refused():
    model = ViT("rope", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1)
    with pytest.raises(ValueError, match="attn_mask is on meta, and the tokens are on cpu"):
        model(torch.zeros(1, 3, 16, 16), attn_mask=torch.ones(5, 5, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("make", [timm_vit, timm_eva])
@torch.no_grad()
def test_masks_give_what_they_give_in_timm(make):
    theirs = make()
    ours = from_timm(theirs)
    plain = theirs(X)
    for name, mask in MASKS.items():
        expected = theirs(X, attn_mask=mask)
        assert float((expected - plain).abs().max()) > 1e-3, name
        close(ours(X, mask), expected)
        close(ours.forward_features(X, attn_mask=mask), theirs.forward_features(X, attn_mask=mask))
        (end, found), (end_t, found_t) = (
            model.forward_intermediates(X, attn_mask=mask, norm=True) for model in (ours, theirs)
        )
        for a, b in zip([end, *found], [end_t, *found_t], strict=True):
            close(a, b)
    close(ours(X, is_causal=True), theirs(X, is_causal=True))
    close(ours.forward_intermediates(X, is_causal=True)[0], theirs.forward_intermediates(X, is_causal=True)[0])
    close(ours(X), plain)


@pytest.mark.parametrize("position", ["rope", "alibi", "relative", "lookhere+rope_mixed", "logcpb", "none"])
def test_every_path_of_attention_obeys_a_mask(position):
    """Patches that nobody may attend to change nothing elsewhere: rotations in place, tables, products, matrices."""
    torch.manual_seed(0)
    model = shaken(ViT(position, **SIZES))
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[:, -1] = False
    other = X.clone()
    other[:, :, 8:, 16:] += 1  # the last patch
    for training in (False, True):
        model.train(training).set_grad_checkpointing(training)
        plain, before, after = model(other), model(X, mask), model(other, mask)
        close(after, before)
        assert float((plain - model(X)).detach().abs().max()) > 1e-4
        close(model(X, torch.zeros(7, 7).masked_fill(~mask, float("-inf"))), before)
        before.sum().backward()
    # First tokens do not see later ones: the class token of a causal model sees itself.
    with torch.no_grad():
        first = model.eval().forward_features(X, is_causal=True)[:, 0]
        close(model.forward_features(other + 1, is_causal=True)[:, 0], first)
        both = model.forward_features(X, mask, is_causal=True)
        close(both, model.forward_features(X, mask & torch.ones(7, 7).tril().bool()))


@pytest.mark.parametrize("position", ["rope", "relative", "none"])
@torch.no_grad()
def test_causality_alone_is_torchs_and_makes_no_matrix(position, monkeypatch):
    """Logits and gradients are those of the matrix; without biases the kernel gets `is_causal` and no mask."""
    model, seen = shaken(ViT(position, **SIZES, class_token=True)), []
    matrix = torch.ones(7, 7, dtype=torch.bool).tril()
    found = []
    for arguments in (
        dict(is_causal=True),
        dict(attn_mask=matrix),
        dict(attn_mask=torch.ones_like(matrix), is_causal=True),
    ):
        with torch.enable_grad():
            x = X.clone().requires_grad_()
            out = model(x, **arguments)
            found.append((out, *torch.autograd.grad(out.sin().sum(), [x, model.blocks[0].attn.qkv.weight])))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            close(a, b)
    original = F.scaled_dot_product_attention

    def watched(*args, attn_mask=None, is_causal=False, **more):
        seen.append((attn_mask is None, is_causal))
        return original(*args, attn_mask=attn_mask, is_causal=is_causal, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model(X, is_causal=True)
    assert all(one == ((True, True) if position != "relative" else (False, False)) for one in seen)
    assert seen or position == "relative", "a table has a kernel of its own"


@torch.no_grad()
def test_a_token_that_may_attend_to_nothing_gets_zero_from_attention():
    model = from_timm(timm_vit())
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[3] = False
    for given in (mask, torch.zeros(TOKENS, TOKENS).masked_fill(~mask, float("-inf"))):
        assert torch.isfinite(model.forward_features(X, given)).all()


@torch.no_grad()
def test_a_graph_of_torch_fx_takes_masks():
    model = from_timm(timm_vit())
    graph = create_feature_extractor(model, ["head"])
    for arguments in (dict(), dict(attn_mask=MASKS["heads"]), dict(attn_mask=MASKS["numbers"]), dict(is_causal=True)):
        assert torch.equal(graph(X, **arguments)["head"], model(X, **arguments))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6, 6, dtype=torch.bool), r"N = 8 tokens, leading ones included; got \(6, 6\)"),
        (torch.ones(2, 8, dtype=torch.bool), r"mask\[:, None, None, :\]"),
        (torch.ones(2, 8, 8, dtype=torch.bool), r"for each sample is mask\[:, None\]"),
        (torch.ones(2, 2, 8, 8, dtype=torch.bool), r"H = 3 heads.*got \(2, 2, 8, 8\)"),
        (torch.ones(8, 8, dtype=torch.long), r"boolean.*got torch.int64: use mask.bool\(\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        from_timm(timm_vit())(X, attn_mask=mask)


def test_masks_do_not_go_with_patches_that_are_left_out():
    torch.manual_seed(0)
    model = ViT("rope", **SIZES, patch_drop_rate=0.5).train()
    for given in (dict(is_causal=True), dict(attn_mask=torch.ones(7, 7, dtype=torch.bool))):
        with pytest.raises(ConfigError, match="about all 7 tokens, and 4 are left: patch_drop_rate"):
            model(X, **given)
    assert model.eval()(X, is_causal=True).shape == (BATCH, 5)
    encoder = ViT("rope", **SIZES | dict(num_classes=0))
    swin = Swin(img_size=16, patch_size=2, embed_dim=24, depths=(1, 1), num_heads=(2, 2), window_size=4)
    for other, size in ((MAE(encoder, decoder_embed_dim=32, decoder_num_heads=2), 16), (swin, 16)):
        with pytest.raises(TypeError, match="attn_mask"):
            other(randn(1, 3, size, size), attn_mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="attn_mask"):
        SimMIM(encoder, mask_unit=8)(X, attn_mask=torch.ones(7, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match="a token_filter is given by name"):
        encoder.forward_features(X, lambda x, at: (x, at))


@torch.no_grad()
def test_intermediate_layers_by_the_names_of_dino():
    theirs = timm_vit()
    ours = from_timm(theirs)
    mask = MASKS["tokens"]
    for n in (1, 2, [0]):
        for arguments in (dict(), dict(reshape=True, norm=True), dict(return_prefix_tokens=True), dict(attn_mask=mask)):
            found, expected = (model.get_intermediate_layers(X, n, **arguments) for model in (ours, theirs))
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
                assert all(part.shape == peer.shape for part, peer in pairs)
                close(a[0], b[0])
    (patches, first), *_ = ours.get_intermediate_layers(X, 1, return_class_token=True, norm=True)
    expected = theirs.forward_features(X)
    close(patches, expected[:, 2:])
    close(first, expected[:, 0])
    with pytest.raises(ConfigError, match="needs a model with a class token"):
        ViT("rope", **SIZES, class_token=False, global_pool="avg").get_intermediate_layers(X, return_class_token=True)


@pytest.mark.need("B9a")
@pytest.mark.parametrize("pool", ["max", "avgmax"])
@torch.no_grad()
def test_pooling_by_the_largest(pool):
    theirs = timm_vit(global_pool=pool)
    ours = from_timm(theirs)
    close(ours(X), theirs(X))
    features = ours.forward_features(X)
    for kind in ("avg", "max", "avgmax", "token", ""):
        close(ours.pool(features, pool_type=kind), theirs.pool(features, pool_type=kind))
        ours.reset_classifier(4, kind)
        theirs.reset_classifier(4, kind)
        close(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
    with pytest.raises(ConfigError, match="unknown pool_type 'map'"):
        ours.pool(features, pool_type="map")


def test_attributes_that_wrappers_read():
    sizes = dict(img_size=(16, 32), patch_size=(8, 4), embed_dim=48, depth=2, num_heads=3)
    theirs, ours = VisionTransformer(**sizes, reg_tokens=2), ViT(**sizes, reg_tokens=2)
    for name in ("has_class_token", "num_reg_tokens", "num_prefix_tokens", "embed_dim", "num_features"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.no_embed_class, "tables have no rows for leading tokens"
    assert ours.feature_info == theirs.feature_info
    a, b = ours.patch_embed, theirs.patch_embed
    for name in ("grid_size", "num_patches", "img_size", "patch_size", "dynamic_img_pad"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.feat_ratio(), a.feat_ratio(as_scalar=False)) == (b.feat_ratio(), b.feat_ratio(as_scalar=False))
    assert a.dynamic_feat_size((32, 64)) == b.dynamic_feat_size((32, 64))
    assert not a.strict_img_size
    a.strict_img_size = True
    with pytest.raises(ConfigError, match="images only"):
        ours(randn(1, 3, 32, 32))
    for part, peer in ((ours.blocks[0].attn, theirs.blocks[0].attn),):
        assert (part.num_heads, part.head_dim) == (peer.num_heads, peer.head_dim)
    ours.set_input_size((32, 32))
    theirs.set_input_size((32, 32))
    assert (a.grid_size, a.num_patches) == (b.grid_size, b.num_patches)
    windows = dict(img_size=32, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(3, 6), window_size=4)
    swin, peer = Swin(**windows), SwinTransformer(**windows)
    assert swin.patch_embed.grid_size == peer.patch_embed.grid_size
    assert swin.feature_info == peer.feature_info
    assert swin.layers[1].blocks[0].attn.num_heads == peer.layers[1].blocks[0].attn.num_heads
