"""Attention inside of the segments of a packed row is that of each sample alone, and makes no matrix of the row."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import micro_vit, randn
from vit2dpe import ConfigError, Dims, Positions, Signal, attend, attention_maps, build, explain, use_policy
from vit2dpe.attention import Attention
from vit2dpe.attention.kernels import varlen
from vit2dpe.contextual import Contextual
from vit2dpe.encodings import ENCODINGS
from vit2dpe.packed import in_segments, packed_grids
from vit2dpe.segments import Group, Segments
from vit2dpe.signal import Dense, Distance, LowRank, Rotation, Table
from vit2dpe.testing import randomise

H, DIM, PREFIX = 3, 8, 2
SHAPES = [(2, 3), (3, 2), (2, 3), (4, 3), (1, 5), (3, 2)]
KINDS = [*dict.fromkeys(SHAPES)]
TOKENS = [PREFIX + rows * columns for rows, columns in SHAPES]
WORDS = [*ENCODINGS, "relative(prefix=true)", "lookhere+rope_mixed", "alibi(distance=squared)", "sincos+shaw+rope"]
LAYOUTS = ["each", "row"]  # leading tokens in front of each image; those of all in front of the row, padding behind


def tokens_of(segments, number, row=0):
    return (segments.numbers[row] == number).nonzero()[:, 0]


def gradients(total, inputs):
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("word", WORDS)
def test_each_image_of_a_row_is_what_it_is_alone(word, layout):
    if layout == "each":
        n, places = sum(TOKENS), [Positions.grid(shape).with_prefix(PREFIX) for shape in KINDS]
        at = in_segments(Positions(torch.zeros(1, n, 2), (4, 5)), Segments.of(TOKENS, SHAPES), places)
    else:
        n = sum(TOKENS) + 4
        at = packed_grids(SHAPES, PREFIX, length=n - PREFIX * len(SHAPES))
    segments = at.row.segments
    encoding = randomise(build(word, Dims(H * DIM, H, (3, 4)))).double().eval()
    signal = encoding(at)
    q, k, v, weights = randn(4, 1, H, n, DIM, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    learned = [*inputs, *encoding.parameters()]
    out, expected, total = attend(q, k, v, signal, segments), torch.zeros_like(weights), 0.0
    for i, shape in enumerate(SHAPES):
        own, index = encoding(Positions.grid(shape).with_prefix(PREFIX)), tokens_of(segments, i)
        found = attend(*(x[:, :, index] for x in inputs), own)
        expected[:, :, index] = found.detach()
        total = total + (found * weights[:, :, index]).sum()
        if own.token is not None:
            torch.testing.assert_close(signal.token[:, index], own.token, rtol=0, atol=1e-12)
            total = total + own.token.square().sum()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)  # padding too, which is 0
    ours = (out * weights).sum() + (0.0 if signal.token is None else signal.token.square().sum())
    for x, y in zip(gradients(ours, learned), gradients(total, learned), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    with torch.no_grad():  # in float32, by other kernels
        narrow = encoding.float()(at)
        found = attend(*(x.float() for x in inputs), narrow, segments)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("policy", "temperature"), [("interpolate", "log"), ("ntk", None), ("yarn", "yarn")])
def test_policies_and_temperatures_go_by_the_grid_of_each_image(policy, temperature):
    segments, model = Segments.of(TOKENS, SHAPES), micro_vit("rope")
    encoding = model.position
    n, places = segments.numbers.shape[1], [Positions.grid(shape).with_prefix(PREFIX) for shape in KINDS]
    q, k, v = randn(3, 1, H, n, 48 // H)
    with use_policy(model, policy, temperature=temperature):
        signal = encoding(in_segments(Positions(torch.zeros(1, n, 2), (4, 5)), segments, places))
        out = attend(q, k, v, signal, segments)
        for i, shape in enumerate(SHAPES):
            index = tokens_of(segments, i)
            alone = attend(*(x[:, :, index] for x in (q, k, v)), encoding(Positions.grid(shape).with_prefix(PREFIX)))
            torch.testing.assert_close(out[:, :, index], alone, rtol=0, atol=1e-6)


def line(lengths):
    """Places on a line that begin anew in each segment: (1, N, 1)."""
    return Positions(torch.cat([torch.arange(x, dtype=torch.float32) for x in lengths])[None, :, None], (8,))


def bias_of(kind, at, n):
    table = randn(H, 15, seed=3, dtype=torch.float64).requires_grad_()
    if kind == "Table":
        return Table(table, at, at), [table]
    if kind == "LowRank":
        factors = [randn(1, H, n, 2, seed=i, dtype=torch.float64).requires_grad_() for i in (5, 6)]
        return LowRank(*factors), factors
    if kind == "Distance":
        slopes = randn(H, seed=3, dtype=torch.float64).exp().requires_grad_()
        return Distance(at, at, slopes, dtype=torch.float64), [slopes]
    if kind == "Contextual":
        vectors = randn(1, 15, DIM, seed=4, dtype=torch.float64).requires_grad_()
        return Contextual((vectors,), (torch.arange(15),), at, at, H), [vectors]
    matrix = randn(1, H, n, n, seed=7, dtype=torch.float64).requires_grad_()
    return Dense(matrix), [matrix]


@pytest.mark.parametrize("under", ["all", "causal", "masks", "both"])
@pytest.mark.parametrize("kind", ["Table", "LowRank", "Distance", "Dense", "Contextual"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_signal_of_the_row_is_cut_to_its_segments(kind, under, rows):
    """Against the matrix of the row, with rotations, a temperature of each token, several rows and other values."""
    lengths = [3, 5, 1, 3, 2]
    n, at = sum(lengths), line(lengths)
    segments = Segments.of(lengths if rows == 1 else [lengths] * rows)
    if under in ("masks", "both"):
        made = [torch.rand(size, H, length, length) < 0.7 for size, length in segments.groups]
        segments = segments.under(inside=[None, *made[1:]])
    segments = segments.under(under in ("causal", "both"), segments.inside)
    term, learned = bias_of(kind, at, n)
    angle = randn(1, 1, n, DIM // 2, seed=8, dtype=torch.float64)
    turn, factor = Rotation(angle.cos(), angle.sin()), randn(rows, 1, n, 1, seed=9, dtype=torch.float64).exp()
    signal = Signal(q_rotation=turn, k_rotation=turn, bias=(term,), temperature=factor)
    q, k, v = (x.requires_grad_() for x in randn(3, rows, H, n, DIM, dtype=torch.float64))
    v = v[..., :6]
    found, expected = attend(q, k, v, signal, segments), attend(q, k, v, signal, segments.matrix())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    inputs = [q, k, v, *learned]
    pairs = [gradients(out.square().sum(), inputs) for out in (found, expected)]
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_one_row_of_segments_serves_all_rows():
    lengths = [3, 4, 3]
    q, k, v = randn(3, 2, H, 12, DIM)
    one, two = Segments.of(lengths, total=12), Segments.of([lengths, lengths], total=12)
    mask = torch.rand(2, 1, 3, 3) < 0.6
    one, two = one.under(True, [mask, None]), two.under(True, [mask.repeat(2, 1, 1, 1), None])
    assert torch.equal(attend(q, k, v, mask=one), attend(q, k, v, mask=two))
    for own, other in zip(one.of_rows(2), two, strict=True):
        assert torch.equal(own, other) if isinstance(own, torch.Tensor) else str(own) == str(other)


def test_what_segments_are_made_of():
    found = Segments.of([2, 3, 2], total=9)
    assert found.numbers.tolist() == [[0, 0, 1, 1, 1, 2, 2, -1, -1]]
    assert found.groups == (Group(2, 2), Group(1, 3))
    assert found.order.tolist() == [0, 1, 5, 6, 2, 3, 4, 7, 8]
    assert found.starts.tolist() == [0, 2, 4, 7]
    assert Segments.of([2, 2, 3]).order is None  # nothing is moved
    assert Segments.of([4, 4], ["tall", "wide"]).groups == (Group(1, 4), Group(1, 4))
    several = Segments.of([[1, 2], [3]])
    for lengths in (np.array([2, 3]), torch.tensor([2, 3]), [*np.array([2, 3])]):
        assert torch.equal(Segments.of(lengths).numbers, Segments.of([2, 3]).numbers)
    for rows in ([np.array([1, 2]), np.array([3])], [torch.tensor([1, 2]), torch.tensor([3])]):
        assert torch.equal(Segments.of(rows).numbers, several.numbers)
    assert several.numbers.tolist() == [[0, 1, 1], [0, 0, 0]]
    again = Segments.read(torch.tensor([[7, 7, -5, 2, 7]]))  # tokens of a segment may lie apart
    assert again.groups == (Group(1, 3), Group(1, 1))
    assert again.order.tolist() == [0, 1, 4, 3, 2]
    assert again.matrix()[0, 0].int().tolist() == [
        [1, 1, 0, 0, 1],
        [1, 1, 0, 0, 1],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert attend(*randn(3, 1, H, 2, DIM), mask=Segments.read(torch.full((1, 2), -1))).abs().sum() == 0


def test_what_cannot_be_is_refused():
    for lengths in ([], [[]], [0, 2], [[3], []]):
        with pytest.raises(ConfigError, match="at least one"):
            Segments.of(lengths)
    for lengths in ([3, [4]], [2.5], ["3"]):
        with pytest.raises(ConfigError, match="lengths are whole numbers, or a list of these for each row"):
            Segments.of(lengths)
    with pytest.raises(ConfigError, match="have 5 tokens, and the row 4"):
        Segments.of([2, 3], total=4)
    with pytest.raises(ConfigError, match="1 kinds of 2 segments"):
        Segments.of([2, 3], ["a"])
    with pytest.raises(ConfigError, match="1 for 2 kinds"):
        Segments.of([2, 3]).under(inside=[None])
    with pytest.raises(ConfigError, match=r"\(B\|1, N\), got"):
        Segments.read(torch.zeros(3))
    q = randn(1, H, 6, DIM)
    with pytest.raises(ValueError, match=r"5 tokens in 1 rows, .* got 6 queries"):
        attend(q, q, q, mask=Segments.of([2, 3]))
    with pytest.raises(ValueError, match="of 3 rows, got 1"):
        attend(q, q, q, mask=Segments.of([[6]] * 3))
    segments = Segments.of([3, 3])
    with pytest.raises(ConfigError, match=r"of \[3\] tokens, and places of \[4\]"):
        in_segments(line([3, 3]), segments, [Positions.sequence(4)])
    signal = build("alibi", Dims(H * DIM, H, (3,)))(in_segments(line([3, 3]), segments, [Positions.sequence(3)]))
    with pytest.raises(ConfigError, match="under the same Segments"):
        attend(q, q, q, signal)


class Peak(TorchDispatchMode):
    """The most bytes of storages that were alive at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
            self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def peak(layer, encoding, at, n, mask, training):
    x = randn(1, n, H * DIM)
    with torch.set_grad_enabled(training), Peak() as counted:
        out = layer(x, encoding(at), mask)
        if training:
            out.sum().backward()
    layer.zero_grad()
    encoding.zero_grad()
    return counted


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "word", ["none", "rope", "alibi", "relative", "shaw", "logcpb", "t5", "lookhere", "rope_mixed"]
)
def test_a_row_takes_the_memory_of_its_images(word, training):
    """At most 1.1 of the sum of what they take alone: nothing of (sum N) x (sum N)."""
    shapes = [(8, 6), (6, 8), (9, 5), (8, 6), (7, 7), (6, 8), (5, 9)]
    kinds = [*dict.fromkeys(shapes)]
    segments = Segments.of([rows * columns for rows, columns in shapes], shapes)
    torch.manual_seed(0)
    layer, encoding = Attention(H * DIM, H), randomise(build(word, Dims(H * DIM, H, (6, 6)))).eval()
    n, places = segments.numbers.shape[1], [Positions.grid(shape) for shape in kinds]
    at = in_segments(Positions(torch.zeros(1, n, 2), (9, 9)), segments, places)
    found = peak(layer, encoding, at, n, segments, training)
    alone = [peak(layer, encoding, Positions.grid(x), x[0] * x[1], None, training) for x in shapes]
    assert found.most <= 1.1 * sum(one.most for one in alone)
    assert found.largest < n * n * 4  # one head of the matrix of the row
    if word == "alibi":  # the counter sees it
        assert (
            peak(layer, encoding, Positions(torch.rand(1, n, 2), (9, 9)), n, segments.matrix(), training).largest
            > n * n * 4
        )


