"""Angles of pairs that each turn along one axis, as products that are as small as they can be.

    angle_i(p) = w_i p_(axis of i)

`LinearAngles` of `rope.py` are those of pairs that turn along any direction. A policy is given the frequencies of each
axis by themselves, so that the fastest and the slowest are those of the axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Policy


class AxialAngles(NamedTuple):
    """Of axes with as many pairs each, angle_(a, k)(p) = w[a, k] p_a: one product, and no zeros added.

    Args:
        coords: (B|1, N, d), of any precision.
        w: (d, K) radians per patch.
        interleaved: the pairs of a frequency beside each other, an axis after the other; else those of an axis.
        rest: pairs behind them that stand still.
    """

    coords: Tensor
    w: Tensor
    interleaved: bool = False
    rest: int = 0

    def resolve(self, policy: Policy | None, extent: tuple[float, ...], prefix: int) -> Tensor:
        """With the frequencies of a policy, behind `prefix` tokens that do not turn; see `Angles`."""
        w = self.w
        if policy is not None:
            unit = torch.eye(len(w), dtype=w.dtype, device=w.device)[None]
            rows = AxialAngles(unit, w, self.interleaved, self.rest).dense()[0].transpose(0, 1)  # (d, 1, Dh/2)
            flat = _rescaled(policy, rows, extent)[0, : w.numel()]
            w = flat.unflatten(0, w.mT.shape).mT if self.interleaved else flat.unflatten(0, w.shape)
        coords = F.pad(self.coords, (0, 0, prefix, 0)) if prefix else self.coords
        return AxialAngles(coords, w, self.interleaved, self.rest).dense()

    def dense(self) -> Tensor:
        """(B|1, 1, N, Dh/2)"""
        if self.interleaved:
            angle = (self.coords[:, None, :, None] * self.w.mT.contiguous()).flatten(-2)
        else:
            angle = (self.coords[:, None, :, :, None] * self.w).flatten(-2)
        return F.pad(angle, (0, self.rest)) if self.rest else angle


class SectionAngles(NamedTuple):
    """Of any pairs: one gather of coordinates and one product.

    Args:
        coords: (B|1, N, d), of any precision.
        axis: (1, Dh/2) of each pair, or (H, 1) of each head, int64.
        w: (1|H, Dh/2) radians per patch, 0 of pairs that stand still.
    """

    coords: Tensor
    axis: Tensor
    w: Tensor

    def resolve(self, policy: Policy | None, extent: tuple[float, ...], prefix: int) -> Tensor:
        """With the frequencies of a policy, behind `prefix` tokens that do not turn; see `Angles`."""
        w = self.w
        if policy is not None:
            axes = torch.arange(self.coords.shape[-1], device=w.device)
            w = _rescaled(policy, (self.axis == axes[:, None, None]) * w, extent)
        coords = F.pad(self.coords, (0, 0, prefix, 0)) if prefix else self.coords
        return SectionAngles(coords, self.axis, w).dense()

    def dense(self) -> Tensor:
        """(B|1, 1|H, N, Dh/2)"""
        places = self.coords.index_select(-1, self.axis.flatten())  # (B|1, N, Dh/2), or (B|1, N, H)
        of_pairs = places[:, None] if len(self.axis) == 1 else places.mT[..., None]
        return of_pairs * self.w[:, None]


def _rescaled(policy: Policy, rows: Tensor, extent: tuple[float, ...]) -> Tensor:
    """(1|H, Dh/2) frequencies under a policy, of (d, 1|H, Dh/2) that have one axis each.

    An axis is given as if it were a head, so that its fastest and slowest pairs are its own.
    """
    if rows.shape[1] > 1:
        return policy.rescale(rows, extent).sum(0)
    each = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)[..., None] * rows  # (d, d, Dh/2)
    return policy.rescale(each, extent).sum((0, 1))[None]
