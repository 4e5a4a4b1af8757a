"""Rows in another order, and back: a gather whose gradient is a gather too.

    forward   y[i] = x[order[i]]          backward   dx[j] = dy[back[j]]

The gradient of `index_select` adds rows up, because it cannot know that none is taken twice. Who has the inverse of an
order anyway (windows of a grid have) can say so: one pass over memory that is written once, instead of zeros and sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .choice import plain_only


def permute_rows(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x[order], for x (N, D); `back` undoes `order`: order[back] counts from 0 to N - 1."""
    if not (x.requires_grad and torch.is_grad_enabled()) or plain_only(x) is not None:
        return x.index_select(0, order)
    return _Permute.apply(x, order, back)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        order, back = ctx.saved_tensors
        return _Permute.apply(gradient, back, order), None, None
