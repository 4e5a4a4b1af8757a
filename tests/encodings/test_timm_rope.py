"""Rotated queries are those of timm's RotaryEmbeddingCat, RotaryEmbeddingMixed and RotaryEmbeddingDinoV3.

Tolerance 3e-6 on entries of about 1: timm's angles are float32, up to 14 radians here, ours float64.
"""

import math

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, apply_rot_embed_cat

from tests.encodings.originals import exchanged, halves, same, turned
from tests.helpers import randn
from vit2dpe import Positions, rotate
from vit2dpe.encodings import AxialRoPE, CentredRoPE, MixedRoPE
from vit2dpe.resolution.policies import Interpolate

GRIDS = [(5, 9), (15, 4), (1, 6)]
HEADS, WIDTH, ATOL = 3, 16, 3e-6


def queries(extent):
    return randn(2, HEADS, math.prod(extent), WIDTH)


@pytest.mark.parametrize("extent", GRIDS)
@pytest.mark.parametrize("base", [100.0, 10_000.0])
def test_axial_is_timms_index_grid(extent, base):
    """timm's default order 'ij' is rows first, as ours: no channel moves."""
    timm = RotaryEmbeddingCat(WIDTH, in_pixels=False, feat_shape=list(extent), temperature=base)
    at, x, ours = Positions.grid(extent), queries(extent), AxialRoPE(WIDTH, base=base)
    theirs = apply_rot_embed_cat(x, timm.get_embed())
    same(rotate(x, ours(at).q_rotation), theirs, rotate(x, ours(exchanged(at)).q_rotation), ATOL)


