"""Blocks in windows among global ones: what full attention gives under a mask, and what ViTDet and SAM give."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer_sam import VisionTransformerSAM

import vit2dpe
from tests.helpers import randn, shaken, within
from vit2dpe import ConfigError, ViT
from vit2dpe.attention import masks
from vit2dpe.attention.functional import FullMask
from vit2dpe.encodings import ENCODINGS
from vit2dpe.models.card import card
from vit2dpe.models.layers import run_block
from vit2dpe.models.mixed import pad
from vit2dpe.positions import Positions
from vit2dpe.resolution.apply import policies_of, position_groups

SIZES = dict(img_size=(40, 72), patch_size=8, embed_dim=48, depth=3, num_heads=2, num_classes=0)
WINDOWS = dict(window=(3, 4), global_blocks=(1,))  # which divide neither 5 x 9 nor 3 x 12
WORDS = [*ENCODINGS, "relative(prefix=true)", "relative(shared=true,prefix=true)", "sincos+rope+relative", "shaw+rope"]
WORDS += ["relative(shared=true,prefix=true)/rope", "alibi/none"]  # words by block
exact, close = within(1e-12), within(2e-5)


def vit(position: str = "rope", **changes: object) -> ViT:
    return shaken(ViT(position, **SIZES | WINDOWS | changes), 0.3).eval()


def under_masks(model: ViT, images: torch.Tensor, near: torch.Tensor | None = None) -> torch.Tensor:
    """The features of the same blocks, each on all tokens; those in windows under a mask of pairs."""
    x, signal, at = model.embed(images)
    near = masks.same_tile(at, at, model.windowing.side) if near is None else near
    for i, block in enumerate(model.blocks):
        mask = [FullMask(near)] if i in model.windowing.blocks else []
        x = run_block(block, x, signal, at, *mask, index=i)
    return model.norm(x)


@pytest.mark.parametrize("word", WORDS)
@torch.no_grad()
def test_blocks_in_windows_are_blocks_under_a_mask(word):
    model = vit(word, reg_tokens=1).double()
    for size in ((40, 72), (24, 96)):
        images = randn(2, 3, *size).double()
        for policy in ("default", *(p for p in ("interpolate",) if p in policies_of(model))):
            with vit2dpe.use_policy(model, policy, temperature="log"):
                exact(model.forward_features(images), under_masks(model, images))


def test_gradients_are_those_under_a_mask_and_with_recomputed_blocks():
    images = randn(2, 3, 40, 72).double()
    model = vit("sincos+rope+relative", reg_tokens=1).double()
    found = []
    for features in (lambda: model.forward_features(images), lambda: under_masks(model, images)):
        found.append(torch.autograd.grad(features().square().sum(), list(model.parameters()), allow_unused=True))
    model.set_grad_checkpointing()
    out = model.forward_features(images).square().sum()
    found.append(torch.autograd.grad(out, list(model.parameters()), allow_unused=True))
    for ours, dense, again in zip(*found, strict=True):
        assert (ours is None) == (dense is None) == (again is None)
        if ours is not None:
            within(1e-9)(ours, dense)
            assert torch.equal(ours, again)


@pytest.mark.parametrize("word", ["learned", "relative", "rope_mixed+shaw", "rope/alibi"])
@torch.no_grad()
def test_windows_as_large_as_the_grid_are_the_plain_model(word):
    plain, windowed = vit(word, window=None, global_blocks=()), vit(word, window=(5, 9))
    windowed.load_state_dict(plain.state_dict())  # the parameters are those of the plain model
    images = randn(2, 3, 40, 72)
    assert torch.equal(windowed(images), plain(images))
    larger = randn(2, 3, 48, 72)
    assert not torch.allclose(windowed(larger), plain(larger), atol=1e-3)


@pytest.mark.parametrize("word", ["rope", "learned+relative"])
@torch.no_grad()
def test_windows_around_each_token_are_a_neighbourhood(word):
    model = vit(word, window=(3, 5), window_kind="around").double()
    images = randn(2, 3, 40, 72).double()
    places = Positions.grid((5, 9)).coords[0]
    near = torch.ones(46, 46, dtype=torch.bool)  # a class token attends, and is attended to
    for i, p in enumerate(places):
        for j, q in enumerate(places):
            near[i + 1, j + 1] = abs(p[0] - q[0]) <= 1 and abs(p[1] - q[1]) <= 2
    exact(model.forward_features(images), under_masks(model, images, near))


@torch.no_grad()
def test_masks_of_a_user_and_patches_that_are_left_out_go_together_with_windows():
    model = vit("rope+alibi").double()
    images = randn(2, 3, 40, 72).double()
    x, _, at = model.embed(images)
    allowed = randn(2, 1, 46, 46, seed=3) > -0.5
    allowed |= torch.eye(46, dtype=torch.bool)
    signal = model.position(at)
    near = masks.same_tile(at, at, (3, 4))
    for i, block in enumerate(model.blocks):
        x = run_block(block, x, signal, at, allowed & near if i in (0, 2) else allowed, index=i)
    exact(model.forward_features(images, attn_mask=allowed), model.norm(x))
    order = torch.ones(46, 46, dtype=torch.bool).tril()
    exact(model.forward_features(images, is_causal=True), model.forward_features(images, attn_mask=order))
    kept = torch.stack([torch.randperm(45)[:20].sort().values for _ in range(2)])
    drop = lambda x, at: (x.gather(1, kept[..., None].expand(-1, -1, 48)), at.take(kept))  # noqa: E731
    x, signal, at = model.embed(images, drop)
    near = masks.same_tile(at, at, (3, 4))
    for i, block in enumerate(model.blocks):
        x = run_block(block, x, signal, at, *[near] * (i != 1), index=i)
    exact(model.forward_features(images, token_filter=drop), model.norm(x))


@torch.no_grad()
def test_a_video_has_windows_too():
    sizes = dict(img_size=(4, 24, 40), patch_size=(2, 8, 8), window=(1, 2, 3), global_blocks=())
    model, video = vit("rope+relative", **sizes).double(), randn(1, 3, 4, 24, 40).double()
    exact(model.forward_features(video), under_masks(model, video))
    with pytest.raises(ConfigError, match="for rows and columns, got 3 axes"):
        vit("relative", **sizes, window_tables=True)


@pytest.mark.parametrize("spacing", [0.5, (2.0, 0.25)])
@torch.no_grad()
def test_pixels_of_another_size_in_the_world(spacing):
    model, images = vit("rope+alibi").double(), randn(1, 3, 40, 72).double()
    x, signal, at = model.embed(images, spacing=spacing)
    on_grid = model.positions(40, 72)
    near = FullMask(masks.same_tile(on_grid, on_grid, (3, 4)))
    for i, block in enumerate(model.blocks):
        x = run_block(block, x, signal, at, *[near] * (i != 1), index=i)
    exact(model.forward_features(images, spacing=spacing), model.norm(x))


def sam(img_size: tuple[int, int]) -> tuple[VisionTransformerSAM, ViT]:
    """timm's SAM, and ours with its weights."""
    torch.manual_seed(0)
    sizes = dict(img_size=img_size, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5)
    theirs = shaken(
        VisionTransformerSAM(**sizes, window_size=4, use_rel_pos=True, global_attn_indexes=(1,)), 0.2
    ).eval()
    ours = ViT(
        "learned+decomposed",
        **sizes,
        class_token=False,
        global_pool="avg",
        norm_eps=1e-5,
        window=4,
        global_blocks=(1,),
        window_kind="zeros",
        window_tables=True,
    ).eval()
    state = {name.replace("rel_pos", "position.rel_pos"): value for name, value in theirs.state_dict().items()}
    for name in [name for name in state if name.startswith(("neck", "head"))]:
        del state[name]
    table = [name for name in ours.state_dict() if name.endswith("pos_embed")]
    state[table[0]] = state.pop("pos_embed")
    lacking, further = ours.load_state_dict(state, strict=False)
    assert not further
    assert all(name.startswith(("fc_norm", "head")) for name in lacking)
    return theirs, ours


