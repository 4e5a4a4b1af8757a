"""What the parity tests share: comparing with an original, and proving that the comparison sees rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from vit2dpe import Positions, Rotation, rotate


def exchanged(at: Positions) -> Positions:
    """The same tokens in the same order, their rows and columns exchanged."""
    return Positions(at.coords.flip(-1), at.extent[::-1], at.prefix)


def same(ours: Tensor, theirs: Tensor, wrong: Tensor, atol: float) -> None:
    """`ours` is `theirs` up to `atol`; `wrong`, with rows and columns exchanged, is not, by far."""
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)
    assert wrong.shape == theirs.shape
    assert (wrong - theirs).abs().max() > max(1e-3, 100 * atol), "exchanging rows and columns is not seen"


def halves(x: Tensor) -> Tensor:
    """Channels from our pairs (2i, 2i+1) to pairs (i, i + Dh/2)."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """`rotate`, the result in half-split pairs."""
    return halves(rotate(x, rotation))
