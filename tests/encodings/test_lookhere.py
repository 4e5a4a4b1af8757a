"""LookHere sees the keys and charges the slopes that were counted in the original on a 15x15 grid with 12 heads.

Counts and what is seen are exact; penalties to 1e-6 relative (float32). Different on purpose: directed heads are
ordered clockwise from "up", and "not seen" is -1e9 times the slope, not minus infinity.
"""

import math

import pytest
import torch

from tests.encodings.originals import exchanged
from vit2dpe import Positions, ViT, attend
from vit2dpe.encodings import LookHere

HEADS, DIRECTED = 12, 8


def dense(at, **options):
    return LookHere(HEADS, **options)(at).bias[0].dense()[0]


def at_centre(**options):
    at = Positions.grid((15, 15))
    return dense(at, **options)[:, 7 * 15 + 7].view(HEADS, 15, 15)


@pytest.mark.parametrize(("view", "count"), [(180, 120), (90, 64), (45, 36)])
def test_visible_keys_from_the_centre(view, count):
    seen = (at_centre(view=float(view)) > -1e6).flatten(1).sum(1)
    assert seen.tolist() == [count] * DIRECTED + [225] * (HEADS - DIRECTED)


@pytest.mark.parametrize("view", [180.0, 90.0, 45.0])
@pytest.mark.parametrize(("block", "depth", "s_l"), [(0, 12, 1.5), (11, 12, 0.5), (4, 9, 1.0), (None, 12, 1.0)])
def test_slopes(view, block, depth, s_l):
    """At distance 1 in the first block: 1.5 for directed heads, .75, .1875, .047, .0117 for the others."""
    bias = at_centre(view=view, block=block, depth=depth)
    near = torch.stack([bias[:, 6, 7], bias[:, 7, 8], bias[:, 8, 7], bias[:, 7, 6]], -1)
    steps = [(y, x) for y in (-5, -4, 4, 5) for x in (-5, -4, 4, 5) if abs(y) != abs(x)]
    far = torch.stack([bias[:, 7 + y, 7 + x] for y, x in steps], -1)
    slopes = torch.tensor([1.0] * DIRECTED + [1 / 2, 1 / 8, 1 / 32, 1 / 128]) * s_l
    for entries, distance in ((near, 1.0), (far, math.hypot(5, 4))):
        theirs = (-slopes * distance)[:, None].expand_as(entries)
        seen = entries > -1e6
        assert seen.any(1).all()
        torch.testing.assert_close(entries[seen], theirs[seen], rtol=1e-6, atol=0)
    assert torch.equal(bias[:, 7, 7], torch.zeros(HEADS))  # the query itself
    doubled = at_centre(view=view, block=block, depth=depth, slope=2.0)
    torch.testing.assert_close(doubled, 2 * bias, rtol=1e-6, atol=0)


@pytest.mark.parametrize("view", [180.0, 90.0])
def test_the_edges_of_a_view_are_seen(view):
    seen = at_centre(view=view)[:DIRECTED] > -1e6
    up, right = seen[0], seen[2]
    if view == 180:
        assert up[7].all()
        assert right[:, 7].all()
        assert not up[8:].any()
        assert not right[:, :7].any()
    else:
        for step in range(8):
            assert up[7 - step, 7 - step]
            assert up[7 - step, 7 + step]
            assert right[7 - step, 7 + step]
            assert right[7 + step, 7 + step]
        assert not up[6, 5]
        assert not right[5, 8]
    assert torch.equal(up.t(), seen[6])  # left is up with rows and columns exchanged
    assert not torch.equal(up.t(), up)


def brute_force(extent, view, slope):
    """Every head, query and key by itself: angles by atan2, in whole sixteenths of a turn where they can be."""
    places = [(y, x) for y in range(extent[0]) for x in range(extent[1])]
    rows = []
    for head in range(HEADS):
        for qy, qx in places:
            for ky, kx in places:
                far = math.hypot(ky - qy, kx - qx)
                if head >= DIRECTED:
                    rows.append(-slope * far / (2, 8, 32, 128)[head - DIRECTED])
                    continue
                look = 45 * head + (22.5 if view < 90 else 0)  # clockwise from up
                turn = math.degrees(math.atan2(kx - qx, qy - ky))
                apart = abs((turn - look + 180) % 360 - 180) if far else 0
                rows.append(-slope * far if apart <= view / 2 + 1e-6 else -math.inf)
    return torch.tensor(rows).view(HEADS, len(places), len(places))


