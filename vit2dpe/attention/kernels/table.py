"""Attention under a table of biases on a whole 2-D grid, without keeping or even building the matrix of biases.

    out = softmax(scale · q kᵀ + bias) v
    bias[h, (i, j), (m, l)] = table[h, i - m + R - 1, j - l + C - 1]

The matrix has (RC)² entries a head, the table (2R - 1)(2C - 1). Between them lies the table stretched along columns,

    stretched[h, j, r, l] = table[h, 2R - 2 - r, j - l + C - 1]      (H, C, 2R - 1, C)

of which the biases of query row i are a slice: R rows from r = R - 1 - i on, RC numbers in one run of memory.

    learned    training: the fused kernel forward; a backward a few heads at a time, which makes their matrices again
    slices     training on CUDA: torch's kernel both ways, the matrix made again for the backward, whose gradient of a
               bias, (B, H, N, N), is made for some images at a time and added up without atomic operations
    view       inference, the matrix larger than `BUDGET`: the kernel reads the stretched table, no matrix at all
    chunked    inference elsewhere above `BUDGET` (prefix tokens, subsets of a grid): some queries at a time

The plain path, a gather of the whole matrix, serves everything else, and is what these are tested against.

Legend: B batch, H heads, N tokens, Dh head width, P prefix tokens, R x C grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...positions import Positions
from ...signal import Table
from . import Selection, fused_kernels_allowed, kernel_dtype

aten = torch.ops.aten
PATHS = ("learned", "slices", "view", "chunked")
BUDGET = 32 * 2**20  # bytes of a matrix of biases in inference
CACHE = 2 * 2**20  # bytes of a workspace that stays near the processor
MATRICES = 4 * 2**20  # bytes of matrices that a backward makes at once, of several heads where they are small
SLICE = 64 * 2**20  # bytes of gradients of biases that a backward on CUDA makes at once
DEVICES = ("cuda",)  # of slices
ROW = 16  # rows of a matrix start at multiples of so many entries there, or torch would copy it


def select(term: Table, like: Tensor, training: bool, plain: str | None) -> Selection:
    """The path where queries have the dtype and device of `like`: "matrix" is the plain one, which serves everything.

    Args:
        training: whether the table, queries or keys want gradients.
        plain: why nothing but plain operations may run, or None.
    """
    if like.device.type in DEVICES and training and term.table.requires_grad:
        return _select_slices(term, like, plain)
    if plain is not None:
        return Selection("matrix", plain)
    if like.device.type != "cpu" or like.dtype == torch.float16:
        return Selection("matrix", f"{like.dtype} on {like.device.type} has no path of its own")
    if term.prefix is not None:
        return Selection("matrix", "prefix tokens have biases too")
    if training:
        if not term.table.requires_grad:
            return Selection("matrix", "training, but the table is not learned: its matrix costs the kernel nothing")
        if not _whole_grid(term):
            return Selection("matrix", "training, but queries and keys are not all places of one 2-D grid")
        return Selection("learned", "training one table on a whole grid")
    queries, keys = (at.prefix + at.coords.shape[1] for at in (term.q, term.k))
    size = term.table.shape[0] * queries * keys * like.element_size()
    if size <= BUDGET:
        return Selection("matrix", f"inference, and the matrix is not above {BUDGET >> 20} MiB")
    if _whole_grid(term) and not term.q.prefix:
        return Selection("view", f"inference, the matrix would be above {BUDGET >> 20} MiB, and the grid is whole")
    return Selection(
        "chunked", f"inference, the matrix would be above {BUDGET >> 20} MiB; prefix tokens, or not all places"
    )


def _select_slices(term: Table, like: Tensor, plain: str | None) -> Selection:
    if plain is not None and (torch.compiler.is_exporting() or not torch.compiler.is_compiling()):
        return Selection("matrix", plain)
    dtype, tokens = kernel_dtype(like), term.q.prefix + term.q.coords.shape[1]
    matrix = term.table.shape[0] * tokens**2 * dtype.itemsize
    if matrix <= MATRICES and like.shape[0] * matrix <= SLICE:
        return Selection("matrix", f"training, and its gradient of all images is not above {SLICE >> 20} MiB")
    if term.prefix is not None:
        return Selection("matrix", "prefix tokens have biases too")
    if not (term.q is term.k and term.q.whole and term.q.axes == 2):
        return Selection("matrix", "training, but queries and keys are not all places of one 2-D grid")
    if dtype == torch.float64 or not fused_kernels_allowed():
        return Selection("matrix", f"{dtype}, or kernels of attention that sdpa_kernel names")
    return Selection("slices", "training one table on a whole grid, whose matrix or its gradient is large")


def attend(q: Tensor, k: Tensor, v: Tensor, term: Table, scale: float, factor: float, path: str) -> Tensor:
    """(B, H, Nq, Dv) by the named path; `factor` multiplies the table."""
    table = term.table if factor == 1.0 else term.table * factor
    if path == "learned":
        out: Tensor = _Learned.apply(q, k, v, table, term.q.one_extent, term.q.prefix, scale)
        return out
    if path == "slices":
        dtype = kernel_dtype(q)  # and channels in multiples of 16 bytes
        q, k, padded = (F.pad(x.to(dtype), (0, -x.shape[-1] % 8)) for x in (q, k, v))
        out = _Slices.apply(q, k, padded, table, term.q.one_extent, term.q.prefix, scale)
        return out[..., : v.shape[-1]]
    with torch.no_grad():
        if path == "view":
            return _view(q, k, v, table, term.q.one_extent, scale)
        return _chunked(q, k, v, Table(table, term.q, term.k, term.prefix), scale)


def _view(q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: tuple[int, ...], scale: float) -> Tensor:
    """Heads go in as the batch and rows of queries as heads, the last row first: then all strides are positive."""
    rows, cols = grid
    stretched = _stretch(table.to(q.dtype), cols)
    head, column, row, _ = stretched.stride()
    bias = stretched.as_strided((q.shape[1], rows, cols, rows * cols), (head, row, column, 1))
    flipped = q.unflatten(2, (rows, cols)).flip(2)
    out = [
        F.scaled_dot_product_attention(
            one,
            keys.unsqueeze(1).expand(-1, rows, -1, -1),
            values.unsqueeze(1).expand(-1, rows, -1, -1),
            attn_mask=bias,
            scale=scale,
        )
        for one, keys, values in zip(flipped, k, v, strict=True)
    ]
    return torch.stack(out).flip(2).flatten(2, 3)


def _chunked(q: Tensor, k: Tensor, v: Tensor, term: Table, scale: float) -> Tensor:
    step = max(1, BUDGET // (q.shape[1] * k.shape[2] * q.element_size()))
    prefix, out = term.q.prefix, []
    for start in range(0, q.shape[2], step):
        stop = min(start + step, q.shape[2])
        index = torch.arange(max(start - prefix, 0), max(stop - prefix, 0))
        at = term.q.take(index).with_prefix(max(0, min(stop, prefix) - start))
        bias = Table(term.table, at, term.k).dense().to(q.dtype)
        out.append(F.scaled_dot_product_attention(q[:, :, start:stop], k, v, attn_mask=bias, scale=scale))
    return torch.cat(out, dim=2)


class _Context(Protocol):
    grid: tuple[int, ...]
    prefix: int
    scale: float
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None, None]


class _Learned(torch.autograd.Function):
    """Keeps q, k, v and the table, and the matrix of biases where the backward would make all of it at once anyway; a
    plain attention keeps any matrix, and the weights of every image too."""

    @staticmethod
    def forward(
        ctx: _Context,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        grid: tuple[int, ...],
        prefix: int,
        scale: float,
    ) -> Tensor:
        bias = matrix(table.to(q.dtype), grid, prefix)
        kept = q.dtype == table.dtype and bias.nbytes <= MATRICES
        ctx.save_for_backward(q, k, v, table, *([bias] if kept else []))
        ctx.grid, ctx.prefix, ctx.scale = grid, prefix, scale
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=scale)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> Gradients:
        q, k, v, table, *kept = ctx.saved_tensors
        grid, prefix, scale = ctx.grid, ctx.prefix, ctx.scale
        if torch.is_grad_enabled():  # somebody differentiates the gradient: plain operations, which remember
            return _differentiable(gradient, q, k, v, table, grid, prefix, scale)
        dq, dk, dv = (torch.empty_like(x, dtype=table.dtype) for x in (q, k, v))
        dtable, size = torch.empty_like(table), q.shape[2] ** 2 * table.element_size()
        most, several = max(1, CACHE // size), max(1, MATRICES // size)
        space = table.new_empty(2, min(most, max(q.shape[:2])), q.shape[2], q.shape[2])
        for first in range(0, q.shape[1], several):
            biases = kept[0] if kept else matrix(table[first : first + several], grid, prefix)
            totals = torch.zeros_like(biases)
            given = [x[:, first : first + several] for x in (q, k, v, gradient)]
            wanted = [x[:, first : first + several] for x in (dq, dk, dv)]
            for images, heads in _steps(q.shape[0], len(biases), most):
                step = [x[images, heads].to(table.dtype) for x in given]
                logits = _backward(biases[heads], scale, space, step, [x[images, heads] for x in wanted])
                totals[heads] += logits if isinstance(images, int) else logits.sum(0)
            dtable[first : first + several] = _fold(totals[:, prefix:, prefix:], grid)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dtable, None, None, None


class _Slices(torch.autograd.Function):
    """Keeps q, k, v, the output and the table. Dtypes of q, k, v are those of the kernel."""

    @staticmethod
    def forward(
        ctx: _Context,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        grid: tuple[int, ...],
        prefix: int,
        scale: float,
    ) -> Tensor:
        bias = matrix(table.to(q.dtype), grid, prefix, ROW).expand(q.shape[0], -1, -1, -1)
        kernel = aten._scaled_dot_product_efficient_attention.default
        out, *kept = kernel(q, k, v, bias, True, scale=scale)
        ctx.save_for_backward(q, k, v, table, out, *kept)
        ctx.grid, ctx.prefix, ctx.scale = grid, prefix, scale
        made: Tensor = out
        return made

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> Gradients:
        q, k, v, table, out, logsumexp, *seed = ctx.saved_tensors
        grid, prefix, scale = ctx.grid, ctx.prefix, ctx.scale
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable(gradient, q, k, v, table, grid, prefix, scale)
        kernel = aten._scaled_dot_product_efficient_attention_backward.default
        bias, tokens = matrix(table.to(q.dtype), grid, prefix, ROW), q.shape[2]
        total, parts = bias.new_zeros(bias.shape, dtype=table.dtype), []
        step = max(1, SLICE // (bias.numel() * bias.element_size()))
        for first in range(0, q.shape[0], step):
            given = [x[first : first + step] for x in (gradient, q, k, v)]
            each = bias.expand(given[0].shape[0], -1, -1, -1)
            found = [x[first : first + step] for x in (out, logsumexp)]
            *part, dbias = kernel(*given, each, *found, *seed, 0.0, [True] * 4, scale=scale)
            parts.append(part)
            total += dbias.sum(0, dtype=table.dtype)
            del dbias  # before the next is made
        del bias
        dq, dk, dv = (x[0] if len(parts) == 1 else torch.cat(x) for x in zip(*parts, strict=True))
        heads = max(1, SLICE // (2 * tokens**2 * table.element_size()))
        folded = [_fold_at_once(some, grid) for some in total[:, prefix:, prefix:].split(heads)]
        return dq, dk, dv, torch.cat(folded), None, None, None


def _differentiable(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grid: tuple[int, ...],
    prefix: int,
    scale: float,
) -> Gradients:
    """The gradients by plain operations, which remember."""
    at = Positions.grid(grid, q.device).with_prefix(prefix)
    asked = [x.requires_grad for x in (q, k, v, table)]
    # Views: where q was computed from the table, as behind a block that shares it, its gradient by the table
    # is that of the blocks before, which is not asked for here.
    q, k, v, table = (x.view_as(x) for x in (q, k, v, table))
    logits = scale * q @ k.transpose(-1, -2) + Table(table, at, at).dense().to(q.dtype)
    inputs = [x for x, ask in zip((q, k, v, table), asked, strict=True) if ask]
    found = iter(torch.autograd.grad(logits.softmax(-1) @ v, inputs, gradient, create_graph=True))
    dq, dk, dv, dtable = (next(found) if ask else None for ask in asked)
    return dq, dk, dv, dtable, None, None, None


def _steps(images: int, heads: int, most: int) -> Iterator[tuple[int | slice, int | slice]]:
    """Images and heads of one step, at most so many at once: all images of a head, or where they are fewer, all heads
    of an image."""
    if images < heads:
        yield from ((i, slice(j, min(j + most, heads))) for i in range(images) for j in range(0, heads, most))
    else:
        yield from ((slice(i, min(i + most, images)), j) for j in range(heads) for i in range(0, images, most))


def _backward(bias: Tensor, scale: float, space: Tensor, given: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Gradients of q, k, v are written to `wanted`, those of the logits returned, in matrices that are used again.

    Args:
        given: q, k, v and the gradient of the output, each (S, N, Dh) of S images or heads.
    """
    (q, k, v, gradient), (dq, dk, dv) = given, wanted
    p, ds = space[:, : q.shape[0]].unbind(0)
    torch.baddbmm(bias, q, k.mT, alpha=scale, out=p)
    torch.softmax(p, dim=-1, out=p)
    dv.baddbmm_(p.mT, gradient, beta=0)
    torch.bmm(gradient, v.mT, out=ds)
    # ds = p (dp - Σ p dp), in one pass; public operations take three.
    aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
    dq.baddbmm_(ds, k, beta=0, alpha=scale)
    dk.baddbmm_(ds.mT, q, beta=0, alpha=scale)
    return ds


