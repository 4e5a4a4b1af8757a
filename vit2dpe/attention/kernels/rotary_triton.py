"""The operations of `rotary` in Triton, which this module imports: import it where a tensor on CUDA is at hand.

    forward     packed[b, n, 0|1, h] turned where it lies; one launch
    backward    dq, dk turned back and dv copied into one packed gradient; one launch
    learned     the same launch adds up, and a second one completes, the gradient to cosine and sine

A program has `rows` tokens of one head of one image as a tile (rows, 2 pairs): memory is read and written in whole
runs, and pairs (2j, 2j+1) are taken apart in registers. It computes in the table's dtype and rounds once. Products and
sums are not fused, so that the numbers are those of the plain path to the bit.

Legend: B images, N tokens, H heads, Dh head width; turn complex (B|1, 1|H, N, Dh/2); dq, dk, dv, q, k (B, H, N, Dh).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers of a tile: 16 of each thread of 4 warps, in two runs of 16 bytes in half precision
PROGRAMS = 512  # at least so many share the sum over images, where there are images: a few for each multiprocessor


@triton.jit
def _pairs(tile, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """(rows, 2 pairs) -> the first and the second numbers of its pairs, (rows, pairs) each."""
    return tl.split(tl.reshape(tile, (ROWS, PAIRS, 2)))


@triton.jit
def _turned(tile, cos, sin, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """(a cos - b sin, a sin + b cos), in the dtype of the tile."""
    a, b = _pairs(tile.to(cos.dtype), ROWS, PAIRS)
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (ROWS, 2 * PAIRS)).to(tile.dtype)


@triton.jit
def forward_kernel(
    packed, turn, tokens, heads, width, image_step, token_step, part_step, head_step, turn_image, turn_head, turn_token,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    n, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, 2 * PAIRS)[None, :]
    inside = (n < tokens) & (c < width)
    table = tl.load(turn + b * turn_image + h * turn_head + n * turn_token + c, mask=inside, other=0.0)
    cos, sin = _pairs(table, ROWS, PAIRS)
    for part in tl.static_range(2):
        at = packed + b * image_step + n * token_step + part * part_step + h * head_step + c
        tl.store(at, _turned(tl.load(at, mask=inside, other=0.0), cos, sin, ROWS, PAIRS), mask=inside)


@triton.jit
def backward_kernel(
    dq, dk, dv, q, k, turn, packed, angle, tokens, heads, width, members, splits, turn_heads,
    dq_image, dq_head, dq_token, dk_image, dk_head, dk_token, dv_image, dv_head, dv_token,
    image_step, head_step, token_step, turn_image, turn_head, turn_token,
    LEARNED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A program serves one row of the table and every `splits`-th of the images and heads that share it."""
    row, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    turn_b, turn_h, sharing = (row // turn_heads).to(tl.int64), row % turn_heads, heads // turn_heads
    n, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, 2 * PAIRS)[None, :]
    inside = (n < tokens) & (c < width)
    table = tl.load(turn + turn_b * turn_image + turn_h * turn_head + n * turn_token + c, mask=inside, other=0.0)
    cos, sin = _pairs(table, ROWS, PAIRS)
    total = tl.zeros_like(cos)
    for member in range(split, members, splits):
        b, h = turn_b + member // sharing, turn_h + member % sharing
        out = packed + ((b * tokens + n) * 3 * heads + h) * width + c  # (B, N, 3, H, Dh)
        gradient = tl.load(dq + b * dq_image + h * dq_head + n * dq_token + c, mask=inside, other=0.0)
        tl.store(out, _turned(gradient, cos, -sin, ROWS, PAIRS), mask=inside)
        if LEARNED:
            turned = tl.load(q + b * image_step + h * head_step + n * token_step + c, mask=inside, other=0.0)
            total += _moment(turned, gradient, cos, ROWS, PAIRS)
        gradient = tl.load(dk + b * dk_image + h * dk_head + n * dk_token + c, mask=inside, other=0.0)
        tl.store(out + heads * width, _turned(gradient, cos, -sin, ROWS, PAIRS), mask=inside)
        if LEARNED:
            turned = tl.load(k + b * image_step + h * head_step + n * token_step + c, mask=inside, other=0.0)
            total += _moment(turned, gradient, cos, ROWS, PAIRS)
        gradient = tl.load(dv + b * dv_image + h * dv_head + n * dv_token + c, mask=inside, other=0.0)
        tl.store(out + 2 * heads * width, gradient, mask=inside)
    if LEARNED:
        j = tl.arange(0, PAIRS)[None, :]
        rows = tl.num_programs(0) // splits
        at = ((split.to(tl.int64) * rows + row) * tokens + n) * (width // 2) + j  # (splits, rows, N, Dh/2)
        tl.store(angle + at, total, mask=(n < tokens) & (2 * j < width))


@triton.jit
def _moment(turned, gradient, like, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """(rows, pairs) gradient to the angle: Im(g · conj(R x))."""
    a, b = _pairs(turned.to(like.dtype), ROWS, PAIRS)
    da, db = _pairs(gradient.to(like.dtype), ROWS, PAIRS)
    return a * db - b * da


@triton.jit
def fold_kernel(angle, turn, out, count, splits, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """The sum over splits, along the circle: (-sin, cos) dθ for each of `count` angles."""
    i, s = tl.program_id(0) * SIZE + tl.arange(0, SIZE), tl.arange(0, SPLITS)[:, None]
    inside = i < count
    total = tl.zeros((SIZE,), turn.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        at = angle + (first + s).to(tl.int64) * count + i[None, :]
        total += tl.sum(tl.load(at, mask=(first + s < splits) & inside[None, :], other=0.0), axis=0)
    cos = tl.load(turn + 2 * i, mask=inside, other=0.0)
    sin = tl.load(turn + 2 * i + 1, mask=inside, other=0.0)
    tl.store(out + 2 * i, -sin * total, mask=inside)
    tl.store(out + 2 * i + 1, cos * total, mask=inside)


def rotate_packed(packed: Tensor, turn: Tensor) -> None:
    """q and k of packed (B, N, 3, H, Dh), contiguous, are turned where they lie."""
    images, tokens, _, heads, width = packed.shape
    if packed.numel() == 0:
        return
    rows, pairs = _tile(tokens, width)
    table = _table(turn).expand(images, heads, tokens, width)
    with torch.cuda.device_of(packed):
        forward_kernel[images * heads, triton.cdiv(tokens, rows)](
            packed, table, tokens, heads, width, *packed.stride()[:4], *table.stride()[:3], rows, pairs,
            enable_fp_fusion=False,
        )  # fmt: skip


def packed_gradient(dq: Tensor, dk: Tensor, dv: Tensor, turn: Tensor) -> Tensor:
    """(B, N, 3, H, Dh): gradients of q and k turned back, and that of v."""
    return _gradient(dq, dk, dv, _table(turn))[0]


def learned_gradient(dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the gradient to `turn`; q and k after the rotation, two views of one layout."""
    table = _table(turn)
    packed, angle = _gradient(dq, dk, dv, table, (q, k))
    if angle is None:  # no images
        return packed, torch.zeros_like(turn)
    dturn = torch.empty(turn.shape, dtype=turn.dtype, device=turn.device)
    splits, count = len(angle), angle[0].numel()
    with torch.cuda.device_of(packed):
        fold_kernel[(triton.cdiv(count, 64),)](
            angle, table.contiguous(), torch.view_as_real(dturn), count, splits, 16, 64, enable_fp_fusion=False
        )
    return packed, dturn


def _gradient(
    dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor, turned: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The packed gradient, and with q and k parts (S, B|1, 1|H, N, Dh/2) of the gradient to the angles."""
    images, heads, tokens, width = dq.shape
    packed = dq.new_empty(images, tokens, 3, heads, width)
    if packed.numel() == 0:
        return packed, None
    dq, dk, dv = (_rows(x) for x in (dq, dk, dv))
    q, k = (dq, dq) if turned is None else turned
    rows, pairs = _tile(tokens, width)
    shared, steps = table.shape[0] * table.shape[1], triton.cdiv(tokens, rows)
    members = images * heads // shared
    splits = members if turned is None else min(members, triton.cdiv(PROGRAMS, shared * steps))
    angle = None if turned is None else table.new_empty(splits, *table.shape[:3], width // 2)
    strides = [step for x in (dq, dk, dv, q, table) for step in x.stride()[:3]]
    with torch.cuda.device_of(packed):
        backward_kernel[shared * splits, steps](
            dq, dk, dv, q, k, table, packed, table if angle is None else angle, tokens, heads, width, members, splits,
            table.shape[1], *strides, turned is not None, rows, pairs, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, angle


def _tile(tokens: int, width: int) -> tuple[int, int]:
    """Tokens and pairs of a tile, powers of two: the width rounded up, tokens as many as fit, or as there are."""
    pairs = triton.next_power_of_2(width) // 2
    return max(1, min(TILE // (2 * pairs), triton.next_power_of_2(tokens))), pairs


def _table(turn: Tensor) -> Tensor:
    """(B|1, 1|H, N, Dh) cosine and sine in turns."""
    return _rows(torch.view_as_real(turn).flatten(-2))


def _rows(x: Tensor) -> Tensor:
    """With the numbers of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
