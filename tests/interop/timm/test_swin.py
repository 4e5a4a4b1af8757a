"""Swin is timm's and torchvision's, V1 and V2, with their weights; its windows are those of a double loop."""

import itertools

import pytest
import timm
import torch
import torchvision
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torchvision.models import swin_transformer as tv

import vit2dpe.models  # noqa: F401 - registers the names with timm
from tests.helpers import randn, shaken, within
from tests.interop.timm.trajectory import assert_fifty_equal_steps
from vit2dpe import CheckpointError, ConfigError, Positions, Signal, attend, from_timm, to_timm, use_policy
from vit2dpe.attention.windows import cut
from vit2dpe.encodings import NoPosition, RelativeBias
from vit2dpe.interop.timm.swin import from_timm_swin, to_timm_swin
from vit2dpe.models import Swin
from vit2dpe.models.swin.stage import WindowAttention
from vit2dpe.models.swin.weights import checkpoint_filter_fn
from vit2dpe.signal import Table

MICRO = dict(embed_dim=16, depths=(2, 2, 2), num_heads=(2, 4, 8), num_classes=5)
FAMILIES = {"v1": SwinTransformer, "v2": SwinTransformerV2}
V2 = dict(position="logcpb", qk="cosine", post_norm=True)


def theirs_of(family, **kwargs):
    torch.manual_seed(0)
    sizes = {**MICRO, "img_size": (24, 40), "patch_size": 2, "window_size": (3, 5), **kwargs}
    return shaken(FAMILIES[family](**sizes))


close = within(1e-5, spread=0.05)


# timm -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@torch.no_grad()
def test_the_full_sized_models_are_timms(name):
    theirs = shaken(timm.create_model(name), 0.03)
    ours = from_timm_swin(theirs)
    x = randn(1, *theirs.pretrained_cfg["input_size"])
    close(ours(x), theirs(x))
    assert not ours.training


@torch.no_grad()
def test_our_name_takes_the_weights_of_timms():
    less = dict(depths=(1, 1, 2, 1), embed_dim=48)
    theirs = shaken(timm.create_model("swin_tiny_patch4_window7_224", **less), 0.05)
    ours = timm.create_model("vit2dpe_swin_tiny_patch4_window7_224", **less).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(1, 3, 224, 224)
    close(ours(x), theirs(x))