def matrix(table: Tensor, grid: tuple[int, ...], prefix: int, row: int = 1) -> Tensor:
    """(H, P + N, P + N) biases between all places of the grid, zero for the prefix; rows at multiples of `row`."""
    rows, cols = grid
    runs = _stretch(table, cols).flatten(2)  # (H, C, (2R - 1) C)
    # The biases of one query row are R C numbers of a run; those of the last row come first.
    whole = runs.unfold(2, rows * cols, cols).transpose(1, 2).flip(1).flatten(1, 2)
    size = prefix + rows * cols
    behind = -size % row
    biases: Tensor = F.pad(whole, (prefix, behind, prefix, 0)) if prefix or behind else whole
    return biases[..., :size] if behind else biases


def _stretch(table: Tensor, cols: int) -> Tensor:
    """(H, C, 2R - 1, C), contiguous: what is above, by sliding a window along the reversed columns."""
    return table.flip(1, 2).unfold(2, cols, 1).flip(2).transpose(1, 2).contiguous()


def _fold(matrix: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(H, 2R - 1, 2C - 1) sums of matrices (H, N, N) over pairs of one offset: the transpose of `matrix`."""
    rows, cols = grid
    size, heads = rows * cols, matrix.shape[0]
    runs = matrix.new_zeros(heads, cols, (2 * rows - 1) * cols)
    for i, row in enumerate(matrix.unflatten(1, (rows, cols)).unbind(1)):
        runs.narrow(2, (rows - 1 - i) * cols, size).add_(row)
    return _fold_columns(runs.unflatten(2, (-1, cols)))


def _fold_at_once(matrix: Tensor, grid: tuple[int, ...]) -> Tensor:
    """`_fold` in a few operations on twice the memory. Rows are written askew, that of query row i moved by R - 1 - i:
    those of one offset lie below each other."""
    rows, cols = grid
    pairs = matrix.unflatten(2, (rows, cols)).unflatten(1, (rows, cols))  # (H, R, C, R, C)
    skewed = matrix.new_zeros(matrix.shape[0], rows, cols, 2 * rows - 1, cols)
    head, row, column, along, _ = skewed.stride()
    skewed.as_strided(pairs.shape, (head, row - along, column, along, 1), (rows - 1) * along).copy_(pairs)
    return _fold_columns(skewed.sum(1))


def _fold_columns(runs: Tensor) -> Tensor:
    """(H, C, 2R - 1, C) sums over rows -> (H, 2R - 1, 2C - 1)."""
    heads, cols, offsets, _ = runs.shape
    # Columns are written askew, that of query column j moved by C - 1 - j: those of one offset lie below each other.
    skewed = runs.new_zeros(heads, cols, offsets, 2 * cols - 1)
    head, column, row, _ = skewed.stride()
    skewed.as_strided(runs.shape, (head, column - 1, row, 1), cols - 1).copy_(runs)
    folded: Tensor = skewed.sum(1).flip(1, 2)
    return folded


def _whole_grid(term: Table) -> bool:
    """Queries and keys are all places of one 2-D grid, row by row."""
    at = term.q
    if isinstance(extent := at.extent, Tensor):
        return False
    if at is not term.k or at.axes != 2 or at.coords.shape[:2] != (1, extent[0] * extent[1]):
        return False
    return at.memoize("whole grid", lambda: bool(torch.equal(at.coords, Positions.grid(extent).coords)))