def test_no_forward_reads_a_device():
    """On CUDA tensors without numbers, where reading one raises."""
    with FakeTensorMode(), torch.device("cuda"):
        numbers, order = torch.empty(1, 11, dtype=torch.int64), torch.empty(11, dtype=torch.int64)
        starts = torch.empty(4, dtype=torch.int32)
        segments = Segments(numbers, (Group(2, 3), Group(1, 4)), order, order, starts)
        places = [Positions.sequence(length, length=8, device="cuda") for length in (3, 4)]
        at = in_segments(Positions(torch.empty(1, 11, 1), (8,)), segments, places)
        for word in ("rope", "alibi", "t5", "fire", "logcpb"):
            encoding = build(word, Dims(H * DIM, H, (8,)))
            layer = Attention(H * DIM, H)
            out = layer(torch.empty(1, 11, H * DIM), encoding(at), segments.under(causal=True))
            assert (out.device.type, tuple(out.shape)) == ("cuda", (1, 11, H * DIM))


def by_hand(q, k, v, begins, ends, longest, most, *, scale, window_size):
    """What torch documents of `varlen_attn`."""
    assert torch.equal(begins, ends)
    assert longest == most == int(begins.diff().max())
    rows = zip(*(x.split(begins.diff().tolist()) for x in (q, k, v)), strict=True)
    found = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in part), scale=scale, is_causal=window_size == (-1, 0)
        ).transpose(0, 1)
        for part in rows
    ]
    return torch.cat(found)


