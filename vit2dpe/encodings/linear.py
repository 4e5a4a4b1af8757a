"""What rotary encodings share: angles that are linear in the places, angle_i(p) = Σ_a w[a, i] p_a."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..grids import Span
from ..positions import Positions
from ..signal import Rotation
from .base import Angles, Policy, PositionEncoding, can_interleave


class LinearAngles(NamedTuple):
    """Angles that are linear in the places, angle_i(p) = Σ_a w[a, i] p_a; `.dense()` is the reference.

    Args:
        coords: (B|1, N, d).
        w: (d, 1|H, Dh/2) radians per patch, in the dtype of `coords`, or those of each token, (d, B|1, N|1, 1|H, Dh/2).
    """

    coords: Tensor
    w: Tensor

    def resolve(self, policy: Policy | None, span: Span, prefix: int) -> Tensor | Rotation:
        """With the frequencies of a policy, behind `prefix` tokens that do not turn; see `Angles`."""
        if isinstance(span, Tensor):
            span = span.to(self.w.device, self.w.dtype)
        w = self.w if policy is None else policy.rescale(self.w, span)
        coords = F.pad(self.coords, (0, 0, prefix, 0)) if prefix else self.coords  # nothing turns at 0
        learned = w.requires_grad and torch.is_grad_enabled() and not coords.requires_grad
        if learned and w.ndim == 3 and can_interleave(w):
            return Rotation(*_CosSin.apply(coords, w))
        return LinearAngles(coords, w).dense()

    def dense(self) -> Tensor:
        """(B|1, 1|H, N, Dh/2)"""
        places = self.coords[:, None, :, :, None].unbind(-2)  # of each axis (B|1, 1, N, 1)
        # Of each axis (1|H, 1, Dh/2), or (B|1, 1|H, N|1, Dh/2).
        w = (self.w[:, :, None] if self.w.ndim == 3 else self.w.transpose(2, 3)).unbind(0)
        angle = places[0] * w[0]  # a matmul could be autocast, or rounded to TF32
        for place, frequency in zip(places[1:], w[1:], strict=True):
            angle.add_(place * frequency)  # not addcmul, whose one rounding would tell the axes apart
        return angle


class _CosSin(torch.autograd.Function):
    """Cosine and sine of learned linear angles, interleaved.

    The backward takes the gradients of both at once, computes neither again, and sums over tokens in one product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(coords: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        angle = LinearAngles(coords, w).dense()
        cos, sin = torch.view_as_real(torch.complex(angle.cos(), angle.sin_())).unbind(-1)
        return cos, sin

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: _Saved, dcos: Tensor, dsin: Tensor) -> tuple[None, Tensor]:
        coords, cos, sin = ctx.saved_tensors
        dangle = torch.addcmul(dsin * cos, dcos, sin, value=-1)  # (B|1, 1|H, N, Dh/2)
        with torch.autocast(dangle.device.type, enabled=False):  # as precise as any product of this device
            dw = coords.mT.unsqueeze(1) @ dangle  # (B|1, 1|H, d, Dh/2)
        return None, (dw.sum(0) if len(dw) > 1 else dw[0]).transpose(0, 1)

    @staticmethod
    def jvp(ctx: _Saved, coords_t: Tensor | None, w_t: Tensor | None) -> tuple[Tensor, Tensor]:
        coords, w, cos, sin = ctx.saved_tensors
        along = torch.zeros_like(cos)  # the change of the angle
        if w_t is not None:
            along = along + LinearAngles(coords, w_t).dense()
        if coords_t is not None:
            along = along + LinearAngles(coords_t, w).dense()
        return -sin * along, cos * along


class _Saved(Protocol):
    saved_tensors: tuple[Tensor, ...]


class DirectionalRoPE(PositionEncoding):
    """The common core: angle_i(p) = Σ_a w[a, i] p_a for the frequencies a subclass names."""

    relative = True
    gives = frozenset({"rotation"})
    policies: tuple[str, ...] = ("extrapolate", "interpolate", "ntk", "yarn")

    def frequencies(self, device: torch.device) -> Tensor:
        """(d, 1|H, Dh/2) radians per patch."""
        raise TypeError(f"{type(self).__name__} must name its frequencies")

    def angle(self, at: Positions) -> Angles:
        w = self.frequencies(at.coords.device)
        if at.axes != len(w):
            raise other_axes(at, len(w))
        # The device first: where it has no float64, formulas have their frequencies on the CPU.
        return LinearAngles(at.coords.to(w.device).to(w.dtype), w)


def other_axes(at: Positions, axes: int) -> ValueError:
    """The error where frequencies have so many axes and places have others."""
    return ValueError(f"the frequencies have {axes} axes, the positions {at.axes}")
