"""The one attention of the project: rotate, merge bias and mask, call the fused kernel.

Encoding-blind: the effect of an encoding arrives as a `Signal`. Pairs of channels are (2i, 2i+1) everywhere.

Legend: B batch, H heads, Nq, Nk tokens, Dh head width. True in a mask means "may attend".
"""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..packed import Grouped
from ..positions import is_tracing
from ..segments import Segments
from ..signal import Bias, Dense, Distance, LowRank, Rotation, Signal, Table
from .contract import contract
from .dispatch import allowed_kernels, select_bias, select_mask, select_segments
from .kernels import Selection, flex, kernel_dtype, rotary, table, trains, varlen
from .masks import Causal as Causal
from .masks import FullMask as FullMask
from .segments import attend as attend_segments


class Observer(Protocol):
    """Receives what each attention of the thread or task is given, and which implementations are used."""

    def attended(
        self, q: Tensor, k: Tensor, signal: Signal, mask: Tensor | Segments | None, scale: float | None
    ) -> None: ...

    def selected(self, what: str, selection: Selection) -> None:
        """`what` is "rotation", "bias" or "mask"; of several selections in one attention the first counts."""
        ...

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, dropout: float, scale: float, causal: bool
    ) -> None:
        """The arguments of torch's fused attention, before it is called."""
        ...


