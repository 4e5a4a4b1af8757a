"""Rotate queries and keys where they lie: in the packed output of `qkv`, in place, with a packed gradient.

    (q, k)_j  <-  (q, k)_j · e^{iθ_j}       pairs of channels (2j, 2j+1) read as complex numbers

The plain path (`vit2dpe.attention.rotate`, twice) makes two float32 copies of q and of k and pins the packed output for
the sake of v. Here one pass writes over memory that nobody else holds, v is a view of the same memory, and the
backward writes the gradients of q, k and v into one packed tensor. Equal to the plain path to the last rounding.

Legend: B batch, N tokens, H heads, Dh head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...signal import Rotation, Signal
from . import Selection

_WIDE = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def select(qkv: Tensor, signal: Signal, private: bool, plain: str | None) -> Selection:
    """For a packed projection (B, N, 3 D): "none", "in place" (here) or "functional" (`attention.rotate`).

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
    return Selection("in place", "eager mode, and nobody else holds the output of qkv")


def split_and_rotate(qkv: Tensor, rotation: Rotation, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned by `rotation`, and v: three views (B, H, N, Dh) of `qkv`, which is written over.

    Args:
        qkv: (B, N, 3 D), contiguous and private: its values are lost, so no one else may need them.
        rotation: of queries and keys alike, (B|1, 1|H, N, Dh/2).
        heads: H.
    """
    cos, sin = rotation
    if torch.is_grad_enabled() and (qkv.requires_grad or cos.requires_grad or sin.requires_grad):
        q, k, v = _SplitAndRotate.apply(qkv, cos, sin, heads)
        return q, k, v
    return _forward(qkv, cos, sin, heads)


def _forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    packed = qkv.view(*qkv.shape[:2], 3, heads, 2 * cos.shape[-1])  # named, so that a batch may be empty
    turn = as_complex(cos, sin).transpose(1, 2).unsqueeze(2)  # (B|1, N, 1, 1|H, Dh/2)
    if _WIDE.get(qkv.dtype) == turn.dtype:
        _complex(packed).narrow(2, 0, 2).mul_(turn)
    else:  # half precision is rotated in float32 and rounded once
        pair = packed.narrow(2, 0, 2)
        pair.copy_(torch.view_as_real(_complex(pair.to(cos.dtype)) * turn).flatten(-2))
    q, k, v = packed.transpose(1, 3).unbind(2)  # each (B, H, N, Dh)
    return q, k, v


class _Context(Protocol):
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _forward(qkv, cos, sin, heads)
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(cos, sin, *((q, k) if learned else ()))
        return q, k, v

    @staticmethod
    def backward(
        ctx: _Context, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        cos, sin, *turned = ctx.saved_tensors
        dcos = dsin = None
        if turned:
            dcos, dsin = _table_gradient(cos, sin, turned, (dq, dk))
        if torch.is_grad_enabled():  # somebody differentiates the gradient: plain operations, which remember
            turn = torch.complex(cos, -sin)
            back = [torch.view_as_real(_complex(g.to(cos.dtype)) * turn).flatten(-2).to(g.dtype) for g in (dq, dk)]
            return torch.stack([g.transpose(1, 2) for g in (*back, dv)], dim=2).flatten(2), dcos, dsin, None
        packed = dq.new_empty(dq.shape[0], dq.shape[2], 3, dq.shape[1], dq.shape[3])
        turn = as_complex(cos, sin).conj_physical()
        for slot, gradient in enumerate((dq, dk)):
            out = packed[:, :, slot].transpose(1, 2)
            if _WIDE.get(dq.dtype) == turn.dtype:
                torch.mul(_complex(gradient), turn, out=_complex(out))
            else:
                out.copy_(torch.view_as_real(_complex(gradient.to(cos.dtype)) * turn).flatten(-2))
        packed[:, :, 2].copy_(dv.transpose(1, 2))
        return packed.flatten(2), dcos, dsin, None


def _table_gradient(
    cos: Tensor, sin: Tensor, turned: list[Tensor], gradients: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients to cos and sin, such that the one to the angle is right: dθ = Im(g · conj(R x)) over what shares θ.

    Only the part along the circle is given, (-sin, cos) dθ: cos and sin are made of an angle, which needs no other.
    """
    angle = torch.zeros_like(cos)
    for x, gradient in zip(turned, gradients, strict=True):
        a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        da, db = gradient.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        angle = angle + (a * db - b * da).sum_to_size(cos.shape)
    return -sin * angle, cos * angle


def as_complex(cos: Tensor, sin: Tensor) -> Tensor:
    """cos + i sin; without a copy where the two lie as `encodings.base.interleave` lays them."""
    steps = cos.stride()
    beside = sin.data_ptr() == cos.data_ptr() + cos.element_size() and sin.stride() == steps
    even = not cos.storage_offset() % 2 and not any(step % 2 for step in steps)
    if beside and even and cos.untyped_storage().data_ptr() == sin.untyped_storage().data_ptr():
        return torch.view_as_complex(cos.as_strided((*cos.shape, 2), (*steps, 1)))
    return torch.complex(cos, sin)


def _complex(x: Tensor) -> Tensor:
    """Pairs (2j, 2j+1) of the last dimension as complex numbers, a view where memory allows."""
    steps = x.stride()
    if steps[-1] != 1 or any(step % 2 for step in steps[:-1]) or x.storage_offset() % 2:
        x = x.contiguous()
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