@pytest.mark.parametrize("view", [180.0, 90.0, 45.0])
def test_brute_force_on_a_grid_that_is_not_square(view):
    at = Positions.grid((4, 7))
    ours, theirs = dense(at, view=view, block=2, depth=5), brute_force((4, 7), view, 1.0)
    seen = theirs > -math.inf
    assert torch.equal(ours > -1e6, seen)
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-6, atol=0)
    assert (ours[~seen] <= -1e8).all()
    assert not torch.equal(dense(exchanged(at), view=view, block=2, depth=5) > -1e6, seen)


@pytest.mark.parametrize("view", [180.0, 90.0, 45.0])
def test_on_a_line_heads_look_back_and_ahead_in_turn(view):
    n = 6
    bias = dense(Positions.sequence(n), axes=1, view=view)
    place = torch.arange(n)
    behind = place[None, :] <= place[:, None]
    far = (place[None, :] - place[:, None]).abs().float()
    for head in range(HEADS):
        seen = torch.ones_like(behind) if head >= DIRECTED else behind if head % 2 == 0 else behind.t()
        slope = 1.0 if head < DIRECTED else 1 / (2, 8, 32, 128)[head - DIRECTED]
        assert torch.equal(bias[head] > -1e6, seen)
        torch.testing.assert_close(bias[head][seen], -slope * far[seen], rtol=1e-6, atol=0)


def test_prefix_tokens_are_seen_by_all_and_see_all():
    bias = dense(Positions.grid((3, 5)).with_prefix(2))
    assert not bias[:, :2].any()
    assert not bias[:, :, :2].any()
    assert torch.equal(bias[:, 2:, 2:], dense(Positions.grid((3, 5))))


@pytest.mark.need("A13")
def test_a_query_that_sees_no_key_that_is_left_gets_their_mean():
    at, mask = Positions.grid((3, 4)), torch.zeros(12, 12, dtype=torch.bool)
    mask[:, 8:] = True  # the last row alone; the first head looks up
    q, k, v = (torch.randn(1, HEADS, 12, 6) for _ in range(3))
    out = attend(q, k, v, LookHere(HEADS)(at), mask)
    torch.testing.assert_close(out[:, 0, :8], v[:, 0, 8:].mean(1, keepdim=True).expand(-1, 8, -1))
    assert bool(out.isfinite().all())


@pytest.mark.need("A13a")
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-6), (torch.float16, 2e-3)])
def test_in_other_precisions_it_weighs_them_by_their_contents(dtype, atol):
    at, mask = Positions.grid((3, 4)), torch.zeros(12, 12, dtype=torch.bool)
    mask[:, 8:] = True
    q, k, v = (torch.randn(1, HEADS, 12, 6, dtype=torch.float64).to(dtype) for _ in range(3))
    encoding = LookHere(HEADS).double() if dtype == torch.float64 else LookHere(HEADS)
    weights = (q.double() @ k.double().mT * 6**-0.5)[:, 0, :8, 8:].softmax(-1)
    out = attend(q, k, v, encoding(at), mask).double()
    torch.testing.assert_close(out[:, 0, :8], weights @ v[:, 0, 8:].double(), atol=atol, rtol=0)


@pytest.mark.need("E3")
def test_an_instance_in_a_model_has_the_slope_of_each_block():
    slopes = []
    for position in ("lookhere", LookHere(3), LookHere(3, block=0, depth=3)):
        model = ViT(position, img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
        slopes.append([module.slope_here for module in model.modules() if isinstance(module, LookHere)])
    assert slopes[0] == slopes[1][-3:] == [1.5, 1.0, 0.5]
    assert slopes[2][-3:] == [1.5, 1.5, 1.5]
