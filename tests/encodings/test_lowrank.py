"""A bias that is a product goes to attention as channels: the same numbers, and no matrix of N² entries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.devices import Device
from tests.helpers import within
from vit2dpe import Dims, Positions, Rotation, Signal, attend, build, rotate
from vit2dpe.attention.kernels import table
from vit2dpe.contextual import Contextual
from vit2dpe.encodings import ENCODINGS
from vit2dpe.encodings.alibi import slopes_of
from vit2dpe.signal import Dense, LowRank
from vit2dpe.testing import randomise

HEADS, WIDTH = 3, 8
CASES = {"line": ((30,), 0), "9x13 behind a prefix": ((9, 13), 3), "32x32": ((32, 32), 0)}
CASE = pytest.mark.parametrize(("grid", "prefix"), CASES.values(), ids=CASES)


def squared(grid):
    return build("alibi(distance=squared)", Dims(HEADS * WIDTH, HEADS, grid))


def places(grid, prefix=0):
    return Positions.grid(grid).with_prefix(prefix)


def contents(n, dtype=torch.float32, batch=2, width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, HEADS, n, width, generator=generator).to(dtype) for _ in range(3)]


def dense(signal):
    """The same Signal with every bias in full."""
    return signal._replace(bias=tuple(t if isinstance(t, Contextual) else Dense(t.dense()) for t in signal.bias))


def penalty(grid, prefix):
    """-m ‖q - k‖² from differences of places in float64, (H, N, N); 0 for the prefix."""
    coords = torch.cartesian_prod(*[torch.arange(size, dtype=torch.float64) for size in grid]).view(-1, len(grid))
    square = (coords[:, None] - coords[None]).square().sum(-1)
    slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2], dtype=torch.float64)  # ALiBi's for three heads
    return F.pad(-slopes[:, None, None] * square, (prefix, 0, prefix, 0))


def reference(q, k, v, bias, scale=WIDTH**-0.5, temperature=1.0, mask=None):
    q, k, v = (x.double() for x in (q, k, v))
    logits = temperature * (scale * q @ k.transpose(-1, -2) + bias)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(-1) @ v


close = within(1e-5, any_dtype=True)


@pytest.fixture
def calls(monkeypatch):
    """What the fused kernel was called with."""
    seen, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        seen.append(dict(kwargs, q=q, k=k, v=v))
        return real(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


# the same numbers --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_slopes_of_many_bits_cancel_as_exactly():
    """Twelve heads have slopes such as 2^-½; on 64x64 places their squares are of order 1,000 before they cancel."""
    at, some = Positions.grid((64, 64)), torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:60]
    encoding = build("alibi(distance=squared)", Dims(12 * WIDTH, 12, (64, 64)))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, n, WIDTH, generator=generator) for n in (60, 4096, 4096))
    signal = Signal(bias=(encoding.bias(at.take(some), at),))
    square = (at.coords[0][some][:, None] - at.coords[0]).double().square().sum(-1)
    bias = -torch.tensor(slopes_of(12), dtype=torch.float64)[:, None, None] * square
    close(attend(q, k, v, signal), reference(q, k, v, bias))


@CASE
@pytest.mark.parametrize("scale", [None, 0.05])
@torch.no_grad()
def test_channels_are_the_dense_bias_and_the_float64_reference(grid, prefix, scale):
    at = places(grid, prefix)
    signal = squared(grid)(at)
    assert isinstance(signal.bias[0], LowRank)
    q, k, v = contents(prefix + at.coords.shape[1])
    ours = attend(q, k, v, signal, scale=scale)
    close(ours, attend(q, k, v, dense(signal), scale=scale))
    close(ours, reference(q, k, v, penalty(grid, prefix), WIDTH**-0.5 if scale is None else scale))


@pytest.mark.parametrize(("temperature", "masked", "width"), [(None, False, 8), (1.3, True, 8), (0.4, True, 20)])
@torch.no_grad()
def test_it_goes_with_another_bias_a_rotation_a_mask_and_a_temperature(temperature, masked, width):
    """Also where the values are wider than the queries and their channels."""
    grid, prefix = (9, 13), 2
    at, n = places(grid, prefix), prefix + 9 * 13
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(1, HEADS, n, n, generator=generator)
    turn = build("rope", Dims(HEADS * WIDTH, HEADS, grid))(at).q_rotation
    mask = torch.rand(2, 1, n, n, generator=generator) > 0.3
    mask[0, 0, 5] = False  # a query that sees nothing gives 0
    mask = mask if masked else None
    signal = squared(grid)(at) + Signal(q_rotation=turn, k_rotation=turn, bias=(Dense(other),), temperature=temperature)
    q, k, v = contents(n)
    v = torch.randn(2, HEADS, n, width, generator=generator)
    ours = attend(q, k, v, signal, mask)
    assert ours.shape == v.shape
    close(ours, attend(q, k, v, dense(signal), mask))
    exact = Rotation(*(part.double() for part in turn))
    expected = reference(
        rotate(q.double(), exact), rotate(k.double(), exact), v, penalty(grid, prefix) + other.double(),
        temperature=temperature or 1.0, mask=mask,
    )  # fmt: skip
    close(ours, expected.nan_to_num(0.0))


@torch.no_grad()
def test_two_products_and_other_keys_than_queries():
    """Several products are several groups of channels; queries and keys at different places."""
    generator = torch.Generator().manual_seed(0)
    at = places((9, 13))
    q_at, k_at = at.take(torch.randperm(117, generator=generator)[:20]), at.take(torch.arange(40))
    extra = LowRank(*(torch.randn(1, HEADS, n, 2, generator=generator) for n in (20, 40)))
    signal = squared((9, 13))(q_at, k_at) + Signal(bias=(extra,))
    q, k, v = contents(20)[0], *contents(40)[1:]
    ours = attend(q, k, v, signal)
    close(ours, attend(q, k, v, dense(signal)))
    far = (q_at.coords[0, :, None].double() - k_at.coords[0, None]).square().sum(-1)
    slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2], dtype=torch.float64)[:, None, None]
    close(ours, reference(q, k, v, -slopes * far + extra.dense().double()))


@pytest.mark.parametrize("temperature", [None, 1.7])
def test_gradients_are_those_of_the_dense_bias(temperature):
    """Of queries, keys, values and of both factors of a learned product; given tensors are not altered."""
    generator = torch.Generator().manual_seed(0)
    given = contents(30) + [torch.randn(1, HEADS, 30, 3, generator=generator) for _ in range(2)]
    before = [tensor.clone() for tensor in given]
    grads = []
    for full in (False, True):
        q, k, v, fq, fk = (tensor.clone().requires_grad_() for tensor in given)
        signal = Signal(bias=(LowRank(fq, fk),), temperature=temperature)
        attend(q, k, v, dense(signal) if full else signal).sin().sum().backward()
        grads.append([tensor.grad for tensor in (q, k, v, fq, fk)])
    for ours, theirs, tensor, old in zip(*grads, given, before, strict=True):
        close(ours, theirs)
        assert float(ours.abs().max()) > 1e-3
        assert torch.equal(tensor, old)


WORDS = [*ENCODINGS, "alibi(distance=squared)", "relative(shared=true)", "relative(prefix=true)"]


@pytest.mark.need("A2")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("one", WORDS)
def test_every_pair_of_encodings_equals_its_dense_biases(one, training, monkeypatch):
    """Whatever way is taken for the two: a table beside a product has a kernel of its own, with more channels."""
    monkeypatch.setattr(table, "BUDGET", 100)  # bytes: in inference a whole grid or its parts, no matrix
    at = places((3, 4), 1 if training else 0)
    torch.manual_seed(0)
    given = [torch.randn(2, 2, 12 + at.prefix, 8, dtype=torch.float64) for _ in range(3)]
    for other in WORDS:
        encoding = randomise(build(f"{one}+{other}", Dims(16, 2, (3, 4), depth=2))).double().eval()
        found = []
        for full in (False, True):
            q, k, v = inputs = [x.clone().requires_grad_(training) for x in given]
            with torch.set_grad_enabled(training):
                signal = encoding(at)
                out = attend(q, k, v, dense(signal) if full else signal)
            encoding.zero_grad()
            if training:
                out.sin().sum().backward()
            learned = [p.grad for p in encoding.parameters() if p.grad is not None]
            found.append([out, *(x.grad for x in inputs if training), *learned])
        for ours, theirs in zip(*found, strict=True):
            close(ours, theirs, tolerance=1e-9)


# which way is taken ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_full_precision_no_mask_is_built(calls, dtype):
    """d + 2 additional channels of q and k, and nothing for the kernel to add; unless there is a mask."""
    at = places((9, 13), 1)
    q, k, v = contents(118, dtype)
    attend(q, k, v, squared((9, 13)).to(dtype)(at))
    mask = torch.ones(118, 118, dtype=torch.bool).tril()
    attend(q, k, v, squared((9, 13)).to(dtype)(at), mask)
    for call in calls:
        assert call["q"].shape == call["k"].shape == (2, HEADS, 118, WIDTH + 4)
        assert call["q"].dtype == dtype
        assert call["scale"] == 1.0
    assert calls[0]["attn_mask"] is None
    assert calls[1]["attn_mask"].dtype == torch.bool


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_half_precision_the_bias_is_dense(calls, dtype, autocast):
    """Squares of places cancel too coarsely there: the kernel adds the exact penalty, rounded once."""
    at = places((24, 40), 2)
    q, k, v = contents(962, torch.float32 if autocast else dtype, batch=1)
    with torch.autocast("cpu", dtype, enabled=autocast):
        attend(q, k, v, squared((24, 40))(at))
    (call,) = calls
    assert call["q"].shape[-1] == WIDTH
    added = call["attn_mask"]
    assert added.dtype == dtype
    exact = penalty((24, 40), 2)
    if dtype == torch.float16:  # whose rows end at 0: moving a row changes no softmax
        exact = exact - exact.amax(-1, keepdim=True)
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 1e-4
    assert bool(((added[0].double() - exact).abs() <= allowed).all())


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation gives."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return out


@pytest.mark.parametrize(("distance", "small"), [("squared", True), ("euclidean", False)])
@torch.no_grad()
def test_no_matrix_of_all_pairs_is_made(monkeypatch, distance, small):
    """From the places to the kernel's door nothing has Nq · Nk entries; euclidean distance shows we would see it."""
    encoding, at = build(f"alibi(distance={distance})", Dims(HEADS * WIDTH, HEADS, (32, 32))), places((32, 32))
    q, k, v = contents(1024, batch=1)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: v)
    with Largest() as largest:
        attend(q, k, v, encoding(at))
    assert (largest.entries < 1024 * 1024 // 8) == small


@pytest.mark.parametrize("grid", [(30,), (4, 7)])
@torch.no_grad()
def test_on_cuda_widths_are_multiples_of_8_and_numbers_the_same(grid, monkeypatch):
    """Other widths lose the fused kernel there; of labelled tensors, whose numbers are real."""
    count, kernel, widths = math.prod(grid), F.scaled_dot_product_attention, []
    expected = attend(*contents(count), squared(grid)(places(grid)))

    def spy(q, k, v, **arguments):
        widths.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return kernel(q, k, v, **arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with Device("cuda"):
        at = Positions.grid(grid, device="cuda")
        found = attend(*(x.to("cuda") for x in contents(count)), squared(grid)(at))
    assert widths == [(16, 16, 16)]
    close(found, expected)


@torch.no_grad()
def test_on_cuda_squares_of_places_are_multiplied_in_float64(monkeypatch):
    """TF32, where it is allowed, has 11 bits: 0.5 in a logit of a 64x64 grid."""
    expected, seen, product = squared((9, 13))(places((9, 13))).bias[0].dense(), [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: seen.append(x.dtype) or product(x, y))
    with Device("cuda"):
        found = squared((9, 13))(Positions.grid((9, 13), device="cuda")).bias[0].dense()
    assert seen == [torch.float64]
    assert found.dtype == torch.float32
    close(found, expected)
