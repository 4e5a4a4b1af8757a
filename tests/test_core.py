"""`Positions`, `Signal` and `attend` alone, without encodings or models, equal a plain float64 loop.

Decoding step by step, MAE subsets, shifted windows, cross-attention, ragged samples, empty rows, float16's limit.
"""

from __future__ import annotations

import cmath
import itertools
import math

import pytest
import torch

from tests.helpers import randn, within
from vit2dpe import Positions, Rotation, Signal, attend
from vit2dpe.signal import Dense, Table

HEADS, WIDTH = 2, 8


def frequencies(axes):
    """(d, Dh/2) radians per patch, no two alike."""
    return torch.linspace(0.1, 1.3, axes * WIDTH // 2, dtype=torch.float64).view(axes, -1)


def rotation(at):
    angle = (at.coords.double() @ frequencies(at.axes))[:, None]  # (B|1, 1, N, Dh/2)
    return Rotation(angle.cos().float(), angle.sin().float())


def turned(x, place):
    """One head's channels as complex numbers, turned by the place: a list of Dh/2."""
    angles = (torch.tensor(place, dtype=torch.float64) @ frequencies(len(place))).tolist()
    return [complex(x[2 * i], x[2 * i + 1]) * cmath.exp(1j * angle) for i, angle in enumerate(angles)]


def loop(q, k, v, q_places, k_places, bias=None, allowed=None, scale=WIDTH**-0.5):
    """Attention written out: `bias(b, h, i, j)` and `allowed(b, i, j)` of indices; places are (B, N, d) lists."""
    batch, heads, queries, _ = q.shape
    out = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    values = v.double()
    for b, h in itertools.product(range(batch), range(heads)):
        qs = [turned(x, place) for x, place in zip(q[b, h].tolist(), q_places[b], strict=True)]
        ks = [turned(x, place) for x, place in zip(k[b, h].tolist(), k_places[b], strict=True)]
        for i, query in enumerate(qs):
            weights = {}
            for j, key in enumerate(ks):
                if allowed is None or allowed(b, i, j):
                    dot = sum((a * c.conjugate()).real for a, c in zip(query, key, strict=True))
                    weights[j] = math.exp(scale * dot + (0.0 if bias is None else bias(b, h, i, j)))
            for j, weight in weights.items():
                out[b, h, i] += weight / sum(weights.values()) * values[b, h, j]
    return out


close = within(1e-5, any_dtype=True)


# (a) decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3])
def test_decoding_step_by_step_is_the_causal_pass(step):
    length = 7
    q, k, v = (randn(2, HEADS, length, WIDTH, seed=i) for i in range(3))
    table = randn(HEADS, 2 * length - 1, seed=3)

    def signal(at_q, at_k):
        return Signal(q_rotation=rotation(at_q), k_rotation=rotation(at_k), bias=(Table(table, at_q, at_k),))

    def causal(at_q, at_k):
        return at_q.coords >= at_k.coords.transpose(1, 2)  # (1, Nq, Nk)

    at = Positions.sequence(length)
    full = attend(q, k, v, signal(at, at), causal(at, at)[:, None])
    steps = []
    for i in range(0, length, step):
        end = min(i + step, length)
        at_q = Positions.sequence(end - i, start=i, length=length)
        at_k = Positions.sequence(end, length=length)
        here = (q[:, :, i:end], k[:, :, :end], v[:, :, :end])
        steps.append(attend(*here, signal(at_q, at_k), None if step == 1 else causal(at_q, at_k)[:, None]))

    places = [[[float(i)] for i in range(length)]] * 2
    reference = loop(
        q,
        k,
        v,
        places,
        places,
        bias=lambda b, h, i, j: float(table[h, i - j + length - 1]),
        allowed=lambda b, i, j: j <= i,
    )
    close(full, reference)
    close(torch.cat(steps, dim=2), reference)


# (b) masked autoencoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extent", [(3, 5), (5, 3), (2, 3, 2)])
def test_a_subset_has_the_gathered_signal_and_the_attention_of_the_loop(extent):
    at, batch, keep = Positions.grid(extent), 3, 6
    n = math.prod(extent)
    index = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i))[:keep] for i in range(batch)])
    table = randn(HEADS, *(2 * size - 1 for size in extent))
    some = at.take(index)
    assert some.extent == extent
    torch.testing.assert_close(some.coords, at.coords[0][index], rtol=0, atol=0)

    full, part = rotation(at), rotation(some)
    for whole, taken in zip(full, part, strict=True):
        torch.testing.assert_close(taken, whole[0, 0][index][:, None], rtol=0, atol=1e-7)
    bias = Table(table, some, some)
    every = Table(table, at, at).dense()[0]  # (H, N, N)
    for b in range(batch):
        assert torch.equal(bias.dense()[b], every[:, index[b]][:, :, index[b]])

    q, k, v = (randn(batch, HEADS, keep, WIDTH, seed=i + 1) for i in range(3))
    ours = attend(q, k, v, Signal(q_rotation=part, k_rotation=part, bias=(bias,)))
    places = at.coords[0][index].tolist()

    def by_offset(b, h, i, j):
        cell = [int(p - r) + size - 1 for p, r, size in zip(places[b][i], places[b][j], extent, strict=True)]
        return float(table[h, *cell])

    close(ours, loop(q, k, v, places, places, bias=by_offset))