@pytest.mark.parametrize("img_size", [(40, 72), (24, 88)])  # 5 x 9 and 3 x 11: a window has more rows than the grid
@torch.no_grad()
def test_zeros_and_tables_of_the_window_are_sam(img_size):
    theirs, ours = sam(img_size)
    assert ours.blocks[0].attn.position.rel_pos_h.shape == (7, 16)
    for size in (img_size, (64, 48)):
        images = randn(2, 3, *size)
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        for one, other in zip(ours.forward_intermediates(images, intermediates_only=True), expected, strict=True):
            close(one, other)


@torch.no_grad()
def test_tables_of_the_window_stay_as_they_are_at_other_sizes():
    model = vit("relative", window_tables=True).double()
    inside = model.blocks[0].attn.position
    assert inside.relative_position_bias_table.shape == (2, 5, 7)
    found = []
    handle = model.blocks[0].attn.register_forward_pre_hook(
        lambda _, args: found.append(args[2].signal.bias[0].dense())
    )
    for size in ((40, 72), (24, 96), (64, 104)):
        for policy in ("default", "interpolate"):
            with vit2dpe.use_policy(model, policy):
                model(randn(1, 3, *size).double())
    handle.remove()
    assert all(torch.equal(one, found[0]) for one in found)
    assert [extent for _, _, extent in position_groups(model)] == [(5, 9), (3, 4), (3, 4)]
    model.set_input_size((64, 48))
    assert inside.relative_position_bias_table.shape == (2, 5, 7)
    assert model.blocks[1].attn.position.relative_position_bias_table.shape == (2, 15, 11)


