"""A Signal for torch's FlexAttention: biases are computed where logits are, and no matrix of pairs is built or read.

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    out = torch.compile(flex_attention)(q, k, v, score_mod=score_mod(signal), scale=scale)
    score_mod(signal)(score, b, h, i, j) = temperature · (score + Σ bias terms at [b, h, i, j])

Rotations turn q and k before (`vit2dpe.rotate`); `score` is scale · q k. What a term becomes:

    Table      the row-major index of an offset is linear in the places, so that N numbers of queries and N of keys
               stand for the index of N² pairs: flat[h, u_i - w_j]
    LowRank    Σ_r fq[i, r] fk[j, r], in the dtype of the factors
    Distance   its formula, in float32 from the coordinates
    Dense      an entry of the matrix that is there

Prefix tokens, places that differ from sample to sample, and keys other than the queries are served; a window is a small
grid. `attend` takes this path on CUDA by itself, from `PAIRS` pairs of tokens on: `serves`, and docs/decisions/0019.

Source: FlexAttention, arXiv 2412.05496; torch.nn.attention.flex_attention.

Legend: B batch, H heads, Nq, Nk tokens, Dh head width, P prefix tokens, N places.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache, reduce
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...positions import numbers
from ...signal import UNSEEN, Bias, Dense, Distance, LowRank, Signal, Table
from . import Selection, fused_kernels_allowed, kernel_dtype, trains
from .rotary import TRITON

PAIRS = 1024**2  # of queries and keys, from which `attend` takes this path
WIDTHS = range(16, 257)  # of a head: Triton multiplies no less than 16 channels, and more than 256 fill a processor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda",)
BACKEND = "inductor"

Pair = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of (b, h, i, j), 0-d integers
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # of (score, b, h, i, j)


def score_mod(signal: Signal) -> ScoreMod:
    """(score, b, h, i, j) -> temperature · (score + the bias of head h between query i and key j of sample b).

    Args:
        signal: its rotations and its token term are not looked at.

    Raises:
        ConfigError: for a bias term of an author's own kind.
        ValueError: as the matrix of the bias would: fractional places under a table, offsets that leave it.
    """
    pairs, factor = [_pair(term) for term in signal.bias], signal.temperature
    temperature = _of_query(factor) if isinstance(factor, Tensor) else factor

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for pair in pairs:
            score = score + pair(b, h, i, j)
        if temperature is None:
            return score
        return score * (temperature if isinstance(temperature, float | int) else temperature(b, h, i, j))

    return modified


def mask_mod(mask: Tensor) -> Pair:
    """(b, h, i, j) -> whether a query may attend to a key, for torch's `create_block_mask`.

    Args:
        mask: boolean, (Nq, Nk) or (B|1, H|1, Nq, Nk); True may attend.

    Raises:
        ValueError: for a mask of another kind.
    """
    if mask.dtype != torch.bool or mask.ndim not in (2, 4):
        raise ValueError(
            f"a mask is boolean, True where a query may attend, (Nq, Nk) or (B, 1|H, Nq, Nk); got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    return _entry(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))


def _pair(term: Bias) -> Pair:
    if isinstance(term, Table):
        return _table(term)
    if isinstance(term, LowRank):
        return _low_rank(term)
    if isinstance(term, Distance):
        return _distance(term)
    if isinstance(term, Dense):
        return _entry(term.tensor)
    raise ConfigError(
        f"FlexAttention takes Table, LowRank, Distance and Dense terms, got {type(term).__name__}: give "
        "Dense(term.dense()) instead"
    )


def _entry(matrix: Tensor) -> Pair:
    """Of a matrix (B|1, H|1, 1|Nq, Nk)."""
    samples, heads, queries = (size > 1 for size in matrix.shape[:3])
    return lambda b, h, i, j: matrix[b if samples else 0, h if heads else 0, i if queries else 0, j]


def _of_query(factor: Tensor) -> Pair:
    """Of a temperature, 0-d or (B|1, 1, N|1, 1)."""
    if factor.ndim == 0:
        return lambda b, h, i, j: factor
    samples, queries = factor.shape[0] > 1, factor.shape[2] > 1
    return lambda b, h, i, j: factor[b if samples else 0, 0, i if queries else 0, 0]


def _table(term: Table) -> Pair:
    def padded() -> tuple[Tensor, ...]:
        both = zip(term.linear(), (term.q, term.k), strict=True)
        return tuple(F.pad(linear, (at.prefix, 0)).int() for linear, at in both)  # (B|1, P + N)

    key = ("linear", None if term.k is term.q else term.k, term.table.shape[1:])
    u, w = term.q.memoize(key, padded)
    flat, prefix, p, r = term.table.flatten(1), term.prefix, term.q.prefix, term.k.prefix
    q_samples, k_samples = u.shape[0] > 1, w.shape[0] > 1

    def pair(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        index = u[b if q_samples else 0, i] - w[b if k_samples else 0, j]
        if not (p or r):
            return flat[h, index]
        placed = (i >= p) & (j >= r)
        found = flat[h, torch.where(placed, index, 0)]
        if prefix is None:
            return torch.where(placed, found, 0.0)
        return torch.where(placed, found, prefix[h, torch.where(i < p, torch.where(j < r, 2, 0), 1)])

    return pair


def _low_rank(term: LowRank) -> Pair:
    fq, fk = term
    q_samples, q_heads, k_samples, k_heads = (size > 1 for size in (*fq.shape[:2], *fk.shape[:2]))

    def pair(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        of_query, of_key = ((b if q_samples else 0, h if q_heads else 0), (b if k_samples else 0, h if k_heads else 0))
        return _sum([fq[*of_query, i, r] * fk[*of_key, j, r] for r in range(fq.shape[-1])])

    return pair


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _distance(term: Distance) -> Pair:
    x, y = (F.pad(at.coords, (0, 0, at.prefix, 0)) for at in (term.q, term.k))  # (B|1, P + N, d)
    slopes, limits, directions = _constants(term)
    slopes = slopes * term.factor  # here, so that blocks that differ in it share a program
    unseen = slopes.new_full((), UNSEEN) * term.factor
    axes, p, r, directed = term.q.axes, term.q.prefix, term.k.prefix, bool(term.directions)
    q_samples, k_samples, each, rate = x.shape[0] > 1, y.shape[0] > 1, slopes.ndim == 2, term.rate

    def pair(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        steps = [y[b if k_samples else 0, j, axis] - x[b if q_samples else 0, i, axis] for axis in range(axes)]
        if each:
            steps = [step * slopes[h, axis] for axis, step in enumerate(steps)]
        far = _length(steps, term.kind, learned=each)
        if rate is not None:
            far = (1 + far * rate[h]).log() if term.bend == "log" else far ** rate[h]
        bias = -far if each else -slopes[h] * far
        if directed:
            ahead = _sum([step * directions[h, axis] for axis, step in enumerate(steps)])
            bias = torch.where(ahead >= far * limits[h] - 1e-4, bias, unseen)
        return torch.where((i >= p) & (j >= r), bias, 0.0) if p or r else bias

    return pair


def _length(steps: list[Tensor], kind: str, learned: bool) -> Tensor:
    if len(steps) == 1 and kind != "squared":
        return steps[0].abs()
    if kind in ("euclidean", "squared"):
        square = _sum([step * step for step in steps])
        if learned:  # the root of 0 has no gradient
            square = square.clamp(min=1e-30)
        return square if kind == "squared" else square.sqrt()
    found = [step.abs() for step in steps]
    return _sum(found) if kind == "manhattan" else reduce(torch.maximum, found)


def _constants(term: Distance) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes (H,), or (H, d) that are learned, limits (H,) and directions (H, d), float32; a head that sees everything
    has the limit -2."""
    if isinstance(given := term.slopes, Tensor):  # which come without directions
        return given, given, given
    wide, axes = len(given) - len(term.directions), term.q.axes
    limits = [term.limit] * len(term.directions) + [-2.0] * wide
    along = [*term.directions, *[(0.0,) * axes] * wide]
    each = [*given, *limits, *(x for direction in along for x in direction)] if term.directions else given

    def made() -> tuple[Tensor, Tensor, Tensor]:
        one = numbers(each, term.q.coords.device).to(term.q.coords.device, torch.float32)
        slopes, limits_, directions = one.tensor_split((len(given), 2 * len(given)))
        return slopes, limits_, directions.unflatten(0, (-1, axes))

    return term.q.memoize(("flex", given, term.directions, term.limit), made)


