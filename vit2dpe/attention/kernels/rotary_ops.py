"""The rotation of a packed projection as operations of torch: one kernel on CUDA, complex numbers on the CPU.

    vit2dpe::rotate_packed_(Tensor(a!) packed, Tensor turn) -> ()
    vit2dpe::rotate_packed_backward(Tensor dq, Tensor dk, Tensor dv, Tensor turn) -> Tensor packed
    vit2dpe::rotate_packed_backward_learned(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor turn)
        -> (Tensor packed, Tensor dturn)

torch selects by the device of the tensors, and takes shapes alone where they are fake. Derivatives are those of
`rotary.split_and_rotate`, which calls them. Defined by `torch.library.Library`, because the wrapper of `custom_op`
takes the host longer than the launch of a small kernel (11 against 2 microseconds a call, on a CPU).

Legend: packed (B, N, 3, H, Dh), contiguous; turn complex (B|1, 1|H, N, Dh/2); dq, dk, dv and q, k after the rotation
(B, H, N, Dh).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.library import Library, register_fake

TRITON = find_spec("triton") is not None  # which the kernels are written in; macOS and builds for CPUs alone have none
_WIDE = {torch.float32: torch.complex64, torch.float64: torch.complex128}

_LIBRARY = Library("vit2dpe", "FRAGMENT")
_LIBRARY.define("rotate_packed_(Tensor(a!) packed, Tensor turn) -> ()")
_LIBRARY.define("rotate_packed_backward(Tensor dq, Tensor dk, Tensor dv, Tensor turn) -> Tensor")
_LIBRARY.define(
    "rotate_packed_backward_learned(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor turn) "
    "-> (Tensor, Tensor)"
)


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