# Set by `observe.py` for the thread or task that looks into a model. Not read while compiling.
OBSERVER: ContextVar[Observer | None] = ContextVar("vit2dpe.attention.observer", default=None)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (2i, 2i+1) of x (B, H, N, Dh) by its angle; computed in float32 at least, returned in x's dtype.

    (a, b) -> (a cos - b sin, a sin + b cos), RoPE (arXiv 2104.09864) in its interleaved form.
    """
    cos, sin = rotation
    if cos.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"rotations are float32 or float64, got {cos.dtype}: something cast the Signal on its way "
            "(FSDP's cast_forward_inputs?); cast the activations alone"
        )
    if x.shape[-1] != 2 * cos.shape[-1] or x.shape[-2] != cos.shape[-2]:
        raise ValueError(
            f"the rotation is for {cos.shape[-2]} tokens of {2 * cos.shape[-1]} channels, "
            f"got {x.shape[-2]} tokens of {x.shape[-1]}"
        )
    # Whole rows beside their neighbours in each pair, not halves that are put together again: a compiler then reads and
    # writes each row once, and takes cosine and sine once for all heads, samples and blocks.
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    other = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    cos, sin = torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)
    turned: Tensor = (wide * cos + other * sin).to(x.dtype)
    return turned


def without_rotation(signal: Signal, q_rotation: Rotation | None = None) -> Signal:
    """The Signal for keys that are turned already, and for queries that are too unless `q_rotation` is given."""
    return Signal(signal.token, q_rotation, None, signal.bias, signal.temperature, signal.blocks, signal.order)


def rotate_qk(q: Tensor, k: Tensor, signal: Signal, keys: bool = True) -> tuple[Tensor, Tensor, Signal]:
    """Queries (B, H, Nq, Dh) and keys (B, H, Nk, Dh) turned by the signal's rotations, and the signal without them.

    Contextual biases are contracted before, with q and, where these are all `keys`, with k.
    """
    if signal.bias:
        signal = contract(signal, q, k if keys else None)
    if signal.q_rotation is None and signal.k_rotation is None:
        return q, k, signal
    if (observer := _observer()) is not None:
        observer.selected("rotation", Selection("functional", "queries and keys have projections of their own"))
    if signal.q_rotation is not None:
        q = rotate(q, signal.q_rotation)
    if signal.k_rotation is not None:
        k = rotate(k, signal.k_rotation)
    return q, k, without_rotation(signal)


def split_heads(
    qkv: Tensor, signal: Signal, heads: int, private: bool = False
) -> tuple[Tensor, Tensor, Tensor, Signal]:
    """q, k, v (B, H, N, Dh), strided views of the packed projection, and the signal: without its
    rotations where they are applied already.

    Args:
        qkv: (B, N, 3 D).
        private: nobody else needs the values of `qkv`. In eager mode q and k are then rotated where they lie.
    """
    rotation, observer = signal.q_rotation, _observer()
    selection = rotary.select(qkv, signal, private, why_plain(qkv) if private else None)
    if observer is not None:
        observer.selected("rotation", selection)
    if selection.path in rotary.PATHS and rotation is not None:
        q, k, v = rotary.split_and_rotate(qkv, rotation, heads, selection.path)
        return q, k, v, without_rotation(signal)
    # Unbinding before the transposition makes the backward one stack, whose result is the packed gradient.
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2))  # (B, H, N, Dh)
    return q, k, v, signal


Mask = Tensor | FullMask | Causal | Segments


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signal: Signal = Signal(),  # noqa: B008 - an immutable tuple
    mask: Mask | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(temperature · (scale · R(q) R(k)ᵀ + bias), over keys the mask allows) v.

    Args:
        q, k, v: (B, H, Nq, Dh), (B, H, Nk, Dh), (B, H, Nk, Dv). Never altered.
        signal: rotations, bias terms and temperature; its `token` is the model's business.
        mask: boolean, (Nq, Nk) or (B|1, H|1, Nq, Nk); True may attend. A query that may attend to
            nothing gives 0; under a `FullMask` there is none, and nothing is promised if there is. Or `Causal`; or
            `Segments`, under which tokens attend within their own segment of a packed row, and no (N, N) is made.
        scale: factor on q·k; default 1/sqrt(Dh).
        dropout: probability, on the attention weights.

    Returns:
        (B, H, Nq, Dv) in v's dtype.

    Raises:
        ValueError: for a mask of another kind or size, or rotations of other sizes than q and k.
    """
    if signal.blocks:
        raise ValueError("this Signal has parts of blocks: give each block `signal.of_block(i)`")
    observer = _observer()
    if observer is not None:
        given = mask.mask if isinstance(mask, FullMask) else mask.matrix() if isinstance(mask, Causal) else mask
        observer.attended(q, k, signal, given, scale)
    if not isinstance(mask, Segments):
        return _attend(q, k, v, signal, mask, scale, dropout)
    if observer is not None:
        observer.selected("mask", select_segments(mask))
    if varlen.serves(q, v, signal, mask, dropout, why_plain(q)):
        q, k, signal = rotate_qk(q, k, signal)
        factor = (q.shape[-1] ** -0.5 if scale is None else scale) * (signal.temperature or 1.0)
        return varlen.attend(q, k, v, mask, float(factor))
    return attend_segments(_attend, q, k, v, signal, mask, scale, dropout)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signal: Signal,
    mask: Tensor | FullMask | Causal | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """`attend` in one row of each sample."""
    order, full = mask if isinstance(mask, Causal) else None, not isinstance(mask, Tensor)
    mask = mask.mask if isinstance(mask, FullMask) else None if isinstance(mask, Causal) else mask
    if mask is not None and (mask.dtype != torch.bool or mask.ndim not in (2, 4)):
        raise ValueError(
            f"a mask is boolean, True where a query may attend, (Nq, Nk) or (B, 1|H, Nq, Nk); got {mask.dtype} "
            f"{tuple(mask.shape)}. Biases go into a Signal"
        )
    if order is not None and not order.tokens() == q.shape[-2] == k.shape[-2]:
        raise ValueError(
            f"Causal is for {order.tokens()} tokens, queries and keys alike, got {q.shape[-2]} queries and "
            f"{k.shape[-2]} keys"
        )
    observer = _observer()
    q, k, signal = rotate_qk(q, k, signal)
    temperature = 1.0 if signal.temperature is None else signal.temperature
    factor: float | Tensor = (q.shape[-1] ** -0.5 if scale is None else scale) * temperature

    alive = None
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)  # (B|1, H|1, Nq, Nk)
        if not full:
            # An empty row is opened, then zeroed: torch does not define the softmax of an empty row.
            alive = mask.any(dim=-1, keepdim=True)
            mask = mask | ~alive
    width, terms = v.shape[-1], list(signal.bias)
    if terms:
        products = [term for term in terms if isinstance(term, LowRank)]
        appended, plain = bool(products) and kernel_dtype(q) in (torch.float32, torch.float64), why_plain(q)
        beside = Selection("", "")
        if not (appended and len(products) == len(terms)):
            pairs, widths = q.shape[2] * k.shape[2], (q.shape[3], width)
            beside = flex.serves(q, pairs, terms, widths=widths, dropout=dropout, plain=plain)
        if beside.path and observer is None:
            out = flex.attend(q, k, v, signal, mask, scale, causal=order is not None)
            return out if alive is None else out.masked_fill(~alive, 0.0)
        if beside.path and observer is not None:  # while somebody looks on, nothing compiled runs
            observer.selected("bias", beside)
            observer = None
        if appended:
            q, k, v = _append_channels(q, k, v, products, factor, temperature)
            terms, factor = [term for term in terms if not isinstance(term, LowRank)], 1.0
        if terms and order is not None:  # no kernel takes both
            mask, order = order.matrix(), None
        traced = isinstance(factor, Tensor) or isinstance(temperature, Tensor)
        selection = select_bias(q, k, terms, mask, dropout, traced, appended, plain)
        if observer is not None:
            observer.selected("bias", Selection(selection.path, with_reason(selection.why, beside)))
        if selection.path in table.PATHS and isinstance(term := terms[0], Table):
            out = table.attend(q, k, v, term, float(factor), float(temperature), selection.path)
            return out if out.shape[-1] == width else out[..., :width]
    if isinstance(factor, Tensor) or isinstance(temperature, Tensor):  # the kernel takes a number
        q, factor = (q * factor).to(q.dtype), 1.0  # one of each sample or token could widen it
    added = merge_bias(terms, mask, temperature, kernel_dtype(q) if terms else q.dtype)  # (B|1, H|1, Nq, Nk)
    causal = order is not None
    if observer is not None:
        observer.selected("mask", select_mask(causal, mask))
        observer.fused(q, k, v, added, dropout, factor, causal)
    with nullcontext() if added is None else allowed_kernels(added, q, k, v):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=added, dropout_p=dropout, is_causal=causal, scale=factor
        )
    out = out if out.shape[-1] == width else out[..., :width]  # (B, H, Nq, Dv)
    return out if alive is None else out.masked_fill(~alive, 0.0)