def serves(
    like: Tensor,
    pairs: int,
    terms: Sequence[Bias],
    *,
    widths: tuple[int, ...] = (),
    dropout: float = 0.0,
    plain: str | None = None,
) -> Selection:
    """ "flex", or "" with the reason why not, where there is one worth a word: on CUDA, with many tokens.

    Args:
        like: of the dtype and device of the queries.
        pairs: of queries and keys.
        widths: of a head's keys and values, where they are known.
        plain: why nothing but plain operations may run, or None. Programs that are compiled hold FlexAttention too.
    """
    if like.device.type not in DEVICES or pairs < PAIRS:
        return Selection("", "")
    why = _why_not(kernel_dtype(like), terms, widths, dropout, plain)
    if why is not None:
        return Selection("", why)
    return Selection("flex", f"{PAIRS:,} pairs of tokens or more: biases are computed beside the logits")


def _why_not(
    dtype: torch.dtype, terms: Sequence[Bias], widths: tuple[int, ...], dropout: float, plain: str | None
) -> str | None:
    if plain is not None and (torch.compiler.is_exporting() or not torch.compiler.is_compiling()):
        return plain
    if not all(isinstance(term, Table | LowRank | Distance) for term in terms):
        return ""  # a matrix is there already
    if trains(*tensors(terms)):
        return "it adds up gradients of a learned bias by atomic operations"
    if dropout:
        return "the weights have dropout"
    if dtype not in DTYPES:
        return f"it has no {dtype}"
    if any(width not in WIDTHS for width in widths):
        return f"heads have {' and '.join(map(str, widths))} channels"
    if not fused_kernels_allowed():
        return "other kernels are asked for, by sdpa_kernel"
    return None if TRITON else "Triton is not installed"


