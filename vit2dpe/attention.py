"""The one attention of the project: rotate, merge bias and mask, call the fused kernel.

Encoding-blind: what an encoding asks for arrives as a `Signal`. Pairs of channels are (2i, 2i+1) everywhere.

Legend: B batch, H heads, Nq, Nk tokens, Dh head width. True in a mask means "may attend".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import paths
from .cache import LayerCache
from .errors import ConfigError, unknown
from .kernels import table as kernels
from .kernels.choice import Choice
from .kernels.rotary import split_and_rotate
from .paths import explain
from .signal import Bias, LowRank, Rotation, Signal

_GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)

__all__ = ["Attention", "CrossAttention", "attend", "explain", "layer_norm", "rotate", "split_heads"]

# Called with (q, k, signal, mask, scale) of every `attend` while `vit2dpe.show.attention` looks; else there is none.
watcher: Callable[..., None] | None = None

layer_norm = partial(nn.LayerNorm, eps=1e-6)


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


class NoEmptyRow(NamedTuple):
    """A boolean mask whose maker knows that every query may attend to something; `attend` need not look."""

    mask: Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signal: Signal = Signal(),  # noqa: B008 - an immutable tuple
    mask: Tensor | NoEmptyRow | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(temperature · (scale · R(q) R(k)ᵀ + bias), over keys the mask allows) v.

    Args:
        q, k, v: (B, H, Nq, Dh), (B, H, Nk, Dh), (B, H, Nk, Dv). Never altered.
        signal: rotations, bias terms and temperature; its `token` is the model's business.
        mask: boolean, (Nq, Nk) or (B|1, H|1, Nq, Nk); True may attend. A query that may attend to
            nothing gives 0; under a `NoEmptyRow` there is none, and nothing is promised if there is.
        scale: factor on q·k; default 1/sqrt(Dh).
        dropout: probability, on the attention weights.

    Returns:
        (B, H, Nq, Dv) in v's dtype.

    Raises:
        ValueError: for a mask of another kind, or rotations of other sizes than q and k.
    """
    known = isinstance(mask, NoEmptyRow)
    mask = mask.mask if isinstance(mask, NoEmptyRow) else mask
    if mask is not None and (mask.dtype != torch.bool or mask.ndim not in (2, 4)):
        raise ValueError(
            f"a mask is boolean, True where a query may attend, (Nq, Nk) or (B, 1|H, Nq, Nk); got {mask.dtype} "
            f"{tuple(mask.shape)}. Biases go into a Signal"
        )
    if watcher is not None:
        watcher(q, k, signal, mask, scale)
    if signal.q_rotation is not None:
        paths.tell("rotation", Choice("functional", "queries that come from a map of their own"))
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
    appended = bool(products) and paths.kernel_dtype(q) in (torch.float32, torch.float64)
    if appended:
        q, k, v = _append_channels(q, k, v, products, factor, temperature)
        terms, factor = [term for term in terms if not isinstance(term, LowRank)], 1.0
    traced = isinstance(factor, Tensor) or isinstance(temperature, Tensor)
    path, _ = paths.tell("bias", paths.bias(q, k, terms, mask, dropout, traced, appended))
    if path in kernels.PATHS:
        return kernels.attend(q, k, v, terms[0], factor, temperature, path)  # type: ignore[arg-type]
    if isinstance(factor, Tensor) or isinstance(temperature, Tensor):  # the kernel takes a number
        q, factor = q * factor, 1.0
    added = _merge(terms, mask, temperature, paths.kernel_dtype(q))
    if paths.told is not None:
        paths.tell("kernel", paths.kernel(q, k, v, added, dropout, factor))
    with paths.allowed_kernels(added, q, k, v):
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
    path, _ = paths.tell("rotation", paths.rotation(qkv, signal, private))
    if path == "in place" and turn is not None:
        q, k, v = split_and_rotate(qkv, turn, heads)
        return q, k, v, signal._replace(q_rotation=None, k_rotation=None)
    # Unbinding before the transposition makes the backward one stack, whose result is the packed gradient.
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2))
    return q, k, v, signal


