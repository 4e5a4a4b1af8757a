"""`rope_mixed`: rotary frequencies that are learned, per head and block.

    angle_hi(p) = ⟨w_hi, p⟩,    w (d, H, Dh/2), drawn as the frequencies of `rope` along axes turned at random per head

Source: RoPE for ViT, arXiv 2403.13298, `models/vit_rope.py`; timm, `pos_embed_sincos.py`.

How ours differs: see `rope.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..positions import Positions, float64_device
from .base import Angles
from .linear import DirectionalRoPE
from .rope import frequencies_of, started
from .rotary_options import of_each
from .sections import Sections


class MixedRoPE(DirectionalRoPE):
    """Learned frequencies, one set for each head and block.

    Options say what it starts from, those of `rope` along axes turned at random per head, but for pairs that are left
    over: these stand still and have no parameters.

    Args:
        head_dim: Dh, even.
        heads: H.
        axes: d.
        base, step: of the magnitudes it starts from, one number or one of each (turned) axis.
        start: the coordinate of the first patch; see `AxialRoPE`.
        sections, partial, zeros, order, bank: see `AxialRoPE`. Those of `zeros` start at 0, and learn.

    Raises:
        ConfigError: for sections that a head has no room for, and numbers out of their ranges.
    """

    per_block = True

    def __init__(
        self,
        head_dim: int,
        heads: int,
        *,
        axes: int = 2,
        base: float | tuple[float, ...] = 10.0,
        step: float | tuple[float, ...] = 1.0,
        start: float | tuple[float, ...] = 0.0,
        sections: tuple[int, ...] | None = None,
        partial: float = 1.0,
        zeros: int = 0,
        order: str = "axis",
        bank: str = "own",
    ) -> None:
        super().__init__()
        self.sections = Sections(head_dim, axes, base, step, heads, sections, partial, zeros, order, bank)
        self.start, count = of_each(start, axes, "a finite start", math.isfinite), sum(self.sections.shares)
        shape = (count, self.sections.turning) if order == "head" else (heads, count)
        self.freqs = nn.Parameter(torch.empty(axes, *shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        axes, heads, pairs = self.freqs.shape
        device = float64_device(self.freqs.device)
        along = frequencies_of(self.sections, device)[:, :heads, :pairs]  # (d, 1|H, n)
        turned = torch.stack([_random_axes(axes, device) for _ in range(heads)])  # (H, d, d)
        # A pair of axis a of head h turns along the a-th turned axis; one product is not 0.
        self.freqs.copy_((turned.permute(1, 2, 0)[..., None] * along[:, None]).sum(0))

    def frequencies(self, device: torch.device) -> Tensor:
        w = self.freqs.to(torch.promote_types(self.freqs.dtype, torch.float32))
        heads, pairs = (self.sections.heads or 0) - w.shape[1], self.sections.pairs - w.shape[2]
        return F.pad(w, (0, pairs, 0, heads)) if heads or pairs else w

    @property
    def even(self) -> bool:
        """Whether it is that of timm, whose frequencies are all learned."""
        return self.freqs.shape[1:] == (self.sections.heads, self.sections.pairs) and not any(self.start)

    def angle(self, at: Positions) -> Angles:
        return super().angle(started(at, self.start))

    def extra_repr(self) -> str:
        return f"{self.sections}, start={self.start}"


def _random_axes(axes: int, device: torch.device) -> Tensor:
    """(d, d) orthonormal rows, uniformly turned; the mirror images among them give the same kernel."""
    if axes == 1:
        return torch.ones(1, 1, dtype=torch.float64, device=device)
    if axes == 2:
        phi = torch.rand((), dtype=torch.float64, device=device) * (2 * math.pi)
        return torch.stack([phi.sin(), phi.cos(), phi.cos(), -phi.sin()]).view(2, 2)
    q, r = torch.linalg.qr(torch.randn(axes, axes, dtype=torch.float64, device=device))
    rows: Tensor = q * r.diagonal().sign()
    return rows