def tensors(terms: Iterable[Bias]) -> list[Tensor]:
    """What is learned of tables, products and distances, if anything is."""
    return [x for term in terms if isinstance(term, Table | LowRank | Distance) for x in term if isinstance(x, Tensor)]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signal: Signal,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """(B, H, Nq, Dv): as `vit2dpe.attend`, of queries and keys that are turned.

    Args:
        mask: (B|1, H|1, Nq, Nk), leaves each query a key.
        causal: tokens attend to themselves and those before them.
    """
    dtype, temperature = kernel_dtype(q), signal.temperature
    if isinstance(temperature, float | int):  # a number would be part of the program
        temperature = q.new_full((), temperature, dtype=torch.float32)
    modified = score_mod(Signal(bias=signal.bias, temperature=temperature))
    if mask is not None:
        modified = _where(modified, _entry(mask))
    if causal:
        modified = _where(modified, lambda b, h, i, j: i >= j)
    kinds = tuple(type(term).__name__ for term in signal.bias)
    kind = None if temperature is None else temperature.ndim
    program = kinds, mask is None, causal, kind, dtype, q.shape[-1], v.shape[-1], torch.is_grad_enabled()
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if torch.compiler.is_compiling() or not trains(q, k, v):
        return run(program, q, k, v, modified, scale)
    out: Tensor = _Again.apply(q, k, v, program, modified, scale)
    return out


