"""Self- and cross-attention modules under timm's parameter names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, unknown
from ..segments import nested
from ..signal import Signal
from .cache import LayerCache
from .contract import contract
from .functional import Mask, attend, merge_heads, rotate_qk, split_heads, without_rotation
from .tiles import Tiles, attend_in

layer_norm = partial(nn.LayerNorm, eps=1e-6)


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

    attends = True  # `explain` reports these

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
        if min(dim, heads, kv_heads) < 1 or dim % heads or heads % kv_heads:
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

    @property
    def num_heads(self) -> int:
        """timm's name of `heads`."""
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.proj.in_features // self.heads

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
        mask: Mask | Tiles | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D). With a cache, keys and values of earlier tokens come before those of x. Under `Tiles`
        attention is within windows, and the signal is theirs."""
        dropout = self.attn_drop if self.training else 0.0
        if isinstance(mask, Tiles):
            inside: Tensor = self.proj_drop(self.proj(self.norm(attend_in(mask, self.split, x, dropout))))
            return inside
        # In eager mode q and k may come rotated already, in place; the signal then has no rotations left for `attend`.
        q, k, v, signal, scale = self.split(x, signal, private=cache is None)
        if cache is not None:
            if signal.k_rotation is not None and signal.k_rotation.cos.shape[1] not in (1, self.kv_heads):
                raise ValueError(
                    f"{self.heads} heads that turn differently cannot share {self.kv_heads} heads of cached keys: "
                    "build the model with kv_heads equal to its heads"
                )
            q, k, signal = rotate_qk(q, k, signal, keys=False)
            k, v = cache.append(k, v)  # (B, H_kv, Nk, Dh), those of earlier tokens first
        if self.kv_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        out = attend(q, k, v, signal, mask, scale, dropout=dropout)
        mixed: Tensor = self.proj_drop(self.proj(self.norm(merge_heads(out))))  # (B, N, D)
        return mixed

    def split(
        self, x: Tensor, signal: Signal, private: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Signal, float | None]:
        """(B, N, D) -> q, k, v (B, H, N, Dh), the signal without what is applied already, and the scale of q·k.

        A scale of None is 1/sqrt(Dh). Without `private` the output of `qkv` is kept as it is.
        """
        if isinstance(x, Tensor) and x.is_nested:  # no proxy of torch.fx
            raise nested("pad the batch and give a mask, or lay its samples out in a row under `Segments`")
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
        # A forward hook may keep the output that would be written over, and torch has no public list of hooks.
        return plain and not self.qkv._forward_hooks and not torch.nn.modules.module._has_any_global_hook()


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
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, Nq, Dh)
        if cache is None or cache.memory is None:
            k, v = self.kv(memory).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        else:
            signal = contract(signal, q, None)
            (k, v), signal = cache.memory, without_rotation(signal, signal.q_rotation)
        q, k, signal = rotate_qk(q, k, signal)
        if cache is not None:
            cache.memory = (k, v)
        dropout = self.attn_drop if self.training else 0.0
        out = attend(q, k, v, signal, mask, self.scale, dropout=dropout)
        mixed: Tensor = self.proj_drop(self.proj(merge_heads(out)))  # (B, Nq, D)
        return mixed
