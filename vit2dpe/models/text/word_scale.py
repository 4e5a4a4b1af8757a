"""Words beside sines: in which text models words are multiplied by √D, and how that stays with their weights.

The sines of `sincos` have a root mean square of 0.71, and words are drawn from N(0, 0.02): added to one another, next
to nothing of the words is seen, and a model stays at the frequencies of tokens. Vaswani et al., arXiv 1706.03762,
section 3.4, multiply words by √D. So do models here whose encoding adds sines. (docs/decisions/0013)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...encodings import PositionEncoding, SinCos


class WordScale(nn.Module):
    """x -> x · scale. The scale is in the state_dict (`_extra_state`): weights without one were trained without one.

    Args:
        scale: the factor.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.scale, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.6g}"


def scale_words(width: int, encodings: Iterable[PositionEncoding | None]) -> nn.Module:
    """√D where one of these encodings adds sines, else nothing."""
    parts = [part for encoding in encodings if encoding is not None for part in encoding.modules()]
    return WordScale(width**0.5) if any(isinstance(part, SinCos) for part in parts) else nn.Identity()


def read_scale(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Load pre-hook: weights without a scale were trained with 1; a model that was given its own takes those of it."""
    key, own = f"{prefix}word_scale._extra_state", model.word_scale
    if isinstance(own, WordScale):
        whole = any(name.startswith((f"{prefix}embed.", f"{prefix}blocks.")) for name in state_dict)
        state_dict.setdefault(key, torch.ones((), dtype=torch.float64) if whole else own.get_extra_state())
    elif key in state_dict and float(state_dict[key]) == getattr(model, "embed_scale", None):
        del state_dict[key]