def _where(modified: ScoreMod, allowed: Pair) -> ScoreMod:
    def masked(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(allowed(b, h, i, j), modified(score, b, h, i, j), -float("inf"))

    return masked


def run(program: Hashable, q: Tensor, k: Tensor, v: Tensor, modified: ScoreMod, scale: float | None) -> Tensor:
    """torch's FlexAttention, compiled: one program for all sizes, blocks and places, inside of a compiled model too."""
    if torch.compiler.is_compiling():
        return _call(q, k, v, modified, scale)
    return _compiled(program)(q, k, v, modified, scale)


def _call(q: Tensor, k: Tensor, v: Tensor, modified: ScoreMod, scale: float | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    out: Tensor = flex_attention(q, k, v, score_mod=modified, scale=scale)
    return out


@cache
def _compiled(program: Hashable) -> Callable[[Tensor, Tensor, Tensor, ScoreMod, float | None], Tensor]:
    """A compiled copy of `_call`, with code of its own: torch allows eight programs for one piece of code."""
    own = types.FunctionType(_call.__code__.replace(), globals())
    return torch.compile(own, backend=BACKEND, fullgraph=True)


def plainly(q: Tensor, k: Tensor, v: Tensor, modified: ScoreMod, scale: float | None) -> Tensor:
    """The same by plain operations on all pairs at once."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    b, h, i, j = (torch.arange(size, device=q.device) for size in scores.shape)
    scores = modified(scores, b[:, None, None, None], h[:, None, None], i[:, None], j)
    return scores.softmax(-1).to(v.dtype) @ v


class _Context(Protocol):
    program: Hashable
    modified: ScoreMod
    scale: float | None
    graph: tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Again(torch.autograd.Function):
    """A second backward, and gradients of gradients, which a compiled program does not allow.

    The graph of the program serves the first backward; another one begins with another forward, and one that is
    differentiated itself goes by plain operations. Where something else holds what is saved (a checkpoint), no graph
    is kept, because its saved tensors would be unpacked, and computed, apart from those of the nodes around it.
    """

    @staticmethod
    def forward(
        ctx: _Context, q: Tensor, k: Tensor, v: Tensor, program: Hashable, modified: ScoreMod, scale: float | None
    ) -> Tensor:
        ctx.program, ctx.modified, ctx.scale, ctx.graph = program, modified, scale, None
        ctx.save_for_backward(q, k, v)
        if _saved_elsewhere():
            return run(program, q, k, v, modified, scale)
        ctx.graph = _graph(ctx, q, k, v)
        return ctx.graph[1].detach()

    @staticmethod
    def backward(
        ctx: _Context, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        again = torch.is_grad_enabled()
        if again:  # somebody differentiates the gradient
            q, k, v = (x.view_as(x) for x in ctx.saved_tensors)
            inputs, out = (q, k, v), plainly(q, k, v, ctx.modified, ctx.scale)
        else:
            inputs, out = ctx.graph or _graph(ctx, *ctx.saved_tensors)
            ctx.graph = None
        needed = ctx.needs_input_grad[:3]
        asked = [x for x, ask in zip(inputs, needed, strict=True) if ask]
        found = iter(torch.autograd.grad(out, asked, gradient, create_graph=again))
        dq, dk, dv = (next(found) if ask else None for ask in needed)
        return dq, dk, dv, None, None, None


def _saved_elsewhere() -> bool:
    """Whether hooks hold what is saved for the backward: torch refuses then to be kept from calling them."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("nothing is saved here"):
            return False
    except RuntimeError:
        return True


def _graph(ctx: _Context, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Leaves and the output, with the graph between them."""
    with torch.enable_grad():
        asked = zip((q, k, v), ctx.needs_input_grad[:3], strict=True)
        q, k, v = (x.detach().requires_grad_(ask) for x, ask in asked)
        return (q, k, v), run(ctx.program, q, k, v, ctx.modified, ctx.scale)
