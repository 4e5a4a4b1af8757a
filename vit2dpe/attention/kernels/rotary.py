"""Rotate queries and keys where they lie: in the packed output of `qkv`, in place, with a packed gradient.

    (q, k)_j  <-  (q, k)_j · e^{iθ_j}       pairs of channels (2j, 2j+1) read as complex numbers

The plain path (`vit2dpe.attention.rotate`, twice) makes two float32 copies of q and of k and pins the packed output for
the sake of v. Here one pass writes over memory that nobody else holds, v is a view of the same memory, and the
backward writes the gradients of q, k and v into one packed tensor. Equal to the plain path to the last rounding.

    in place    products of complex numbers; half precision by way of float32 copies
    triton      on CUDA, a kernel forward and one backward (`rotary_triton`), whatever the precision; to the bit

Legend: B batch, N tokens, H heads, Dh head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...signal import Rotation, Signal
from . import Selection
from .rotary_ops import TRITON, angle_gradient, complex_pairs, packed_gradient, rotate_packed

PATHS = ("in place", "triton")


def select(qkv: Tensor, signal: Signal, private: bool, plain: str | None) -> Selection:
    """For a packed projection (B, N, 3 D): "none", one of `PATHS` (here) or "functional" (`attention.rotate`).

    Args:
        private: nobody else needs the values of `qkv`.
        plain: why nothing but plain operations may run, or None.
    """
    rotation = signal.q_rotation
    if rotation is None and signal.k_rotation is None:
        return Selection("none", "no rotation is asked for")
    if rotation is None or rotation is not signal.k_rotation:
        return Selection("functional", "queries and keys turn differently")
    if not private:
        return Selection("functional", "a hook, a norm, a cache or another map may need the output of qkv")
    if plain is not None:
        return Selection("functional", plain)
    if qkv.device.type not in ("cpu", "cuda") or not qkv.is_floating_point():
        return Selection("functional", f"no complex numbers for {qkv.dtype} on {qkv.device.type}")
    if not qkv.is_contiguous():
        return Selection("functional", "the output of qkv is not contiguous")
    cos = rotation.cos
    if cos.shape[-2] != qkv.shape[1] or torch.promote_types(qkv.dtype, cos.dtype) != cos.dtype:
        return Selection("functional", "the rotation is of another length, or less precise than the output of qkv")
    why = "eager mode, and nobody else holds the output of qkv"
    if qkv.device.type == "cuda" and TRITON:
        return Selection("triton", f"{why}; in place, one kernel")
    return Selection("in place", why)


def split_and_rotate(
    qkv: Tensor, rotation: Rotation, heads: int, path: str = "in place"
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned by `rotation`, and v: three views (B, H, N, Dh) of `qkv`, which is written over.

    Args:
        qkv: (B, N, 3 D), contiguous and private: its values are lost, so no one else may need them.
        rotation: of queries and keys alike, (B|1, 1|H, N, Dh/2).
        heads: H.
        path: one of `PATHS`.
    """
    cos, sin = rotation
    if torch.is_grad_enabled() and (qkv.requires_grad or cos.requires_grad or sin.requires_grad):
        q, k, v = _SplitAndRotate.apply(qkv, cos, sin, heads, path)
        return q, k, v
    return _forward(qkv, cos, sin, heads, path)


def _forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, path: str) -> tuple[Tensor, Tensor, Tensor]:
    packed = qkv.view(*qkv.shape[:2], 3, heads, 2 * cos.shape[-1])  # named, so that a batch may be empty
    rotate = torch.ops.vit2dpe.rotate_packed_.default if path == "triton" else rotate_packed
    rotate(packed, as_complex(cos, sin))
    q, k, v = packed.transpose(1, 3).unbind(2)  # each (B, H, N, Dh)
    return q, k, v


class _Context(Protocol):
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]
    path: str

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, path: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _forward(qkv, cos, sin, heads, path)
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(cos, sin, *((q, k) if learned else ()))
        ctx.path = path
        return q, k, v

    @staticmethod
    def backward(
        ctx: _Context, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        cos, sin, *turned = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient: plain operations, which remember
            dcos, dsin = _table_gradient(cos, sin, turned, dq, dk)
            turn = torch.complex(cos, -sin)
            back = [torch.view_as_real(complex_pairs(g.to(cos.dtype)) * turn).flatten(-2).to(g.dtype) for g in (dq, dk)]
            return torch.stack([g.transpose(1, 2) for g in (*back, dv)], dim=2).flatten(2), dcos, dsin, None, None
        turn = as_complex(cos, sin)
        if ctx.path != "triton":
            return packed_gradient(dq, dk, dv, turn).flatten(2), *_table_gradient(cos, sin, turned, dq, dk), None, None
        if not turned:
            return torch.ops.vit2dpe.rotate_packed_backward.default(dq, dk, dv, turn).flatten(2), *[None] * 4
        packed, dturn = torch.ops.vit2dpe.rotate_packed_backward_learned.default(dq, dk, dv, *turned, turn)
        return packed.flatten(2), dturn.real, dturn.imag, None, None


def _table_gradient(
    cos: Tensor, sin: Tensor, turned: list[Tensor], dq: Tensor, dk: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to cos and sin, such that the one to the angle is right.

    Only the part along the circle is given, (-sin, cos) dθ: cos and sin are made of an angle, which needs no other.
    """
    if not turned:
        return None, None
    q, k = turned
    angle = angle_gradient(dq, dk, q, k, cos)
    return -sin * angle, cos * angle


def as_complex(cos: Tensor, sin: Tensor) -> Tensor:
    """cos + i sin; without a copy where the two lie as `encodings.base.interleave` lays them."""
    steps = cos.stride()
    beside = sin.data_ptr() == cos.data_ptr() + cos.element_size() and sin.stride() == steps
    even = not cos.storage_offset() % 2 and not any(step % 2 for step in steps)
    if beside and even and cos.untyped_storage().data_ptr() == sin.untyped_storage().data_ptr():
        return torch.view_as_complex(cos.as_strided((*cos.shape, 2), (*steps, 1)))
    return torch.complex(cos, sin)