@pytest.mark.skipif(not varlen.HERE, reason="torch has no varlen_attn of this kind")
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_for_all_lengths_is_what_kinds_are(causal, monkeypatch):
    """Called as it is documented, for what it takes alone; and on CUDA tensors without numbers."""
    calls = []

    def counted(*args, **more):
        calls.append(more)
        return by_hand(*args, **more)

    encoding = build("rope", Dims(H * DIM, H, (8,)))
    lengths = [[3, 5, 3], [4, 1, 4]]
    segments = Segments.of(lengths, total=13).under(causal)
    q, k, v = randn(3, 2, H, 13, DIM).bfloat16()
    signal = encoding(Positions.sequence(13, length=16))._replace(temperature=1.5)
    expected = attend(q, k, v, signal, segments)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    torch.testing.assert_close(attend(q, k, v, signal, segments), expected, rtol=0, atol=2e-2)
    assert len(calls) == 1
    bias = Signal(bias=(Dense(torch.zeros(1, H, 13, 13)),))
    attend(q, k, v, bias, segments)
    attend(q, k, v, signal, segments, dropout=0.1)
    attend(q.float(), k.float(), v.float(), signal, segments)
    attend(q, k, v, signal, segments.under(causal, [None] * len(segments.groups)))
    assert len(calls) == 1
    monkeypatch.undo()
    with FakeTensorMode(), torch.device("cuda"):
        shapes = Segments(*(torch.empty(2, 13, dtype=torch.int64), segments.groups, None, None), torch.empty(7).int())
        q = torch.empty(2, H, 13, DIM, dtype=torch.bfloat16, requires_grad=True)
        out = attend(q, q, q, mask=shapes.under(causal))
        assert (out.device.type, out.dtype, tuple(out.shape)) == ("cuda", torch.bfloat16, (2, H, 13, DIM))
        assert out.requires_grad


