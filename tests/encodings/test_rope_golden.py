"""rope_golden has the directions, magnitudes and scale of the N-dimensional rotary post, and spreads its directions.

Frequencies to 1e-12 (float64). There is no package to compare with; the formulas are written out in loops.
"""

import math

import pytest
import torch

from tests.encodings.originals import exchanged
from vit2dpe import Positions
from vit2dpe.encodings import GoldenRoPE
from vit2dpe.encodings.rope_golden import golden_directions

PHI = (1 + 5**0.5) / 2
CPU = torch.device("cpu")


def vectors(width, heads, grid, low=1.0, high=100.0):
    """w (d, H, Dh/2): magnitudes log-spaced and the same for all heads, angles in steps of π/φ over all pairs."""
    pairs, side = width // 2, math.prod(grid) ** 0.5
    w = torch.empty(2, heads, pairs, dtype=torch.float64)
    for head in range(heads):
        for f in range(pairs):
            turn = (head * pairs + f) * math.pi / PHI
            omega = math.exp(math.log(low) + f / (pairs - 1) * (math.log(high) - math.log(low)))
            w[0, head, f] = omega * math.sin(turn) * 2 / (side - 1)  # rows are y
            w[1, head, f] = omega * math.cos(turn) * 2 / (side - 1)
    return w


@pytest.mark.parametrize("grid", [(14, 14), (4, 9), (16, 3)])
@pytest.mark.parametrize(("width", "heads", "low", "high"), [(16, 3, 1.0, 100.0), (64, 6, 0.2, 20.0)])
def test_frequencies_are_the_formula(grid, width, heads, low, high):
    ours = GoldenRoPE(width, heads, grid, low=low, high=high).frequencies(CPU)
    theirs = vectors(width, heads, grid, low, high)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * high)
    assert (ours - theirs.flip(0)).abs().max() > 0.1  # rows and columns exchanged
    size = ours.norm(dim=0)
    assert torch.allclose(size, size[:1].expand_as(size), rtol=1e-12, atol=0)
    steps = size.log().diff(dim=-1)
    assert torch.allclose(steps, steps[:, :1].expand_as(steps), rtol=1e-9, atol=0)


def linspaced(encoding, extent, spans):
    """Angles on a grid of coordinates linspace(-span, span) along each axis, frequencies in units of those."""
    side = math.prod(encoding.grid) ** 0.5
    w = encoding.frequencies(CPU) * (side - 1) / 2
    axes = [torch.linspace(-span, span, size, dtype=torch.float64) for span, size in zip(spans, extent, strict=True)]
    t = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # (N, 2)
    return (t[:, None, None, :] * w.movedim(0, -1)).sum(-1).movedim(0, 1)  # (H, N, Dh/2)


@pytest.mark.parametrize("side", [5, 14])
def test_a_square_grid_spans_minus_one_to_one(side):
    """Up to a shift that is the same for all tokens, of which a rotary encoding's logits know nothing."""
    ours, at = GoldenRoPE(16, 3, (side, side)), Positions.grid((side, side))
    theirs = linspaced(ours, (side, side), (1.0, 1.0))
    for angle, fits in ((ours.angle(at).dense()[0], True), (ours.angle(exchanged(at)).dense()[0], False)):
        shift = (angle - theirs)[:, :1].expand_as(angle)
        assert torch.allclose(angle - theirs, shift, rtol=0, atol=1e-10) == fits


@pytest.mark.parametrize("extent", [(4, 9), (12, 3), (20, 10)])
def test_another_grid_keeps_one_step_for_both_axes(extent):
    """Different on purpose: linspace to ±√(W/H) and ±√(H/W) has steps that differ by axis; ours is their middle."""
    ours, at = GoldenRoPE(16, 3, extent), Positions.grid(extent)
    spans = [(extent[0] / extent[1]) ** 0.5, (extent[1] / extent[0]) ** 0.5]
    steps = [2 * span / (size - 1) for span, size in zip(spans, extent, strict=True)]
    side = math.prod(extent) ** 0.5
    assert min(steps) < 2 / (side - 1) < max(steps)
    assert max(steps) / min(steps) - 1 < 1 / (min(extent) - 1)
    angle, theirs = ours.angle(at).dense()[0], linspaced(ours, extent, spans)
    change = (angle - theirs) - (angle - theirs)[:, :1]
    assert change.abs().max() > 0.1
    y, x = (at.coords[0].double()[None, :, axis, None] for axis in (0, 1))
    w = ours.frequencies(CPU)[:, :, None, :]
    for axis, place in enumerate((y, x)):
        theirs_step = w[axis] * steps[axis] * (side - 1) / 2
        change = change - place * (w[axis] - theirs_step)
    torch.testing.assert_close(change, torch.zeros_like(change), rtol=0, atol=1e-9)


def gap(directions):
    """The largest angle between neighbours times their number over half a turn: 1 is perfect."""
    turns = (torch.atan2(directions[0], directions[1]) % math.pi).sort().values
    around = torch.cat([turns, turns[:1] + math.pi])
    return float(around.diff().max()) * len(turns) / math.pi


def test_any_eight_neighbours_are_spread_evenly():
    u = golden_directions(400, 2, CPU)
    worst = max(gap(u[:, i : i + 8]) for i in range(393))
    assert worst <= 1.2
    twice = torch.arange(8) * (2 * math.pi / PHI)  # the published runs' step
    assert gap(torch.stack([twice.sin(), twice.cos()])) > 1.8
    random = torch.rand(200, 8, generator=torch.Generator().manual_seed(0)) * math.pi
    assert sum(gap(torch.stack([turns.sin(), turns.cos()])) for turns in random) / 200 > 2


@pytest.mark.need("A12")
def test_three_axes_follow_the_golden_sequence():
    ours, golden = golden_directions(50, 3, CPU), 1.2207440846057596  # g⁴ = 1 + g
    assert golden**4 == pytest.approx(1 + golden, rel=1e-12)
    normal = torch.distributions.Normal(0.0, 1.0)
    for n in range(50):
        share = torch.tensor([(0.5 + (n + 1) / golden ** (axis + 1)) % 1 for axis in range(3)], dtype=torch.float64)
        quantile = normal.icdf(share)
        torch.testing.assert_close(ours[:, n], quantile / quantile.norm(), rtol=0, atol=1e-9)
    assert (ours - ours.flip(0)).abs().max() > 1


@pytest.mark.parametrize(("count", "bound"), [(32, 27.0), (96, 17.0), (384, 9.0)])
def test_three_axes_leave_no_hole(count, bound):
    """From any direction one of the first `count` (or its opposite) is within `bound` degrees; random ones are not."""
    generator = torch.Generator().manual_seed(0)

    def unit(n):
        u = torch.randn(3, n, generator=generator, dtype=torch.float64)
        return u / u.norm(dim=0)

    probes = unit(20_000)

    def hole(u):
        return math.degrees(math.acos((probes.t() @ u).abs().amax(1).min()))

    u = golden_directions(count, 3, CPU)
    torch.testing.assert_close(u.norm(dim=0), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-14)
    assert hole(u) <= bound
    assert sum(hole(unit(count)) > bound for _ in range(5)) >= 4
