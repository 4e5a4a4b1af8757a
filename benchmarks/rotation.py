"""The rotation alone, from the packed projection to q, k and v: ours, a peer's, and the split.

Every contender first copies its input, as a projection in front of it would write a new tensor; ours then rotates q and
k in place.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import x_transformers
from vit2dpe.attention.functional import split_heads
from vit2dpe.encodings.base import interleave
from vit2dpe.errors import ConfigError
from vit2dpe.signal import Signal

ROPE = "vit_small_patch16_rope_224"  # its angles are the input of the packages


def contenders(word: str, attention: Any, rope: Tensor | None, shape: tuple[int, int]) -> dict[str, nn.Module]:
    """{"peer", "ours", "limit"}.

    Args:
        word: a timm name, or one of PACKAGES.
        attention: timm's, with its number of heads and of prefix tokens.
        rope: timm's table (..., N, 2 Dh): sines, then cosines, each for both channels of a pair.
        shape: (N, D) of the tokens.

    Raises:
        ConfigError: for a model without rotations, and one whose pairs lie in the halves of a head.
    """
    if rope is None or getattr(attention, "rotate_half", False):
        raise ConfigError(f"{word} does not turn neighbouring channels, so the rotation alone cannot be compared")
    rope, heads, prefix = rope.detach(), attention.num_heads, attention.num_prefix_tokens
    sin, cos = rope.unflatten(-1, (2, -1, 2))[..., 0].unbind(-2)
    sin, cos = (part.reshape(1, -1, *part.shape[-2:]) for part in (sin, cos))
    turn = interleave(F.pad(cos, (0, 0, prefix, 0), value=1.0), F.pad(sin, (0, 0, prefix, 0)))
    if word in PACKAGES:
        if word in ON_CUDA and rope.device.type != "cuda":
            raise ConfigError(f"{word} rotates on CUDA alone, by Triton; got device={rope.device.type}")
        peer: _Split = PACKAGES[word](heads, torch.atan2(turn.sin, turn.cos)[0, 0])
    else:
        peer = _Timm(heads, rope, prefix)
    peer.shape = (shape[0], 3 * shape[1])  # type: ignore[assignment]
    return {"peer": peer, "ours": _Ours(heads, Signal(q_rotation=turn, k_rotation=turn)), "limit": _Split(heads)}


class _Split(nn.Module):
    """q, k and v of (B, N, 3 D), each (B, H, N, Dh)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: Tensor) -> list[Tensor]:
        return list(split_heads(qkv.clone(), Signal(), self.heads)[:3])

    @staticmethod
    def plain(found: list[Tensor]) -> Tensor:
        return torch.stack(found)


class _Ours(_Split):
    def __init__(self, heads: int, signal: Signal) -> None:
        super().__init__(heads)
        self.signal = signal

    def forward(self, qkv: Tensor) -> list[Tensor]:
        return list(split_heads(qkv.clone(), self.signal, self.heads, private=True)[:3])


class _Timm(_Split):
    """As timm's attention does it: each of q and k, its prefix left out and put back."""

    def __init__(self, heads: int, rope: Tensor, prefix: int) -> None:
        super().__init__(heads)
        self.rope, self.prefix = rope, prefix

    def forward(self, qkv: Tensor) -> list[Tensor]:
        from timm.layers import apply_rot_embed_cat

        q, k, v = qkv.clone().unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.prefix
        q, k = (torch.cat([x[:, :, :p], apply_rot_embed_cat(x[:, :, p:], self.rope)], dim=2) for x in (q, k))
        return [q, k, v]


class _RotaryEmbeddingTorch(_Split):
    """rotary-embedding-torch on angles (N, Dh/2), whose cosines and sines it computes in every call."""

    def __init__(self, heads: int, angle: Tensor) -> None:
        super().__init__(heads)
        from rotary_embedding_torch import apply_rotary_emb  # type: ignore[import-untyped, import-not-found, unused-ignore]

        self.turn, self.angle = apply_rotary_emb, angle.repeat_interleave(2, dim=-1)

    def forward(self, qkv: Tensor) -> list[Tensor]:
        q, k, v = qkv.clone().unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return [self.turn(self.angle, q), self.turn(self.angle, k), v]


class _XTransformers(_Split):
    """x-transformers on the angles of its RotaryEmbedding; it computes cosines and sines in every call."""

    def __init__(self, heads: int, angle: Tensor) -> None:
        super().__init__(heads)
        self.turn, self.angle = x_transformers.package().apply_rotary_pos_emb, angle.repeat_interleave(2, dim=-1)[None]

    def forward(self, qkv: Tensor) -> list[Tensor]:
        q, k, v = qkv.clone().unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return [self.turn(q, self.angle, 1.0), self.turn(k, self.angle, 1.0), v]


class _FlashAttn(_Split):
    """flash-attn's kernel on q and k of the packed projection, in place, as ours; tables in the precision of x."""

    def __init__(self, heads: int, angle: Tensor) -> None:
        super().__init__(heads)
        self.turn = _imported("flash_attn", "flash_attn.layers.rotary", "flash-attn").apply_rotary_emb_qkv_
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, qkv: Tensor) -> list[Tensor]:
        packed = self.turn(qkv.clone().unflatten(-1, (3, self.heads, -1)), self.cos, self.sin, interleaved=True)
        return list(packed.transpose(1, 3).unbind(2))


class _Liger(_Split):
    """Liger's kernel, whose pairs are the halves of a head: the copy of the input lays them so, `plain` back again."""

    def __init__(self, heads: int, angle: Tensor) -> None:
        super().__init__(heads)
        self.turn = _imported("liger_kernel", "liger_kernel.transformers.rope", "liger-kernel").liger_rotary_pos_emb
        both = torch.cat([angle, angle], dim=-1)[None]
        self.register_buffer("cos", both.cos())
        self.register_buffer("sin", both.sin())

    def forward(self, qkv: Tensor) -> list[Tensor]:
        halves = qkv.unflatten(-1, (3, self.heads, -1, 2)).transpose(-1, -2).flatten(-2)  # a copy
        q, k, v = halves.permute(2, 0, 3, 1, 4).unbind(0)
        return [*self.turn(q, k, self.cos, self.sin), v]

    @staticmethod
    def plain(found: list[Tensor]) -> Tensor:
        return torch.stack([_interleaved(x) for x in found])

    def gradients(self, given: list[Tensor]) -> list[Tensor]:
        return [x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in given]


def _interleaved(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _imported(name: str, module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{name} is not installed here ({error}); pip install {package}") from None


ON_CUDA = {"flash_attn": _FlashAttn, "liger_kernel": _Liger}
PACKAGES = {"rotary_embedding_torch": _RotaryEmbeddingTorch, "x_transformers": _XTransformers} | ON_CUDA
