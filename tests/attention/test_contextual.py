"""Contextual biases: what attention does with vectors that depend on places alone, against N x N x D written out."""

from __future__ import annotations

import copy
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import randn, within
from vit2dpe import ConfigError, Positions, Signal, attend, attention_maps, explain, rotate
from vit2dpe.attention import Attention, CrossAttention
from vit2dpe.attention.cache import LayerCache
from vit2dpe.contextual import Contextual
from vit2dpe.signal import Rotation
from vit2dpe.stock import attach, attention_mask

HEADS, WIDTH, BATCH = 2, 4, 2
close = within(1e-10)


def term(q, k, kind="full", of_keys=False, heads=1, scale=0.5, dtype=torch.float64, width=WIDTH):
    """Random vectors; entries that are no line, so that an exchanged sign or axis is seen."""
    extent = q.extent
    spans = [extent] if kind == "full" else [extent[a : a + 1] for a in range(len(extent))]
    vectors, entries = [], []
    for number, span in enumerate(spans):
        sizes = [2 * size - 1 for size in span]
        order = torch.randperm(prod(sizes), generator=torch.Generator().manual_seed(number)).view(sizes)
        entries.append(order // 2)  # buckets of two offsets
        vectors.append(randn(heads, prod(sizes) // 2 + 1, width, seed=number, dtype=dtype))
    return Contextual(tuple(vectors), tuple(entries), q, k, HEADS, scale, of_keys)


def naive(of, x):
    """(B, H, Nq, Nk): the vector of each pair looked up one by one, N x N x D, and multiplied; x has no prefix rows."""
    places = [at.coords.expand(BATCH, -1, -1).long().tolist() for at in (of.q, of.k)]
    by_axis = len(of.vectors) > 1
    total = 0
    for axis, (a, entry) in enumerate(zip(of.vectors, of.entries, strict=True)):
        every = []
        for q, k in zip(*places, strict=True):
            deltas = [[[i - j for i, j in zip(one, other, strict=True)] for other in k] for one in q]
            middle = [size - 1 for size in of.q.extent]
            index = [
                [
                    int(entry[delta[axis] + middle[axis]] if by_axis else
                        entry[tuple(d + m for d, m in zip(delta, middle, strict=True))])
                    for delta in row
                ]
                for row in deltas
            ]  # fmt: skip
            every.append(a[:, torch.tensor(index)])  # (1|H, Nq, Nk, D)
        pairs = torch.stack(every).expand(-1, HEADS, -1, -1, -1)
        total = total + torch.einsum("bhjd,bhijd->bhij" if of.of_keys else "bhid,bhijd->bhij", x, pairs)
    return of.scale * total


def rotation(at, n):
    angle = at.coords.double().sum(-1)[:, None, :, None] * torch.tensor([0.3, 1.1], dtype=torch.float64)
    angle = torch.nn.functional.pad(angle, (0, 0, n - angle.shape[2], 0))
    return Rotation(angle.cos(), angle.sin())


def places(kind, extent, prefix=0):
    at = Positions.grid(extent).with_prefix(prefix)
    n = prod(extent)
    if kind == "whole":
        return at, at
    if kind == "taken":  # others in each sample, queries and keys apart
        q, k = (torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(s + b))[:m] for b in range(2)])
                for s, m in ((1, n - 2), (5, n - 1)))  # fmt: skip
        return at.take(q), at.take(k)
    return at.take(torch.tensor([n - 1])), at  # one query of a decoding step


CASES = [
    # extent, kind, of_keys, heads, places, prefix
    ((7,), "full", False, 1, "whole", 0),
    ((3, 5), "full", False, HEADS, "whole", 2),
    ((3, 5), "full", True, 1, "taken", 1),
    ((3, 5), "axis", False, 1, "whole", 1),
    ((3, 5), "axis", True, HEADS, "whole", 2),
    ((3, 5), "axis", False, HEADS, "taken", 0),
    ((3, 5), "axis", True, 1, "one", 0),
    ((2, 3, 4), "axis", False, 1, "whole", 0),
    ((2, 3, 4), "axis", True, 1, "whole", 1),
    ((2, 3, 2), "full", False, 1, "one", 1),
]


@pytest.mark.parametrize(("extent", "kind", "of_keys", "heads", "where", "prefix"), CASES)
@pytest.mark.parametrize("turned", [False, True])
def test_attention_adds_what_is_written_out(extent, kind, of_keys, heads, where, prefix, turned):
    """With a mask and a temperature; products are those of q and k before they turn; none for the prefix."""
    at_q, at_k = places(where, extent, prefix)
    nq, nk = (at.prefix + at.coords.shape[1] for at in (at_q, at_k))
    q, k, v = (randn(BATCH, HEADS, n, WIDTH, seed=n + i, dtype=torch.float64) for i, n in enumerate((nq, nk, nk)))
    bias = term(at_q, at_k, kind, of_keys, heads)
    turns = [rotation(at, n) for at, n in ((at_q, nq), (at_k, nk))] if turned else [None, None]
    signal = Signal(q_rotation=turns[0], k_rotation=turns[1], bias=(bias,), temperature=1.3)
    mask = torch.rand(nq, nk, generator=torch.Generator().manual_seed(0)) > 0.2
    mask[:, 0] = True
    expected = torch.zeros(BATCH, HEADS, nq, nk, dtype=torch.float64)
    x = k[:, :, prefix:] if of_keys else q[:, :, prefix:]
    expected[:, :, prefix:, prefix:] = naive(bias, x)
    assert float(expected.std()) > 0.3
    rq, rk = (rotate(q, turns[0]), rotate(k, turns[1])) if turned else (q, k)
    logits = 1.3 * (rq @ rk.mT * 0.7 + expected)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    close(attend(q, k, v, signal, mask, scale=0.7), weights @ v)


