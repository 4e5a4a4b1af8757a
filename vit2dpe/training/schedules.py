"""A learning rate that timm has no schedule for."""

from __future__ import annotations

import torch
from timm.scheduler.scheduler import Scheduler


class Noam(Scheduler):
    """Inverse square root with linear warm-up, arXiv 1706.03762, section 5.3.

        lr(s) = peak · min(s / w, √(w / s)),   s = 1, 2, ... the number of the update, w updates of warm-up

    The paper's D^-0.5 · min(s^-0.5, s · w^-1.5) is this with peak = (D w)^-0.5; here the peak is the optimizer's rate,
    so that schedules are compared at one `optim.lr`. Without warm-up it falls from the first update on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: float) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.warmup = max(1.0, warmup)

    def _get_lr(self, t: int) -> list[float]:
        s = t + 1
        return [peak * min(s / self.warmup, (self.warmup / s) ** 0.5) for peak in self.base_values]
