"""Rotate queries and keys where they lie: in the packed output of `qkv`, in place, with a packed gradient.

    (q, k)_j  <-  (q, k)_j · e^{iθ_j}       pairs of channels (2j, 2j+1) read as complex numbers

The plain path (`vit2dpe.attention.rotate`, twice) makes two float32 copies of q and of k and pins the packed output for
the sake of v. Here one pass writes over memory that nobody else holds, v is a view of the same memory, and the
backward writes the gradients of q, k and v into one packed tensor. Equal to the plain path to the last rounding.

    in place    products of complex numbers; half precision by way of float32 copies
    triton      on CUDA, a kernel forward and one backward (`rotary_triton`), whatever the precision; to the bit

Both are operations of torch, which selects by the device of the tensors and takes shapes alone where they are fake:

    vit2dpe::rotate_packed_(Tensor(a!) packed, Tensor turn) -> ()
    vit2dpe::rotate_packed_backward(Tensor dq, Tensor dk, Tensor dv, Tensor turn) -> Tensor packed
    vit2dpe::rotate_packed_backward_learned(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor turn)
        -> (Tensor packed, Tensor dturn)

Defined by `torch.library.Library`, because the wrapper of `custom_op` takes the host longer than the launch of a small
kernel (11 against 2 microseconds a call, on a CPU).

Legend: B batch, N tokens, H heads, Dh head width; packed (B, N, 3, H, Dh), contiguous; turn complex (B|1, 1|H, N,
Dh/2); dq, dk, dv, and q, k after the rotation (B, H, N, Dh).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor
from torch.library import Library, register_fake

from ...packed import contextual
from ...signal import Rotation, Signal
from . import Selection

PATHS = ("in place", "triton")
TRITON = find_spec("triton") is not None  # macOS and builds of torch for CPUs alone have none
_WIDE = {torch.float32: torch.complex64, torch.float64: torch.complex128}


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
    if signal.bias and contextual(signal):
        return Selection("functional", "a bias is contracted with the output of qkv as it is")
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


def rotate_packed(packed: Tensor, turn: Tensor) -> None:
    """q and k of `packed` turned where they lie."""
    pair, across = packed.narrow(2, 0, 2), turn.transpose(1, 2).unsqueeze(2)  # (B|1, N, 1, 1|H, Dh/2)
    if _WIDE.get(packed.dtype) == turn.dtype:
        complex_pairs(pair).mul_(across)
    else:  # half precision is rotated in float32 and rounded once
        pair.copy_(torch.view_as_real(complex_pairs(pair.to(turn.real.dtype)) * across).flatten(-2))


def packed_gradient(dq: Tensor, dk: Tensor, dv: Tensor, turn: Tensor) -> Tensor:
    """(B, N, 3, H, Dh): gradients of q and k turned back, and that of v."""
    packed = dq.new_empty(dq.shape[0], dq.shape[2], 3, dq.shape[1], dq.shape[3])
    back = turn.conj_physical()
    for slot, gradient in enumerate((dq, dk)):
        out = packed[:, :, slot].transpose(1, 2)
        if _WIDE.get(dq.dtype) == turn.dtype:
            torch.mul(complex_pairs(gradient), back, out=complex_pairs(out))
        else:
            out.copy_(torch.view_as_real(complex_pairs(gradient.to(turn.real.dtype)) * back).flatten(-2))
    packed[:, :, 2].copy_(dv.transpose(1, 2))
    return packed


def angle_gradient(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, like: Tensor) -> Tensor:
    """In the shape and dtype of `like` (B|1, 1|H, N, Dh/2): dθ = Im(g · conj(R x)), summed over what shares θ."""
    angle = torch.zeros_like(like)
    for x, gradient in ((q, dq), (k, dk)):
        a, b = x.to(like.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        da, db = gradient.to(like.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        angle = angle + (a * db - b * da).sum_to_size(like.shape)
    return angle


def complex_pairs(x: Tensor) -> Tensor:
    """Pairs (2j, 2j+1) of the last dimension as complex numbers, a view where memory allows."""
    steps = x.stride()
    if steps[-1] != 1 or any(step % 2 for step in steps[:-1]) or x.storage_offset() % 2:
        x = x.contiguous()
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


_LIBRARY = Library("vit2dpe", "FRAGMENT")
_LIBRARY.define("rotate_packed_(Tensor(a!) packed, Tensor turn) -> ()")
_LIBRARY.define("rotate_packed_backward(Tensor dq, Tensor dk, Tensor dv, Tensor turn) -> Tensor")
_LIBRARY.define(
    "rotate_packed_backward_learned(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor turn) "
    "-> (Tensor, Tensor)"
)


def _learned_gradient(dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    angle = angle_gradient(dq, dk, q, k, turn.real)
    return packed_gradient(dq, dk, dv, turn), torch.complex(-turn.imag * angle, turn.real * angle)


_LIBRARY.impl("rotate_packed_", rotate_packed, "CPU")
_LIBRARY.impl("rotate_packed_backward", packed_gradient, "CPU")
_LIBRARY.impl("rotate_packed_backward_learned", _learned_gradient, "CPU")


def _on_cuda(name: str) -> Callable[..., Tensor | tuple[Tensor, Tensor] | None]:
    """The function of this name in `rotary_triton`, which imports Triton: when it is called first."""

    def launch(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor] | None:
        from . import rotary_triton

        launched: Tensor | tuple[Tensor, Tensor] | None = getattr(rotary_triton, name)(*tensors)
        return launched

    return launch


_LIBRARY.impl("rotate_packed_", _on_cuda("rotate_packed"), "CUDA")
_LIBRARY.impl("rotate_packed_backward", _on_cuda("packed_gradient"), "CUDA")
_LIBRARY.impl("rotate_packed_backward_learned", _on_cuda("learned_gradient"), "CUDA")


def _packed_like(dq: Tensor, dk: Tensor, dv: Tensor, turn: Tensor) -> Tensor:
    return dq.new_empty(dq.shape[0], dq.shape[2], 3, dq.shape[1], dq.shape[3])


def _learned_like(dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    return _packed_like(dq, dk, dv, turn), torch.empty_like(turn)


register_fake("vit2dpe::rotate_packed_", lambda packed, turn: None)
register_fake("vit2dpe::rotate_packed_backward", _packed_like)
register_fake("vit2dpe::rotate_packed_backward_learned", _learned_like)