@torch.no_grad()
def test_maps_are_of_all_tokens_and_explain_names_windows():
    model = vit("rope+relative(prefix=true)", reg_tokens=1)
    images = randn(2, 3, 40, 72)
    with vit2dpe.attention_maps(model) as maps:
        observed = model(images)
    assert torch.equal(observed, model(images))
    with vit2dpe.attention_maps(model) as dense:
        under_masks(model, images)
    assert list(maps) == list(dense) == [f"blocks.{i}.attn" for i in range(3)]
    for name in maps:
        assert maps[name].shape == (2, 2, 47, 47)
        close(maps[name], dense[name])
    lines = vit2dpe.explain(model, (40, 72))
    assert [line.mask.path for line in lines] == ["windows", "none", "windows"]
    assert "6 windows of 3x4" in str(lines[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in (dict(window_kind="around", window=3), dict(window_tables=True))
        ),
    ],
)
@torch.no_grad()
def test_one_graph_gives_the_same(changes):
    model = vit("sincos+relative", num_classes=5, depth=2, **changes)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = randn(2, 3, 40, 72)
    close(compiled(images), model(images))
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_a_graph_for_all_sizes_and_an_exported_program_give_the_same():
    model = vit("rope+alibi", num_classes=5, depth=2)
    program = torch.export.export(model, (randn(2, 3, 40, 72),)).module()
    close(program(randn(2, 3, 40, 72)), model(randn(2, 3, 40, 72)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((40, 72), (24, 96)):
        close(compiled(randn(2, 3, *size)), model(randn(2, 3, *size)))
    torch._dynamo.reset()


def test_a_saved_model_has_its_windows_and_timm_has_no_such_model(tmp_path):
    arguments = dict(window=(3, 4), global_blocks=(-1,), window_tables=True)
    sizes = dict(img_size=(20, 36), embed_dim=48, depth=2, num_heads=3, num_classes=3)
    model = shaken(timm.create_model("vit2dpe_tiny_patch4_32", position="relative", **sizes, **arguments))
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.windowing == model.windowing == ((3, 4), {0}, "tiles", True)
    assert torch.equal(again(randn(1, 3, 20, 36)), model(randn(1, 3, 20, 36)))
    assert "windows of 3x4" in card(model)["details"]["Windows"]
    with pytest.raises(ConfigError, match="samvit"):
        vit2dpe.to_timm(model)


def test_weights_of_a_plain_vit_go_into_windows(tmp_path):
    sizes = dict(embed_dim=48, depth=2, num_heads=3, patch_size=8, img_size=(40, 72))
    theirs = shaken(timm.models.vision_transformer.VisionTransformer(**sizes))
    plain, windowed = vit2dpe.from_timm(theirs), vit2dpe.from_timm(theirs, window=(3, 4), global_blocks=(0,))
    images = randn(1, 3, 40, 72)
    assert torch.equal(
        windowed.state_dict()["blocks.1.attn.qkv.weight"], plain.state_dict()["blocks.1.attn.qkv.weight"]
    )
    assert windowed.windowing == ((3, 4), {1}, "tiles", False)
    close(windowed.forward_features(images), under_masks(windowed, images))
    save_for_hf(windowed, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), windowed(images))
    with pytest.raises(ConfigError, match="samvit"):
        vit2dpe.to_timm(windowed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window=None, global_blocks=(1,)), "go with a window"),
        (dict(window=None, global_blocks=(), window_kind="zeros"), "go with a window"),
        (dict(global_blocks=(3,)), "0 to 2"),
        (dict(window_kind="tile"), "did you mean 'tiles'"),
        (dict(window_kind="around"), "odd side, got 3x4"),
        (dict(window=(3, 4, 5)), "one side or 2"),
        (dict(window=-1), "at least 0"),
        (dict(window_kind="zeros"), "AxialRoPE needs one"),
        (dict(window_tables=True, block_position="sincos"), "SinCos is not relative"),
        (dict(global_blocks=1), r"0 to 2 .*got 1"),
        (dict(position="relative", window_tables=True, patch_stride=4), "RelativeBias.*leave patch_stride out"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        vit(**dict(position="rope") | arguments)


def test_tables_of_the_window_refuse_masks():
    with pytest.raises(ConfigError, match="leave one of them out"):
        vit("relative", window_tables=True)(randn(1, 3, 40, 72), is_causal=True)


def test_tokens_of_zeros_stand_in_no_mask():
    model, images, kept = (
        vit("relative", window_kind="zeros", class_token=False, global_pool="avg"),
        randn(1, 3, 40, 72),
        torch.arange(45)[None],
    )
    batch = pad(list(images), 8)
    for refused in (
        lambda: model(images, is_causal=True),
        lambda: model(images, attn_mask=torch.ones(45, 45, dtype=torch.bool)),
        lambda: model.forward_features(images, token_filter=lambda x, at: (x, at.take(kept))),
        lambda: model(batch),
    ):
        with pytest.raises(ConfigError, match="'zeros' fills windows up"):
            refused()
    full = randn(1, 3, 48, 64)  # nothing is filled up: 6 x 8 tokens
    everything = torch.ones(48, 48, dtype=torch.bool)
    close(model(full, attn_mask=everything), model(full))


@pytest.mark.parametrize("word", ["relative(prefix=true)+t5", "relative(shared=true,prefix=true)/alibi"])
@torch.no_grad()
def test_leading_queries_keep_their_biases_between_places(word):
    model = vit(word, patch_stride=4, reg_tokens=1).double()
    images = randn(1, 3, 40, 72).double()
    on_grid = Positions.grid((9, 17)).with_prefix(2)
    exact(model.forward_features(images), under_masks(model, images, masks.same_tile(on_grid, on_grid, (3, 4))))


@torch.no_grad()
def test_tables_of_some_axes_of_the_window_take_policies():
    model, images = vit("relative(axes=1)", window_tables=True), randn(1, 3, 64, 104)
    with vit2dpe.use_policy(model, "interpolate"):
        inside = model.blocks[0].attn.position
        assert inside.policy.train == (4,)
        assert model.blocks[1].attn.position.policy.train == (9,)
        assert model(images).isfinite().all()


def test_a_grid_smaller_than_windows_that_are_filled_up():
    with pytest.raises(ConfigError, match=r"windows of 3x4.*grid of 2x9.*RelativeBias"):
        vit("relative", window_kind="zeros")(randn(1, 3, 16, 72))
    assert vit("alibi", window_kind="zeros")(randn(1, 3, 16, 72)).isfinite().all()