# (c) shifted windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extent", "window", "shift"),
    [((4, 6), (2, 3), (1, 1)), ((6, 4), (3, 2), (1, 1)), ((4, 9), (2, 3), (1, 2)), ((6, 4), (3, 2), (0, 0))],
)
def test_a_shifted_window_is_a_take_and_its_mask_a_test_of_coordinates(extent, window, shift):
    (rows, cols), (h, w), n = extent, window, math.prod(extent)
    rolled = torch.arange(n).view(extent).roll((-shift[0], -shift[1]), (0, 1))
    index = rolled.view(rows // h, h, cols // w, w).transpose(1, 2).reshape(-1, h * w)  # (windows, T)
    at, local = Positions.grid(extent).take(index), Positions.grid(window)
    assert at.coords.shape == (n // (h * w), h * w, 2)

    apart = (at.coords[:, :, None] - at.coords[:, None]).abs()
    mask = (apart < torch.tensor(window)).all(-1)[:, None]  # (windows, 1, T, T)
    table = randn(HEADS, 2 * h - 1, 2 * w - 1)
    turn = rotation(at)
    q, k, v = (randn(1, HEADS, n, WIDTH, seed=i + 1) for i in range(3))
    parts = [x[0][:, index].transpose(0, 1) for x in (q, k, v)]  # (windows, H, T, Dh)
    signal = Signal(q_rotation=turn, k_rotation=turn, bias=(Table(table, local, local),))
    ours = torch.empty(HEADS, n, WIDTH)
    ours[:, index] = attend(*parts, signal, mask).transpose(0, 1)

    def cell(i):
        """Swin's own words: the window of the rolled image, and the region that the roll left together."""
        words = []
        for place, size, side, move in zip(divmod(i, cols), extent, window, shift, strict=True):
            at_roll = (place - move) % size
            region = 0 if at_roll < size - side else 1 if at_roll < size - move else 2
            words += [at_roll // side, region if move else 0]
        return words

    def by_offset(b, head, i, j):
        (r1, c1), (r2, c2) = divmod(i, cols), divmod(j, cols)
        return float(table[head, r1 - r2 + h - 1, c1 - c2 + w - 1])

    cells = [cell(i) for i in range(n)]
    places = [[[float(x) for x in divmod(i, cols)] for i in range(n)]]
    reference = loop(q, k, v, places, places, bias=by_offset, allowed=lambda b, i, j: cells[i] == cells[j])
    close(ours[None], reference)
    assert bool(mask.all()) == (shift == (0, 0))


# (d) cross-attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(4, 7), (7, 4)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_cross_attention_with_bias_and_mask_is_the_loop(queries, keys, scale):
    q, k, v = randn(2, HEADS, queries, WIDTH), randn(2, HEADS, keys, WIDTH, seed=1), randn(2, HEADS, keys, 5, seed=2)
    bias, more = randn(1, HEADS, queries, keys, seed=3), randn(2, HEADS, queries, keys, seed=4)
    mask = randn(2, 1, queries, keys, seed=5) > -0.3
    mask[..., 0] = True
    at_q, at_k = Positions.sequence(queries, start=2), Positions.sequence(keys)
    signal = Signal(q_rotation=rotation(at_q), k_rotation=rotation(at_k), bias=(Dense(bias), Dense(more)))
    ours = attend(q, k, v, signal, mask, scale=scale)
    reference = loop(
        q,
        k,
        v,
        at_q.coords.tolist() * 2,
        at_k.coords.tolist() * 2,
        bias=lambda b, h, i, j: float(bias[0, h, i, j] + more[b, h, i, j]),
        allowed=lambda b, i, j: bool(mask[b, 0, i, j]),
        scale=WIDTH**-0.5 if scale is None else scale,
    )
    assert ours.shape == (2, HEADS, queries, 5)
    assert not mask.all()
    close(ours, reference)


# (e) places of each sample's own -----------------------------------------------------------------------------------


def test_a_padded_sample_gives_what_it_gives_alone():
    lengths, longest = (5, 8, 3), 8
    coords = randn(3, longest, 2).mul(4)
    for b, n in enumerate(lengths):
        coords[b, n:] = 1e3  # padding stands anywhere
    q, k, v = (randn(3, HEADS, longest, WIDTH, seed=i + 1) for i in range(3))
    seen = torch.arange(longest) < torch.tensor(lengths)[:, None]  # (B, N)

    def run(at, q, k, v, mask=None):
        far = (at.coords[:, :, None] - at.coords[:, None]).square().sum(-1)[:, None]
        turn = rotation(at)
        bias = Dense(-0.1 * far.expand(-1, HEADS, -1, -1))
        return attend(q, k, v, Signal(q_rotation=turn, k_rotation=turn, bias=(bias,)), mask)

    padded = run(Positions(coords, (9, 7)), q, k, v, seen[:, None, None])
    for b, n in enumerate(lengths):
        one = [x[b : b + 1, :, :n] for x in (q, k, v)]
        at = Positions(coords[b : b + 1, :n], (9, 7))
        alone = run(at, *one)
        close(padded[b : b + 1, :, :n], alone, 1e-6)

        def by_distance(b, h, i, j, places=at.coords[0]):
            return -0.1 * float((places[i] - places[j]).double().square().sum())

        close(alone, loop(*one, at.coords.tolist(), at.coords.tolist(), bias=by_distance))


# empty rows, extreme biases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (4, 6), (2, HEADS, 4, 6)])
def test_a_row_that_sees_nothing_is_zero_with_finite_gradients(dtype, biased, shape):
    mask = randn(*shape) > -0.5
    mask[..., 1, :] = False
    mask[..., 0, :] = True
    q, k, v = (randn(2, HEADS, n, WIDTH, seed=i + 1).to(dtype).requires_grad_() for i, n in enumerate((4, 6, 6)))
    bias = randn(1, HEADS, 4, 6, seed=4).requires_grad_()
    out = attend(q, k, v, Signal(bias=(Dense(bias),)) if biased else Signal(), mask)
    assert out.dtype == dtype
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert bool((out[:, :, 0] != 0).all())

    out.square().sum().backward()
    leaves = [q, k, v, bias] if biased else [q, k, v]
    for leaf in leaves:
        assert bool(leaf.grad.isfinite().all())
        assert bool(leaf.grad.any())
    assert not q.grad[:, :, 1].any()
    assert not biased or not bias.grad[:, :, 1].any()


def test_the_samples_of_one_batch_may_differ_in_what_they_see():
    q, k, v = (randn(3, HEADS, 5, WIDTH, seed=i) for i in range(3))
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]], dtype=torch.bool)[:, None, None]
    out = attend(q, k, v, mask=mask)
    close(out[:1], attend(q[:1], k[:1, :, :2], v[:1, :, :2]), 1e-6)
    assert not out[1].any()