def test_maps_and_explanations_of_a_row():
    segments = Segments.of([3, 2, 3], total=10).under(causal=True)
    layer, encoding = Attention(H * DIM, H).eval(), randomise(build("alibi+rope", Dims(H * DIM, H, (4,))))
    places = [Positions.sequence(length, length=4) for length in (3, 2)]
    signal = encoding(in_segments(Positions(torch.zeros(1, 10, 1), (4,)), segments, places))
    x = randn(1, 10, H * DIM)
    with attention_maps(layer) as maps:
        out = layer(x, signal, segments)
    (found,) = maps.values()
    assert found.shape == (1, H, 10, 10)
    assert torch.equal(found > 0, segments.matrix().expand(-1, H, -1, -1))
    _, _, v, *_ = layer.split(x, signal, private=False)
    mixed = layer.proj((found @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, out, rtol=0, atol=1e-6)
    (explained,) = explain(layer, x, signal, segments)
    assert explained.mask.path == "segments"
    assert "3 segments of packed rows, of 2 kinds" in str(explained)


def test_no_key_is_kept_for_every_row():
    """What is cut of the places of a row lives with these places, not with a shape."""
    at, segments = line([3, 2]), Segments.of([3, 2])
    q = randn(1, H, 5, DIM)
    term = partial(Distance, at, at, (1.0,) * H)
    attend(q, q, q, Signal(bias=(term(),)), segments)
    kept = dict(at._memo)
    attend(q, q, q, Signal(bias=(term(),)), segments)
    assert len(at._memo) == len(kept)