def merge_heads(out: Tensor) -> Tensor:
    """(B, H, N, Dh) -> (B, N, H Dh).

    In a program that is exported with gradients on, the copy is an operation of its own: torch's fused attention
    returns other strides there than where ONNX takes it to pieces, and a view made for these does not fit those.
    """
    out = out.transpose(1, 2)
    if torch.compiler.is_exporting() and torch.is_grad_enabled():
        out = out.clone(memory_format=torch.contiguous_format)
    return out.flatten(2)


def _append_channels(
    q: Tensor, k: Tensor, v: Tensor, products: list[LowRank], scale: float | Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A bias that is a product becomes channels: [t fq, scale q] · [fk, k] = t fq·fk + scale q·k. No matrix is built.

    They come first: near neighbours' squares of places cancel before the small products of contents are added.
    In half precision the squares of places cancel too coarsely (1 to 4 logits on a 64x64 grid); there the bias is
    dense. v is filled up with zeros, because the fused kernel of the CPU wants one width.
    """
    fq = torch.cat([term.fq.expand(*q.shape[:2], -1, -1) for term in products], dim=-1).to(q.dtype)
    fk = torch.cat([term.fk.expand(*k.shape[:2], -1, -1) for term in products], dim=-1).to(k.dtype)
    if q.device.type == "cuda" and (odd := (fq.shape[-1] + q.shape[-1]) % 8):  # others lose the fused kernel
        fq, fk = F.pad(fq, (0, 8 - odd)), F.pad(fk, (0, 8 - odd))
    q, k = torch.cat([fq * temperature, q * scale], dim=-1).to(q.dtype), torch.cat([fk, k], dim=-1)
    return q, k, F.pad(v, (0, k.shape[-1] - v.shape[-1])) if k.shape[-1] > v.shape[-1] else v


def merge_bias(
    terms: list[Bias], mask: Tensor | None, temperature: float | Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Bias terms and mask as the one tensor the kernel takes: 4-D, never expanded to the batch."""
    if not terms:
        return mask
    bias = terms[0].dense()
    for term in terms[1:]:
        bias = bias + term.dense()
    if isinstance(temperature, Tensor) or temperature != 1.0:
        bias = bias * temperature
    if mask is not None:
        # A sum, because `where` takes 5 to 15 times as long on the CPU. Biases are finite or -inf.
        bias = bias + torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, float("-inf"))
    if dtype == torch.float16:
        # float16 ends at 65,504. Moving a row changes no softmax, so its largest entry becomes 0, and what then
        # falls below the limit weighs nothing anyway.
        top = bias.detach().amax(dim=-1, keepdim=True)
        bias = bias - top.masked_fill(top.isneginf(), 0.0)
    bias = bias.to(dtype)
    # A tensor that requires gradients loses the fused kernel on the CPU, even where gradients are off. A traced graph
    # is the same with gradients and without, which torch's check of it compares.
    return bias if torch.is_grad_enabled() or is_tracing() else bias.detach()