VARIANTS = {
    "windows that shrink to the grid": dict(img_size=(12, 20)),
    "one window for each stage": dict(window_size=((4, 5), (2, 5), (1, 5))),
    "no bias": dict(qkv_bias=False),
    "no head, grey": dict(num_classes=0, in_chans=1),
    "largest": dict(global_pool="max"),
    "a patch that is not square": dict(patch_size=(2, 4), img_size=(24, 80)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_the_variants_are_timms(family, kwargs):
    theirs = theirs_of(family, **kwargs)
    ours = from_timm_swin(theirs)
    x = randn(2, theirs.in_chans, *theirs.patch_embed.img_size)
    close(ours(x), theirs(x))
    close(ours.forward_features(x), theirs.forward_features(x))
    close(ours.forward_head(ours.forward_features(x), True), theirs.forward_head(theirs.forward_features(x), True))
    for mine, other in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
        close(mine, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["keep", "scale"])
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # timm's
@torch.no_grad()
def test_other_sizes_are_timms_with_windows_kept_and_scaled(family, policy):
    """What timm calls `set_input_size` is ours at run time. At twice the size whole windows fill every stage."""
    theirs = theirs_of(family, pretrained_window_sizes=((3, 5),) * 3) if family == "v2" else theirs_of(family)
    word = "logcpb" if family == "v2" else "relative(resize=geometric)"  # timm's rule, not the original's
    ours = from_timm_swin(theirs, window_policy=policy)
    sized = Swin(word, **_arguments(ours), window_policy=policy).eval()
    sized.load_state_dict(ours.state_dict())
    x = randn(1, 3, 48, 80)
    theirs.set_input_size((48, 80), window_size=(3, 5) if policy == "keep" else None)
    assert theirs.layers[0].blocks[0].window_size == ((3, 5) if policy == "keep" else (6, 10))
    close(sized(x), theirs(x))
    sized.set_input_size((48, 80))
    assert sized.window_sizes == tuple(stage.blocks[0].window_size for stage in theirs.layers)
    close(sized(x), theirs(x))


def _arguments(model):
    v2 = model.layers[0].blocks[0].post_norm
    return {
        **MICRO, "img_size": (24, 40), "patch_size": 2, "window_size": (3, 5), "qk": "cosine" if v2 else "dot",
        "post_norm": v2,
    }  # fmt: skip


# Of patches: filled up in some stage, in all, along one axis; one window and less.
UNEVEN = [(26, 44), (32, 32), (14, 50), (24, 40), (6, 10), (4, 6), (2, 2)]


@pytest.mark.need("B11")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_any_size_is_timms(family):
    theirs = theirs_of(family, dynamic_img_size=True)
    ours = from_timm(theirs)
    masked = from_timm_swin(theirs, padding="mask")
    for size in UNEVEN:
        x = randn(2, 3, *size)
        expected = theirs(x)
        close(ours(x), expected)
        if size != (24, 40):
            assert float((masked(x) - expected).abs().max()) > 1e-3, size
    ours.padding = "mask"
    close(ours(x), masked(x), 0.0)


@pytest.mark.need("B11")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # timm's
@torch.no_grad()
def test_any_size_made_the_models_own_is_timms(family):
    """With windows kept, larger (along both axes: timm's resize stretches an axis that stays too), as a ratio."""
    more = dict(pretrained_window_sizes=((3, 5),) * 3) if family == "v2" else {}
    for size, windows in (((26, 44), (3, 5)), ((32, 60), (4, 7)), ((12, 20), (3, 5)), ((50, 30), None)):
        theirs = theirs_of(family, **more)
        ours = from_timm(theirs)
        ratio = dict(window_ratio=2) if windows is None else dict(window_size=windows)
        theirs.set_input_size(size, **ratio)
        ours.set_input_size(size, **ratio)
        assert ours.window_sizes == tuple(stage.blocks[0].window_size for stage in theirs.layers)
        x = randn(2, 3, *size)
        close(ours(x), theirs(x))
        close(from_timm(theirs)(x), theirs(x))


@torch.no_grad()
def test_the_window_of_pretraining_keeps_the_scale_of_v2():
    theirs = theirs_of("v2", pretrained_window_sizes=((2, 4), (2, 4), (0, 0)))
    ours = from_timm_swin(theirs)
    x = randn(2, 3, 24, 40)
    close(ours(x), theirs(x))
    forgotten = from_timm_swin(theirs, pretrained_window_sizes=0)
    assert float((forgotten(x) - theirs(x)).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ours_go_back_to_timm(family):
    theirs = theirs_of(family)
    back = FAMILIES[family](**{**MICRO, "img_size": (24, 40), "patch_size": 2, "window_size": (3, 5)}).eval()
    back.load_state_dict(to_timm_swin(from_timm_swin(theirs)), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), theirs.parameters(), strict=True))


@torch.no_grad()
def test_a_network_of_other_windows_goes_back_with_their_sizes():
    ours = shaken(Swin(img_size=(24, 40), patch_size=2, window_size=(3, 5), window_policy="scale", **MICRO, **V2))
    ours.set_input_size((48, 80))
    sizes = dict(img_size=(48, 80), patch_size=2, window_size=(6, 10))
    theirs = SwinTransformerV2(**MICRO, **sizes, pretrained_window_sizes=((3, 5),) * 3).eval()
    theirs.load_state_dict(to_timm_swin(ours), strict=True)
    x = randn(1, 3, 48, 80)
    close(ours(x), theirs(x))


def _some_blocks(dims):
    return RelativeBias(dims.heads, dims.grid) if dims.block != 3 else NoPosition()


NO_SWIN = {
    "rope": (dict(position="rope_mixed"), "layers.0.blocks.0.attn.position is a MixedRoPE"),
    "shared": (dict(position="relative(shared=true)"), "layers.0.position is a RelativeBias"),
    "tokens too": (dict(position="sincos+relative"), "position is a SinCos"),
    "a sum": (dict(position="relative+logcpb"), "layers.0.blocks.0.attn.position is a Sum"),
    "none": (dict(position="none"), "layers.0.blocks.0.attn has no encoding of its own"),
    "not all blocks": (dict(position=_some_blocks), "layers.1.blocks.1.attn has no encoding of its own"),
    "a network, V1": (dict(position="logcpb"), "attn.position is logcpb with qk=dot;"),
    "a table, V2": (dict(V2, position="relative"), "is relative with qk=cosine and norms behind;"),
    "norms before, V2": (dict(V2, post_norm=False), "is logcpb with qk=cosine;"),
    "norms behind, V1": (dict(post_norm=True), "is relative with qk=dot and norms behind;"),
    "a smaller network": (dict(V2, position="logcpb(hidden=32)"), "a network of form swin with 32 hidden units"),
    "another network": (dict(V2, position="logcpb(form=cr, hidden=512)"), "a network of form cr with 512"),
    "a prefix": (dict(position="relative(prefix=true)"), "has entries for prefix tokens"),
}


@pytest.mark.parametrize(("kwargs", "reason"), NO_SWIN.values(), ids=NO_SWIN)
def test_what_timms_swin_has_not_is_refused_with_the_way_out(kwargs, reason):
    with pytest.raises(ConfigError) as error:
        to_timm(Swin(img_size=(24, 40), patch_size=2, window_size=(3, 5), **MICRO, **kwargs))
    said = str(error.value)
    assert reason in said, "what"
    assert "timm's Swin is V1" in said, "why"
    assert "keep such a model in its own names (state_dict)" in said, "what to do"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patch_size", [3, (4, 2)])
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # timm's
@torch.no_grad()
def test_another_patch_is_timms(family, patch_size):
    """Twelve by twenty patches as before, of other pixels: the kernel is resampled, the windows stay."""
    theirs = theirs_of(family)
    rows, columns = (3, 3) if patch_size == 3 else patch_size
    size = (12 * rows, 20 * columns)
    ours = from_timm(theirs, img_size=size, patch_size=patch_size)
    theirs.set_input_size(size, patch_size=(rows, columns), window_size=(3, 5))
    assert ours.train_grid == theirs.patch_embed.grid_size == (12, 20)
    x = randn(1, 3, *size)
    close(ours(x), theirs(x))


@torch.no_grad()
def test_what_windows_and_encodings_do_from_then_on():
    theirs, x = theirs_of("v1"), randn(1, 3, 48, 80)
    for word in ("scale", "scale+resize"):
        close(from_timm(theirs, policy=word)(x), from_timm_swin(theirs, window_policy="scale")(x), 0.0)
    rope, kept = from_timm(theirs, "rope", policy="scale+interpolate"), from_timm(theirs, "rope")
    with use_policy(kept, "scale+interpolate"):
        close(rope(x), kept(x), 0.0)
    with pytest.raises(ConfigError, match="RelativeBias cannot extrapolate: a table has no entries"):
        from_timm(theirs, policy="extrapolate")


@pytest.mark.parametrize("position", ["rope", "alibi+sincos", "rope_mixed", "logcpb", "relative", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_timms_weights_with_another_encoding(family, position):
    theirs = theirs_of(family)
    ours = from_timm_swin(theirs, position)
    x = randn(1, 3, 24, 40)
    assert bool(ours(x).isfinite().all())
    own = position == ("logcpb" if family == "v2" else "relative")
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-6) == own
    assert torch.equal(ours.layers[1].blocks[1].attn.qkv.weight, theirs.layers[1].blocks[1].attn.qkv.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_of_adamw_are_timms(family):
    small = dict(img_size=(12, 20), depths=(2, 1), num_heads=(2, 4))
    theirs = theirs_of(family, drop_path_rate=0.0, **small).train()
    ours = from_timm_swin(theirs)
    images = randn(50, 4, 3, 12, 20, seed=1)
    assert_fifty_equal_steps(theirs, ours, lambda step: images[step])


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (lambda: timm.create_model("swinv2_cr_tiny_224"), "SwinTransformerV2Cr is not covered"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "VisionTransformer is not covered"),
        (lambda: theirs_of("v1", always_partition=True), "always_partition"),
        (lambda: theirs_of("v1", head_dim=4), "heads of another width"),
        (lambda: theirs_of("v2", act_layer="relu"), "not GELU"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(theirs, reason):
    with pytest.raises(ValueError, match=reason):
        from_timm_swin(theirs())


# torchvision and the original -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
@torch.no_grad()
def test_the_full_sized_models_are_torchvisions(name):
    theirs = shaken(getattr(torchvision.models, name)(), 0.03)
    size, v2 = (256, V2) if "v2" in name else (224, {})
    ours = Swin(img_size=size, window_size=8 if v2 else 7, **v2).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(1, 3, size, size)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(96, 160), (24, 40), (33, 47), (20, 12), (4, 8)])
@pytest.mark.parametrize("v2", [False, True])
@torch.no_grad()
def test_any_size_is_torchvisions_where_filled_up_places_are_attended_to(v2, size):
    """Its convolution drops what is less than a patch; ours would fill it up, so it is dropped here."""
    kinds = dict(block=tv.SwinTransformerBlockV2, downsample_layer=tv.PatchMergingV2) if v2 else {}
    sizes = {**MICRO, "depths": list(MICRO["depths"]), "num_heads": list(MICRO["num_heads"])}
    theirs = shaken(tv.SwinTransformer(patch_size=[4, 4], window_size=[3, 5], **sizes, **kinds))
    build = dict(img_size=(96, 160), patch_size=4, window_size=(3, 5), **MICRO, **(V2 if v2 else {}))
    ours, masked = Swin(padding="attend", **build).eval(), Swin(**build).eval()
    for model in (ours, masked):
        model.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(2, 3, *size)
    whole = x[..., : size[0] // 4 * 4, : size[1] // 4 * 4]
    expected = theirs(x)
    close(ours(whole), expected)
    if size != (96, 160):  # some stage is filled up
        assert float((masked(whole) - expected).abs().max()) > 1e-3


def test_the_originals_checkpoint_is_read():
    """Patch merging at the end of a stage, `head`, wrapped, with its buffers; built from timm's own."""
    theirs = theirs_of("v1")
    state = theirs.state_dict()
    old = {}
    for name, value in state.items():
        for i in (1, 2):
            name = name.replace(f"layers.{i}.downsample", f"layers.{i - 1}.downsample")
        old[name.replace("head.fc", "head")] = value
    old["layers.0.blocks.1.attn_mask"] = old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(3)
    ours = Swin(img_size=(24, 40), patch_size=2, window_size=(3, 5), **MICRO).eval()
    ours.load_state_dict(checkpoint_filter_fn({"model": old}, ours), strict=True)
    x = randn(2, 3, 24, 40)
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_a_flat_table_of_another_window_is_refused_ours_is_resized():
    theirs = theirs_of("v1")
    sizes = dict(img_size=(48, 80), patch_size=2, window_size=(4, 6))
    ours = Swin("relative(resize=geometric)", padding="timm", **sizes, **MICRO)
    with pytest.raises(CheckpointError, match="has 45 rows, a window of 4 by 6 has 77"):
        ours.load_state_dict(theirs.state_dict())
    small = from_timm_swin(theirs)
    ours.load_state_dict(small.state_dict())
    again = from_timm_swin(theirs)
    again.set_input_size((48, 80), window_size=(4, 6))
    x = randn(1, 3, 48, 80)
    with torch.no_grad():
        close(ours.eval()(x), again(x), 1e-6)


# Windows --------------------------------------------------------------------------------------------------------------

GRIDS = [(6, 10), (7, 11), (3, 5), (2, 3), (1, 1), (13, 5)]


def allowed_by_loops(grid, window, shifted):
    """H W lists of H W: whether two places are in one window, cut at multiples of the window from the shift on."""
    several = [size > side for size, side in zip(grid, window, strict=True)]
    shift = [side // 2 if shifted and more else 0 for side, more in zip(window, several, strict=True)]
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    number = [tuple((p[a] - shift[a]) // window[a] for a in (0, 1)) for p in places]
    return [[one == other for other in number] for one in number]


@pytest.mark.parametrize("window", [(3, 5), (4, 2), (1, 3)])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shifted", [False, True])
@torch.no_grad()
def test_attention_in_windows_is_attention_on_the_grid_with_the_mask_of_a_double_loop(grid, window, shifted):
    torch.manual_seed(0)
    attention, images = shaken(WindowAttention(8, 2)).double(), 2
    table = torch.randn(2, 2 * window[0] - 1, 2 * window[1] - 1, dtype=torch.float64)
    x = torch.randn(images, *grid, 8, dtype=torch.float64)
    at = Positions.grid(window)
    windows = cut(grid, window, images, shifted=shifted, masked=True, device=x.device)
    ours = attention(x, Signal(bias=(Table(table, at, at),)), windows)

    places, n = list(itertools.product(range(grid[0]), range(grid[1]))), grid[0] * grid[1]
    allowed, width = allowed_by_loops(grid, window, shifted), 2 * window[1] - 1
    entry = [  # of the flat table
        (p[0] - k[0] + window[0] - 1) * width + p[1] - k[1] + window[1] - 1 if allowed[i][j] else 0
        for (i, p), (j, k) in itertools.product(enumerate(places), enumerate(places))
    ]
    bias = table.flatten(1)[:, entry].view(1, 2, n, n)
    allowed = torch.tensor(allowed)
    q, k, v, _, _ = attention.split(x.flatten(1, 2), Signal())
    scores = (q @ k.mT) / 2 + bias
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    dense = attention.proj((weights @ v).transpose(1, 2).flatten(2)).unflatten(1, grid)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    assert torch.equal(windows.join(windows.split(x), images), x)


@pytest.mark.parametrize(
    ("grid", "unmasked", "others"), [((12, 20), 9, 7), ((6, 5), 1, 1), ((11, 20), 9, 7), ((10, 16), 6, 10)]
)
def test_most_windows_have_no_mask_and_the_others_go_together(grid, unmasked, others):
    """Where the grid was filled up far enough, the last two windows along an axis have a mask."""
    groups = cut(grid, (3, 5), 7, shifted=True, masked=True, device=torch.device("cpu")).groups
    assert groups[0] == (unmasked, None)
    assert groups[1][0] == others
    assert len(groups) == 2
    masks = groups[1][1].unflatten(0, (others, 7))
    assert masks.shape == (others, 7, 1, 15, 15)
    assert bool((masks == masks[:, :1]).all())
    assert all(not mask.all() for mask in masks[:, 0, 0])


def test_windows_that_are_not_shifted_nor_filled_up_are_views():
    x = randn(2, 6, 10, 4)
    windows = cut((6, 10), (3, 5), 2, shifted=False, masked=True, device=x.device)
    assert windows.order is None
    assert windows.groups == ((4, None),)
    assert torch.equal(windows.split(x)[6], x[0, 3:, 5:].flatten(0, 1))  # the last window of the first image
    assert torch.equal(windows.join(windows.split(x), 2), x)


@torch.no_grad()
def test_one_mask_for_all_windows_gives_the_same(monkeypatch):
    """What is traced is what runs: the one group of a compiled model and the kinds of an eager one."""
    torch.manual_seed(0)
    attention, x = shaken(WindowAttention(8, 2)).double(), torch.randn(3, 7, 11, 8, dtype=torch.float64)
    for shifted, padding in itertools.product((False, True), ("mask", "attend", "timm")):
        one = dict(shifted=shifted, masked=padding == "mask", device=x.device)
        one |= dict(rolled=(1, 2)) if padding == "timm" else {}
        eager = attention(x, Signal(), cut((7, 11), (3, 5), 3, **one))
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            windows = cut((7, 11), (3, 5), 3, **one)
        assert len(windows.groups) == 1
        torch.testing.assert_close(attention(x, Signal(), windows), eager, rtol=0, atol=1e-12)


def test_nothing_leaks_past_the_edges_of_windows_at_any_size_of_logits():
    """Gradients of one token's output reach its own window alone, with logits of thousands; -100 would leak."""
    torch.manual_seed(0)
    attention = WindowAttention(8, 2)
    with torch.no_grad():
        attention.qkv.weight.mul_(300)
    for grid in ((6, 10), (7, 11)):
        x = torch.randn(1, *grid, 8, requires_grad=True)
        windows = cut(grid, (3, 5), 1, shifted=True, masked=True, device=x.device)
        q, k, _, _, _ = attention.split(x.detach().flatten(1, 2), Signal())
        assert float((q @ k.mT).detach().abs().max()) > 1e3
        out, allowed = attention(x, Signal(), windows), torch.tensor(allowed_by_loops(grid, (3, 5), True))
        for token in range(grid[0] * grid[1]):
            (grad,) = torch.autograd.grad(out.flatten(1, 2)[0, token].sum(), x, retain_graph=True)
            reached = grad.abs().sum(-1).flatten() > 0
            assert not bool((reached & ~allowed[token]).any()), token


@pytest.mark.parametrize("shifted", [False, True])
def test_places_that_were_filled_up_leave_every_gradient_finite(shifted):
    """No query sees nothing: the softmax of that is nobody's promise, and NaN would come back from what is dropped."""
    torch.manual_seed(0)
    attention = shaken(WindowAttention(8, 2))
    for grid in GRIDS:
        x = torch.randn(2, *grid, 8, requires_grad=True)
        windows = cut(grid, (3, 5), 2, shifted=shifted, masked=True, device=x.device)
        assert all(bool(mask.any(dim=-1).all()) for _, mask in windows.groups if mask is not None)
        for signal in (Signal(), Signal(bias=(Table(torch.randn(2, 5, 9), *[Positions.grid((3, 5))] * 2),))):
            attention(x, signal, windows).square().sum().backward()
            for tensor in (x, *attention.parameters()):
                assert bool(tensor.grad.isfinite().all())


def test_attend_is_the_only_attention(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr("vit2dpe.models.swin.stage.attend", counted)
    Swin(img_size=(24, 40), patch_size=2, window_size=(3, 5), **MICRO)(randn(1, 3, 24, 40))
    # Several windows: one call, and two where they are shifted; the second block of the last stage has one window.
    assert len(calls) == 1 + 2 + 1 + 2 + 1 + 1