class Attention(nn.Module):
    """Multi-head self-attention under timm's parameter names: `qkv`, `q_norm`, `k_norm`, `proj`.

    Args:
        dim: width D, a multiple of `heads`.
        heads: H.
        kv_heads: heads of keys and values, a divisor of H; each serves H / kv_heads heads of queries.
        qkv_bias: whether `qkv` has a bias; "qv": one for q and v alone, in `q_bias` and `v_bias` (BEiT, EVA).
        qk: "dot", or "cosine" (Swin V2, arXiv 2111.09883): q and k of length 1 and a learned factor for each head,
            exp(min(logit_scale, log 100)), instead of 1/sqrt(Dh); a bias is then one of q and v alone.
        qk_norm: a norm over each head's channels of q and k, before rotation.
        scale_norm: a norm over the output of the heads, before `proj`.
        proj_bias: whether `proj` has a bias.
        norm: makes these norms for a width.
        scale: factor on q·k; default 1/sqrt(Dh).
        position: an encoding of this block's own (a Swin table, learned frequencies). Its signal is added
            to the shared one by the block, which knows the places.
        attn_drop, proj_drop: dropout on the weights and on the output.
    """

    attends = True  # `explain` looks at these

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        qkv_bias: bool | str = True,
        qk: str = "dot",
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        norm: Callable[[int], nn.Module] = layer_norm,
        scale: float | None = None,
        position: nn.Module | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if dim % heads or heads % kv_heads:
            raise ValueError(
                "the width must be a multiple of the heads, and these of kv_heads: "
                f"got dim={dim}, heads={heads}, kv_heads={kv_heads}"
            )
        if qk not in ("dot", "cosine"):
            raise unknown("qk", qk, ("dot", "cosine"))
        if qkv_bias not in (True, False, "qv"):
            raise ConfigError(f"qkv_bias is true, false or 'qv', got {qkv_bias!r}")
        cosine = qk == "cosine"
        apart = qkv_bias == "qv" or (cosine and bool(qkv_bias))
        if kv_heads < heads and (cosine or apart):
            raise ConfigError("kv_heads fewer than heads goes with qk='dot' and a qkv_bias of true or false")
        self.heads, self.kv_heads, self.scale = heads, kv_heads, scale
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * (dim // heads), bias=bool(qkv_bias) and not apart)
        self.q_bias = nn.Parameter(torch.empty(dim)) if apart else None
        self.v_bias = nn.Parameter(torch.empty(dim)) if apart else None
        self.logit_scale = nn.Parameter(torch.empty(heads, 1, 1)) if cosine else None
        self.q_norm = norm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = norm(dim // heads) if qk_norm else nn.Identity()
        self.position = position
        self.attn_drop = attn_drop
        self.norm = norm(dim) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What is this module's own: the factor of cosine attention starts at 10, its biases at 0."""
        if self.logit_scale is not None:
            nn.init.constant_(self.logit_scale, math.log(10))
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        x: Tensor,
        signal: Signal = Signal(),  # noqa: B008
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D). With a cache, keys and values of earlier tokens come before those of x."""
        q, k, v, signal, scale = self.split(x, signal, private=cache is None)
        if cache is not None:
            if signal.k_rotation is not None:
                if signal.k_rotation.cos.shape[1] not in (1, self.kv_heads):
                    raise ValueError(
                        f"{self.heads} heads that turn differently cannot share {self.kv_heads} heads of cached keys: "
                        "build the model with kv_heads equal to its heads"
                    )
                k, signal = rotate(k, signal.k_rotation), signal._replace(k_rotation=None)
            k, v = cache.append(k, v)
        if self.kv_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        out = attend(q, k, v, signal, mask, scale, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))

    def split(
        self, x: Tensor, signal: Signal, private: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Signal, float | None]:
        """(B, N, D) -> q, k, v (B, H, N, Dh), what of the signal is still to be done, and the scale of q·k.

        A scale of None is 1/sqrt(Dh). Without `private` the output of `qkv` is kept as it is.
        """
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        if self.kv_heads == self.heads:
            q, k, v, signal = split_heads(qkv, signal, self.heads, private=private and self._qkv_is_private())
        else:
            parts = qkv.unflatten(-1, (self.heads + 2 * self.kv_heads, -1)).transpose(1, 2)
            q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.logit_scale is None:
            return q, k, v, signal, self.scale
        wide = torch.promote_types(q.dtype, torch.float32)
        factor = self.logit_scale.to(wide).clamp(max=math.log(100)).exp()
        q_hat, k_hat = F.normalize(q.to(wide), dim=-1), F.normalize(k.to(wide), dim=-1)
        return (q_hat * factor).to(q.dtype), k_hat.to(k.dtype), v, signal, 1.0

    def _qkv_is_private(self) -> bool:
        """Whether nobody but this module holds the output of `qkv`: a plain Linear, no hooks, no norm of q and k."""
        plain = type(self.qkv) is nn.Linear and isinstance(self.q_norm, nn.Identity) and self.logit_scale is None
        hooks = (self.qkv._forward_hooks, self.qkv._backward_hooks, self.qkv._backward_pre_hooks)
        return plain and not any(hooks) and not any(_GLOBAL_HOOKS)


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another: `q`, `kv`, `proj`; the same `attend`.

    Args:
        dim: width D, a multiple of `heads`.
        heads, bias, proj_bias, scale, attn_drop, proj_drop: as in `Attention`; `bias` is that of `q` and `kv`.
    """

    attends = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"the width must be a multiple of the heads: got dim={dim}, heads={heads}")
        self.heads, self.scale, self.attn_drop = heads, scale, attn_drop
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        signal: Signal = Signal(),  # noqa: B008
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, Nq, D), memory (B, Nk, D) -> (B, Nq, D). With a cache, the memory is projected and rotated once."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if cache is None or cache.memory is None:
            k, v = self.kv(memory).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
            if signal.k_rotation is not None:
                k = rotate(k, signal.k_rotation)
            if cache is not None:
                cache.memory = (k, v)
        else:
            k, v = cache.memory
        dropout = self.attn_drop if self.training else 0.0
        out = attend(q, k, v, signal._replace(k_rotation=None), mask, self.scale, dropout=dropout)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
