"""The one attention of the project: rotate, merge bias and mask, call the fused kernel.

Encoding-blind: what an encoding asks for arrives as a `Signal`. Pairs of channels are (2i, 2i+1) everywhere.

Legend: B batch, H heads, Nq, Nk tokens, Dh head width. True in a mask means "may attend".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..signal import Bias, LowRank, Rotation, Signal
from . import dispatch
from .kernels import table as kernels
from .kernels.choice import Selection
from .kernels.rotary import split_and_rotate

# Called with (q, k, signal, mask, scale) of every `attend` while attention maps are recorded; else there is none.
watcher: Callable[..., None] | None = None


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
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


class FullMask(NamedTuple):
    """A boolean mask whose maker knows that every query may attend to something; `attend` need not look."""

    mask: Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signal: Signal = Signal(),  # noqa: B008 - an immutable tuple
    mask: Tensor | FullMask | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(temperature · (scale · R(q) R(k)ᵀ + bias), over keys the mask allows) v.

    Args:
        q, k, v: (B, H, Nq, Dh), (B, H, Nk, Dh), (B, H, Nk, Dv). Never altered.
        signal: rotations, bias terms and temperature; its `token` is the model's business.
        mask: boolean, (Nq, Nk) or (B|1, H|1, Nq, Nk); True may attend. A query that may attend to
            nothing gives 0; under a `FullMask` there is none, and nothing is promised if there is.
        scale: factor on q·k; default 1/sqrt(Dh).
        dropout: probability, on the attention weights.

    Returns:
        (B, H, Nq, Dv) in v's dtype.

    Raises:
        ValueError: for a mask of another kind, or rotations of other sizes than q and k.
    """
    known = isinstance(mask, FullMask)
    mask = mask.mask if isinstance(mask, FullMask) else mask
    if mask is not None and (mask.dtype != torch.bool or mask.ndim not in (2, 4)):
        raise ValueError(
            f"a mask is boolean, True where a query may attend, (Nq, Nk) or (B, 1|H, Nq, Nk); got {mask.dtype} "
            f"{tuple(mask.shape)}. Biases go into a Signal"
        )
    if watcher is not None:
        watcher(q, k, signal, mask, scale)
    if signal.q_rotation is not None:
        dispatch.tell("rotation", Selection("functional", "queries that come from a map of their own"))
        q = rotate(q, signal.q_rotation)
    if signal.k_rotation is not None:
        k = rotate(k, signal.k_rotation)
    temperature = 1.0 if signal.temperature is None else signal.temperature
    factor: float | Tensor = (q.shape[-1] ** -0.5 if scale is None else scale) * temperature

    alive = None
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if not known:
            # A row that sees nothing is opened, then zeroed: the softmax of an empty row is nobody's promise.
            alive = mask.any(dim=-1, keepdim=True)
            mask = mask | ~alive
    width, terms = v.shape[-1], list(signal.bias)
    products = [term for term in terms if isinstance(term, LowRank)]
    appended = bool(products) and dispatch.kernel_dtype(q) in (torch.float32, torch.float64)
    if appended:
        q, k, v = _append_channels(q, k, v, products, factor, temperature)
        terms, factor = [term for term in terms if not isinstance(term, LowRank)], 1.0
    traced = isinstance(factor, Tensor) or isinstance(temperature, Tensor)
    path, _ = dispatch.tell("bias", dispatch.bias(q, k, terms, mask, dropout, traced, appended))
    if path in kernels.PATHS:
        return kernels.attend(q, k, v, terms[0], factor, temperature, path)  # type: ignore[arg-type]
    if isinstance(factor, Tensor) or isinstance(temperature, Tensor):  # the kernel takes a number
        q, factor = q * factor, 1.0
    added = _merge(terms, mask, temperature, dispatch.kernel_dtype(q))
    if dispatch.told is not None:
        dispatch.tell("kernel", dispatch.kernel(q, k, v, added, dropout, factor))
    with dispatch.allowed_kernels(added, q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout, scale=factor)
    out = out if out.shape[-1] == width else out[..., :width]
    return out if alive is None else out.masked_fill(~alive, 0.0)


def _append_channels(
    q: Tensor, k: Tensor, v: Tensor, products: list[LowRank], scale: float | Tensor, temperature: float | Tensor
):
    """A bias that is a product becomes channels: [t fq, scale q] · [fk, k] = t fq·fk + scale q·k. No matrix is built.

    They come first: near neighbours' squares of places cancel before the small products of contents are added.
    In half precision the squares of places cancel too coarsely (1 to 4 logits on a 64x64 grid); there the bias is
    dense. v is filled up with zeros, because the fused kernel of the CPU wants one width.
    """
    fq = torch.cat([term.fq.expand(*q.shape[:2], -1, -1) for term in products], dim=-1).to(q.dtype)
    fk = torch.cat([term.fk.expand(*k.shape[:2], -1, -1) for term in products], dim=-1).to(k.dtype)
    q, k = torch.cat([fq * temperature, q * scale], dim=-1), torch.cat([fk, k], dim=-1)
    return q, k, F.pad(v, (0, k.shape[-1] - v.shape[-1])) if k.shape[-1] > v.shape[-1] else v


def _merge(terms: list[Bias], mask: Tensor | None, temperature: float | Tensor, dtype: torch.dtype) -> Tensor | None:
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
    # A tensor that asks for gradients loses the fused kernel on the CPU, even where gradients are off.
    return bias if torch.is_grad_enabled() else bias.detach()


def split_heads(
    qkv: Tensor, signal: Signal, heads: int, private: bool = False
) -> tuple[Tensor, Tensor, Tensor, Signal]:
    """q, k, v (B, H, N, Dh), strided views of the packed projection, and what of the signal is still to be done.

    Args:
        qkv: (B, N, 3 D).
        private: nobody else needs the values of `qkv`. In eager mode q and k are then rotated where they lie.
    """
    turn = signal.q_rotation
    path, _ = dispatch.tell("rotation", dispatch.rotation(qkv, signal, private))
    if path == "in place" and turn is not None:
        q, k, v = split_and_rotate(qkv, turn, heads)
        return q, k, v, signal._replace(q_rotation=None, k_rotation=None)
    # Unbinding before the transposition makes the backward one stack, whose result is the packed gradient.
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2))
    return q, k, v, signal