LIMIT = 65504.0
ROWS = {
    "one key at the top": [LIMIT, -LIMIT, 0.0, 1.0, -LIMIT],
    "all at the top": [LIMIT, LIMIT, LIMIT - 32, LIMIT, LIMIT],
    "all at the bottom": [-LIMIT, -LIMIT, -LIMIT, -LIMIT, -LIMIT],
    "beyond the top": [1e6, 1e6 + 1, 1e6 - 1, 1e6, 3e5],
    "beyond the bottom": [-1e6, -1e6 + 1, -1e6 - 1, -1e6, -2e6],
    "both sides": [1e6, -1e6, 0.0, LIMIT, -LIMIT],
    "one key below all": [0.0, 1.0, -1e6, 2.0, -1.0],
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_bias_at_the_limit_of_float16_is_what_it_is_in_float64(row, masked):
    q, k, v = (randn(1, 1, 5, WIDTH, seed=i).half() for i in range(3))
    bias = torch.tensor(row).expand(1, 1, 5, 5) + torch.eye(5)
    mask = torch.ones(5, 5, dtype=torch.bool)
    if masked:
        mask[0, 0] = mask[1, 1:] = mask[2] = False
    signal = Signal(bias=(Dense(bias),))
    half = attend(q, k, v, signal, mask)
    exact = attend(q.double(), k.double(), v.double(), Signal(bias=(Dense(bias.double()),)), mask)
    assert half.dtype == torch.float16
    assert bool(half.isfinite().all())
    close(half, exact, 4e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
def test_attend_never_alters_its_inputs(dtype, grad):
    at = Positions.grid((2, 3))
    q, k, v = (randn(2, HEADS, 6, WIDTH, seed=i).to(dtype) for i in range(3))
    table, dense = randn(HEADS, 3, 5, seed=3), randn(1, HEADS, 6, 6, seed=4).mul(1e5)
    mask = randn(2, 1, 6, 6, seed=5) > 0
    mask[:, :, 2] = False
    turn = rotation(at)
    given = [q, k, v, table, dense, mask, *turn, at.coords]
    before = [x.clone() for x in given]
    signal = Signal(
        q_rotation=turn, k_rotation=turn, bias=(Dense(dense), Table(table, at, at), Dense(dense)), temperature=1.5
    )
    with torch.set_grad_enabled(grad):
        attend(q, k, v, signal, mask)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


# tables and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extent", [(5,), (2, 3), (4, 2), (3, 2, 4)])
@pytest.mark.parametrize(("q_prefix", "k_prefix"), [(0, 0), (1, 1), (3, 1), (0, 2)])
def test_a_table_is_a_double_loop_with_a_frame_of_zeros(extent, q_prefix, k_prefix):
    table = randn(HEADS, *(2 * size - 1 for size in extent))
    places = list(itertools.product(*(range(size) for size in extent)))
    n, at = len(places), Positions.grid(extent)
    ours = Table(table, at.with_prefix(q_prefix), at.with_prefix(k_prefix)).dense()
    reference = torch.zeros(1, HEADS, q_prefix + n, k_prefix + n)
    for (i, p), (j, r), h in itertools.product(enumerate(places), enumerate(places), range(HEADS)):
        cell = [a - b + size - 1 for a, b, size in zip(p, r, extent, strict=True)]
        reference[0, h, q_prefix + i, k_prefix + j] = table[h, *cell]
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_outside_the_table_are_refused(axis):
    sizes = [3, 5]
    table, at = torch.zeros(HEADS, *sizes), Positions.grid((2, 3))
    far = Positions(at.coords + torch.eye(2)[axis], (2, 3))
    Table(table, at, at).dense()
    with pytest.raises(ValueError, match=f"along axis {axis} leave the table: it covers ±{sizes[axis] // 2}"):
        Table(table, far, at).dense()
    with pytest.raises(ValueError, match=f"along axis {axis} leave the table"):
        Table(table, at, far).dense()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_a_mask_that_is_not_boolean_is_refused(dtype):
    x = randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=f"a mask is boolean.*got {dtype}"):
        attend(x, x, x, mask=torch.zeros(3, 3, dtype=dtype))


def test_a_rotation_of_another_size_is_refused():
    x, at = randn(1, 1, 6, WIDTH), Positions.grid((2, 3))
    turn = rotation(at.take(torch.arange(1)))  # one token: it would broadcast without a word
    with pytest.raises(ValueError, match="for 1 tokens of 8 channels, got 6 tokens of 8"):
        attend(x, x, x, Signal(q_rotation=turn))
    with pytest.raises(ValueError, match="for 6 tokens of 8 channels, got 6 tokens of 4"):
        attend(x[..., :4], x[..., :4], x, Signal(k_rotation=rotation(at)))