def materialize_shared_bias(signal: Signal, x: Tensor) -> Signal:
    """The Signal that all blocks share, with each matrix of biases that every block would make made once.

    A table or a formula stays what it is where a kernel serves it.

    Args:
        x: the tokens, for their dtype and device.
    """
    if signal.blocks:
        blocks = tuple([materialize_shared_bias(block, x) for block in signal.blocks])
        signal = signal.with_blocks(blocks, signal.order)
    plain = why_plain(x)
    pairs = [_pairs(term) for term in signal.bias if isinstance(term, Table | Distance)]
    beside = flex.serves(x, max(pairs), signal.bias, plain=plain) if pairs else Selection("", "")
    if beside.path:
        return signal
    terms: list[Bias] = []
    for term in signal.bias:
        if isinstance(term, Table):
            path, why = table.select(term, x, trains(term.table, x), plain)
            reason = f"{with_reason(why, beside)}; looked up once for all blocks"
            terms.append(Dense(term.dense(), reason) if path == "matrix" else term)
        elif isinstance(term, Distance):
            terms.append(Dense(term.dense(), with_reason("a formula", beside) if beside.why else ""))
        elif isinstance(term, Grouped):
            each = tuple([materialize_shared_bias(one, x) for one in term.signals])
            terms.append(Grouped(each, term.segments))
        else:
            terms.append(term)
    return signal.with_bias(tuple(terms))


def with_reason(why: str, beside: Selection) -> str:
    """The reason of a path, and why FlexAttention does not serve where it might."""
    return f"{why}; no FlexAttention: {beside.why}" if beside.why else why


def _pairs(term: Table | Distance) -> int:
    """How many pairs of queries and keys there are, prefix tokens included."""
    queries, keys = (at.prefix + at.coords.shape[1] for at in (term.q, term.k))
    return queries * keys


def why_plain(x: Tensor) -> str | None:
    """Why nothing but plain operations may run on x; None where kernels of our own may."""
    if torch.compiler.is_compiling():
        return "compiling or exporting"
    if is_tracing():
        return "tracing"
    if type(x) is not Tensor:
        return f"a tensor of another kind, {type(x).__name__}"
    # No public function says that a transform of torch.func runs. Kernels that write over their input cannot have a
    # rule of their own for vmap and jvp, whose outputs would have to be views of one another.
    if torch._C._functorch.maybe_current_level() is not None or forward_ad.unpack_dual(x).tangent is not None:
        return "function transforms"
    return None


def _observer() -> Observer | None:
    return None if torch.compiler.is_compiling() else OBSERVER.get()
