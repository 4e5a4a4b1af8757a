"""Training two models side by side."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def assert_fifty_equal_steps(theirs: nn.Module, ours: nn.Module, batch: Callable[[int], Tensor]) -> None:
    """Same weights, same data, AdamW: losses within 1e-5, relative, all the way; `batch(step)` gives four images."""
    losses: list[list[float]] = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
        losses.append([])
        for step in range(50):
            loss = torch.nn.functional.cross_entropy(model(batch(step)), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-6)
