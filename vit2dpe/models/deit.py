"""DeiT with a distillation token: a second leading token and a second head; their logits are averaged.

Source: DeiT, arXiv 2012.12877; timm, `models/deit.py`, whose names and arguments these are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..encodings import Position
from ..errors import ConfigError
from .mixed import Tokens, leading
from .vit import ViT


class DistilledViT(ViT):
    """A ViT with class token and distillation token, in this order.

    Args:
        position: the encoding, as for `ViT`.
        kwargs: arguments of `ViT`; no registers, and pooling is "token".

    With `distilled_training` set, a training forward returns both logits, (class, distillation); else their mean.
    """

    def __init__(self, position: Position = "learned", **kwargs: Any) -> None:
        super().__init__(position, **kwargs)
        if self.global_pool != "token" or self.reg_token is not None:
            raise ConfigError(
                "a distilled ViT pools by 'token' and has no registers: its heads read the first two tokens"
            )
        like = self.head.weight if isinstance(self.head, nn.Linear) else self.patch_embed.proj.weight
        self.num_prefix_tokens += 1
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim, device=like.device, dtype=like.dtype))
        self.head_dist = self.new_head(self.num_classes)
        self.distilled_training = False
        self.init_weights(needs_reset=False)

    def prefix_tokens(self) -> dict[str, nn.Parameter]:
        return super().prefix_tokens() | {"dist_token": self.dist_token}

    def forward_head(  # type: ignore[override]  # as in timm: both logits in distilled training
        self, x: Tokens, pre_logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, 2 + N, D) -> (B, classes); the mean of both tokens with `pre_logits`."""
        tokens = leading(x, 2)
        first: Tensor = self.head_drop(tokens[:, 0])
        second: Tensor = self.head_drop(tokens[:, 1])
        if pre_logits:
            return (first + second) / 2
        first, second = self.head(first), self.head_dist(second)
        return (first, second) if self.distilled_training and self.training else (first + second) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"dist_token"}

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Both heads."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool not in (None, "token"):
            raise ConfigError(
                f"the heads of a distilled ViT read its first two tokens, got global_pool={global_pool!r}"
            )
        super().reset_classifier(num_classes)
        self.head_dist = self.new_head(num_classes)