@pytest.mark.parametrize("extent", GRIDS)
def test_axial_is_rope_vits_with_the_halves_exchanged(extent):
    """Different on purpose: rope-vit (timm 'xy') has columns in the first half of a head's channels, ours rows."""
    timm = RotaryEmbeddingCat(WIDTH, in_pixels=False, feat_shape=list(extent), temperature=100.0, grid_indexing="xy")
    at, x, ours = Positions.grid(extent), queries(extent), AxialRoPE(WIDTH)
    theirs = apply_rot_embed_cat(x.roll(WIDTH // 2, -1), timm.get_embed()).roll(WIDTH // 2, -1)
    same(rotate(x, ours(at).q_rotation), theirs, rotate(x, ours(exchanged(at)).q_rotation), ATOL)
    assert (apply_rot_embed_cat(x, timm.get_embed()) - theirs).abs().max() > 0.1


@pytest.mark.parametrize("extent", GRIDS)
def test_axial_half_split_is_timms_rotate_half(extent):
    """Different on purpose: our pairs are (2i, 2i+1) throughout; the half-split form is a permutation of channels."""
    timm = RotaryEmbeddingCat(WIDTH, in_pixels=False, feat_shape=list(extent), temperature=100.0, rotate_half=True)
    at, x, ours = Positions.grid(extent), queries(extent), AxialRoPE(WIDTH)
    theirs = apply_rot_embed_cat(halves(x), timm.get_embed(), half=True)
    same(turned(x, ours(at).q_rotation), theirs, turned(x, ours(exchanged(at)).q_rotation), ATOL)


@pytest.mark.parametrize(("train", "extent"), [((4, 6), (8, 9)), ((8, 3), (5, 7)), ((6, 10), (10, 6))])
def test_eva02s_reference_grid_is_interpolation_by_the_corner(train, extent):
    timm = RotaryEmbeddingCat(WIDTH, in_pixels=False, feat_shape=list(extent), ref_feat_shape=list(train))
    at, x, ours = Positions.grid(extent), queries(extent), AxialRoPE(WIDTH, base=10_000.0)
    theirs = apply_rot_embed_cat(x, timm.get_embed())
    plain = rotate(x, ours(at).q_rotation)
    ours.own_policy = Interpolate(train, align="corner")
    got = rotate(x, ours(at).q_rotation)
    ours.own_policy = Interpolate(train[::-1], align="corner")
    same(got, theirs, rotate(x, ours(exchanged(at)).q_rotation), ATOL)
    assert (plain - theirs).abs().max() > 0.1
    ours.own_policy = Interpolate(train)  # the default keeps the outer edges in place instead of the first patch
    assert (rotate(x, ours(at).q_rotation) - theirs).abs().max() > 0.01


@pytest.mark.parametrize("extent", GRIDS)
@pytest.mark.parametrize("indexing", ["xy", "ij"])
def test_mixed_is_timms_for_the_same_frequencies(extent, indexing):
    """Layout: theirs (2, depth, H, Dh/2) for all blocks, columns first with 'xy'; ours (2, H, Dh/2) a block, rows."""
    timm = RotaryEmbeddingMixed(HEADS * WIDTH, 2, HEADS, feat_shape=list(extent), grid_indexing=indexing)
    at, x, ours = Positions.grid(extent), queries(extent), MixedRoPE(WIDTH, HEADS)
    for block in range(2):
        freqs = timm.freqs.detach()[:, block]
        ours.freqs.data.copy_(freqs.flip(0) if indexing == "xy" else freqs)
        theirs = apply_rot_embed_cat(x, timm.get_embed()[block])
        same(rotate(x, ours(at).q_rotation), theirs, rotate(x, ours(exchanged(at)).q_rotation), ATOL)


def test_mixed_starts_where_timms_starts():
    """Random in both, so what is compared is the law: magnitudes 10^(-4k/Dh) twice, at one angle and that + 90°."""
    torch.manual_seed(0)
    theirs = RotaryEmbeddingMixed(HEADS * WIDTH, 1, HEADS).freqs.detach()[:, 0]  # columns first
    ours = MixedRoPE(WIDTH, HEADS).freqs.detach().flip(0)
    bank = 10.0 ** (-4 * torch.arange(WIDTH // 4) / WIDTH)
    for x, y in (theirs, ours):
        first, second = torch.complex(x, y).unflatten(-1, (2, -1)).unbind(-2)
        torch.testing.assert_close(first.abs(), bank.expand(HEADS, -1), rtol=1e-6, atol=0)
        torch.testing.assert_close(second, first * 1j, rtol=0, atol=1e-6)
        torch.testing.assert_close(first / bank, (first / bank)[:, :1].expand_as(first), rtol=0, atol=1e-6)
        assert len({round(float(angle), 3) for angle in first[:, 0].angle()}) == HEADS
    y, x = ours  # exchanged, the second half turns the other way
    first, second = torch.complex(x, y).unflatten(-1, (2, -1)).unbind(-2)
    assert (second - first * 1j).abs().max() > 1


@pytest.mark.parametrize("extent", GRIDS)
def test_centred_in_evaluation_is_timms_dinov3(extent):
    """Different on purpose: half-split pairs there, (2i, 2i+1) here, so channels are permuted."""
    timm = RotaryEmbeddingDinoV3(WIDTH, feat_shape=list(extent), rescale_coords=2.0).eval()
    at, x, ours = Positions.grid(extent), queries(extent), CentredRoPE(WIDTH).eval()
    theirs = apply_rot_embed_cat(halves(x), timm.get_embed(), half=True)
    same(turned(x, ours(at).q_rotation), theirs, turned(x, ours(exchanged(at)).q_rotation), ATOL)


@pytest.mark.parametrize("seed", range(3))
def test_centred_in_training_moves_as_timms_does(seed):
    """Draws differ on purpose (ours are shared by queries and keys); the map c -> factor (c + shift) and its range not.

    A map per axis, so it is read off one frequency of each axis at two places.
    """
    shift, jitter, rescale, extent = 0.5, 1.3, 2.0, (7, 4)
    timm = RotaryEmbeddingDinoV3(
        WIDTH, feat_shape=list(extent), shift_coords=shift, jitter_coords=jitter, rescale_coords=rescale
    ).train()
    ours = CentredRoPE(WIDTH, rescale=rescale, jitter=jitter, shift=shift).train()
    torch.manual_seed(seed)
    at, slow = Positions.grid(extent), 3  # of four frequencies an axis, one whose angle stays below half a turn
    sin, cos = timm.get_embed().detach().double().chunk(2, -1)
    theirs = torch.atan2(sin, cos)[:, [slow, WIDTH // 4 + slow]]
    rotation = ours(at).q_rotation
    mine = torch.atan2(rotation.sin, rotation.cos)[0, 0].double()[:, [slow, WIDTH // 4 + slow]]
    omega = 2 * math.pi * 100 ** (-slow / (WIDTH // 4))
    scales = []
    for angle in (theirs, mine):
        c = (angle / omega).view(*extent, 2)
        scale = torch.stack([(c[-1, 0, 0] - c[0, 0, 0]) / (2 - 2 / 7), (c[0, -1, 1] - c[0, 0, 1]) / (2 - 2 / 4)])
        moved = (c[0, 0] + c[-1, -1]) / 2 / scale
        assert moved.abs().max() <= shift + 1e-5
        assert (scale.log().abs() <= math.log(jitter * rescale) + 1e-5).all()
        assert (scale[0] / scale[1]).log().abs() <= 2 * math.log(jitter) + 1e-5
        scales.append(scale)
        grid = (2 * (Positions.grid(extent).coords[0] + 0.5) / torch.tensor(extent) - 1).double()
        torch.testing.assert_close(c.flatten(0, 1), scale * (grid + moved), rtol=0, atol=1e-5)
    assert not torch.allclose(*scales)