@pytest.mark.parametrize(("kind", "of_keys"), [("full", False), ("axis", True)])
def test_gradients_to_queries_keys_and_vectors(kind, of_keys):
    at = Positions.grid((2, 3)).with_prefix(1)
    q, k, v = (randn(1, HEADS, 7, WIDTH, seed=i, dtype=torch.float64).requires_grad_() for i in range(3))
    bias = term(at, at, kind, of_keys, heads=HEADS)
    vectors = tuple(a.requires_grad_() for a in bias.vectors)
    turn = rotation(at, 7)

    def run(q, k, v, *vectors):
        own = (bias._replace(vectors=vectors),)
        return attend(q, k, v, Signal(q_rotation=turn, k_rotation=turn, bias=own, temperature=0.8))

    assert torch.autograd.gradcheck(run, (q, k, v, *vectors), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (q, k, v, *vectors), fast_mode=True)


class Largest(TorchDispatchMode):
    """The largest tensor that is made: as much memory as it holds, whatever its shape."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["full", "axis"])
@pytest.mark.parametrize("of_keys", [False, True])
def test_no_tensor_of_pairs_and_channels_is_made(kind, of_keys):
    """Forward and backward, the largest one is N x max(N, number of vectors) for each sample and head."""
    at, width = Positions.grid((4, 6)).with_prefix(1), 64
    bias = term(at, at, kind, of_keys, dtype=torch.float32, width=width)
    bias = bias._replace(vectors=tuple(a.requires_grad_() for a in bias.vectors))
    q, k, v = (randn(BATCH, HEADS, 25, width, seed=i).requires_grad_() for i in range(3))
    with Largest() as largest:
        attend(q, k, v, Signal(bias=(bias,))).sum().backward()
    most = BATCH * HEADS * 25 * max(25, width, *(a.shape[1] for a in bias.vectors))
    assert largest.bytes <= 8 * most  # indices have eight bytes
    assert 8 * most < 4 * HEADS * 24 * 24 * width, "pairs and channels would be seen"


def layer_and_signal(**options):
    torch.manual_seed(0)
    layer, at = Attention(HEADS * WIDTH, HEADS, **options).double(), Positions.grid((3, 5)).with_prefix(1)
    return layer, at, Signal(q_rotation=(turn := rotation(at, 16)), k_rotation=turn, bias=(term(at, at),))


@pytest.mark.parametrize("options", [{}, dict(qk_norm=True), dict(kv_heads=1), dict(qk="cosine")])
@pytest.mark.parametrize("grad", [False, True])
def test_the_module_contracts_projected_queries_behind_their_norm(options, grad):
    """In eager mode q and k would turn where they lie; with a contextual bias they do not before it has them."""
    layer, _, signal = layer_and_signal(**options)
    if options.get("qk_norm"):
        torch.nn.init.normal_(layer.q_norm.weight)
    x = randn(BATCH, 16, HEADS * WIDTH, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        found = layer(x, signal)
        q, k, v, _, scale = layer.split(x, Signal(), private=False)
        k, v = (t.repeat_interleave(HEADS // t.shape[1], dim=1) for t in (k, v))
        expected = torch.zeros(BATCH, HEADS, 16, 16, dtype=torch.float64)
        expected[:, :, 1:, 1:] = naive(signal.bias[0], q[:, :, 1:])
        logits = rotate(q, signal.q_rotation) @ rotate(k, signal.k_rotation).mT * (scale or WIDTH**-0.5) + expected
        out = layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    close(found, out)


def test_maps_and_reasons_are_those_of_what_is_computed():
    layer, _, signal = layer_and_signal()
    x = randn(1, 16, HEADS * WIDTH, dtype=torch.float64)
    with torch.no_grad(), attention_maps(layer) as maps:
        out = layer(x, signal)
    v = layer.qkv(x).unflatten(-1, (3, HEADS, -1))[:, :, 2].transpose(1, 2)
    (weights,) = maps.values()
    within(1e-6, any_dtype=True)(layer.proj((weights.double() @ v).transpose(1, 2).flatten(2)), out)
    (line,) = explain(layer, x, signal)
    assert "contracted with the output of qkv" in line.rotation.why
    assert line.bias.path == "matrix"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 4e-3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_near(dtype, tolerance, autocast):
    at = Positions.grid((3, 5))
    q, k, v = (randn(BATCH, HEADS, 15, WIDTH, seed=i) for i in range(3))
    signal = Signal(bias=(term(at, at, dtype=torch.float32),))
    exact = attend(q, k, v, signal)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = attend(*(x if autocast else x.to(dtype) for x in (q, k, v)), signal)
    within(tolerance, any_dtype=True)(found, exact)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, on its first jvp
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap over torch's fused kernel
def test_compiled_whole_and_under_function_transforms():
    """Forward mode too, in which torch's fused kernels have no derivative by what is added to the logits."""
    layer, at, signal = layer_and_signal()
    signal = signal.with_bias((term(at, at, "axis"), term(at, at, of_keys=True)))
    x = randn(3, 16, HEADS * WIDTH, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, signal: layer(x, signal), fullgraph=True, backend="aot_eager")
    expected = layer(x, signal)
    close(compiled(x, signal), expected)
    with torch.no_grad():
        close(torch.func.vmap(lambda one: layer(one[None], signal)[0])(x), expected)
    each = torch.func.vmap(torch.func.grad(lambda one: layer(one[None], signal).sin().sum()))(x)
    given = x.clone().requires_grad_()
    layer(given, signal).sin().sum().backward()
    close(each, given.grad)
    tangent = randn(*x.shape, seed=3, dtype=torch.float64)
    _, moved = torch.func.jvp(lambda x: layer(x, signal), (x,), (tangent,))
    close(moved, (layer(x + 1e-6 * tangent, signal) - layer(x - 1e-6 * tangent, signal)) / 2e-6, 1e-7)


# caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of_keys", "turned"), [(False, True), (True, False)])
@torch.no_grad()
def test_a_step_of_decoding_is_a_row_of_the_whole(of_keys, turned):
    layer, at = layer_and_signal()[0], Positions.sequence(6)

    def signal(q, k):
        turns = [rotation(at, at.coords.shape[1]) if turned else None for at in (q, q)]
        return Signal(q_rotation=turns[0], k_rotation=turns[1], bias=(term(q, k, of_keys=of_keys),))

    x, cache = randn(BATCH, 6, HEADS * WIDTH, dtype=torch.float64), LayerCache(6)
    whole = layer(x, signal(at, at), torch.ones(6, 6, dtype=torch.bool).tril())
    for i in range(6):
        here, keys = at.take(torch.tensor([i])), at.take(torch.arange(i + 1))
        close(layer(x[:, i : i + 1], signal(here, keys), cache=cache), whole[:, i : i + 1])


@torch.no_grad()
def test_products_with_keys_that_are_kept_rotated_are_refused():
    """Of queries alone they are served in cross-attention, whose memory is rotated once, too."""
    layer, at, signal = layer_and_signal()
    of_keys = signal.with_bias((term(at, at, of_keys=True),))
    x = randn(1, 16, HEADS * WIDTH, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"a cache keeps keys rotated.*of queries alone, or no cache"):
        layer(x, of_keys, cache=LayerCache(16))
    cross, cache = CrossAttention(HEADS * WIDTH, HEADS).double(), LayerCache(16)
    first = cross(x, x, signal, cache=cache)
    close(first, cross(x, x, signal))
    close(cross(x, x, signal, cache=cache), first)
    with pytest.raises(ConfigError, match="a cache keeps keys rotated"):
        cross(x, x, of_keys, cache=cache)
    plain = Signal(bias=of_keys.bias)
    close(cross(x, x, plain, cache=(cache := LayerCache(16))), cross(x, x, plain))
    close(cross(x, x, plain, cache=cache), cross(x, x, plain))


# what is refused ---------------------------------------------------------------------------------------------------


def test_other_sizes_are_named():
    at = Positions.grid((3, 5)).with_prefix(1)
    q = randn(1, HEADS, 16, WIDTH, dtype=torch.float64)
    for other, came in ((q[..., :3], "1, 2, 16, 3"), (q[:, :, 1:], "1, 2, 15, 4"), (q[:, :1], "1, 1, 16, 4")):
        with pytest.raises(ValueError, match=rf"16 queries in 2 heads of 4 channels, got \({came}\)"):
            attend(other, other, other, Signal(bias=(term(at, at),)))
    moved = Positions(at.coords + 0.25, at.extent, 1)
    with pytest.raises(ValueError, match="whole coordinates"):
        attend(q, q, q, Signal(bias=(term(moved, moved),)))


def test_a_float_mask_cannot_hold_it():
    at = Positions.grid((3, 5))
    with pytest.raises(ConfigError, match=r"before attention contracts it.*RotaryEncoderLayer"):
        attention_mask(Signal(bias=(term(at, at),)), 1)
    stack = torch.nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(ConfigError, match=r"Decomposed multiplies queries and keys.*RotaryEncoderLayer"):
        attach(copy.deepcopy(stack), "decomposed", grid=(3, 5))
