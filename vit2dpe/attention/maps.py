"""What can be read off attention maps: where information flows, how sharp heads are, how far they look.

Legend: B batch, H heads, Lq, Lk tokens of queries and keys, N tokens, prefix included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypedDict

import torch
from torch import Tensor, nn

from ..errors import ConfigError, not_ours
from ..positions import Positions, distance
from .observe import attention_maps


def rollout(maps: Mapping[str, Tensor] | Sequence[Tensor], residual: float = 0.5) -> Tensor:
    """Attention rollout, arXiv 2005.00928: how much of each input token is in each output token, all blocks together.

        A_rollout = A_L ... A_1,   A_l = residual · 1 + (1 - residual) · mean over heads of the map of block l

    Args:
        maps: of self-attentions over the same tokens, the first block first; those of a `ViT` are in this order.
        residual: the share of the residual connection; the paper's is one half.

    Returns:
        (B, N, N), rows sum to 1.

    Raises:
        ConfigError: for maps of different sizes (windows, cross-attention), through which nothing can be followed.
    """
    found = list(maps.values()) if isinstance(maps, Mapping) else list(maps)
    sizes = {tuple(one.shape[i] for i in (0, 2, 3)) for one in found}
    if len(sizes) != 1 or (size := next(iter(sizes)))[1] != size[2]:
        raise ConfigError(f"rollout follows self-attention over the same tokens in every block, got maps of {sizes}")
    total = torch.eye(size[1], device=found[0].device)
    for one in found:
        total = (residual * torch.eye(size[1], device=one.device) + (1 - residual) * one.mean(dim=1)) @ total
    return total


def entropy(one: Tensor) -> Tensor:
    """(H,) mean over samples and queries of -Σ a ln a of a map (B, H, Lq, Lk), in nats: 0 one key, ln Lk all alike."""
    nats: Tensor = torch.special.entr(one).sum(-1)  # (B, H, Lq)
    return nats.mean(dim=(0, 2))


def mean_distance(one: Tensor, q: Positions, k: Positions | None = None) -> Tensor:
    """(H,) mean attention distance in patches: Σ a(q, k) |q - k| over keys that have a place, mean over such queries.

    The measure of arXiv 2010.11929, figure 7, with weights taken anew over keys that have a place, so that attention to
    a class token does not count as near.

    Args:
        one: a map (B, H, Lq, Lk), prefix included.
        q, k: where its tokens are.
    """
    k = q if k is None else k
    placed = one[:, :, q.prefix :, k.prefix :]
    if placed.shape[-2:] != (q.coords.shape[1], k.coords.shape[1]):
        raise ConfigError(
            f"the map has {tuple(one.shape[-2:])} tokens, the positions {q.prefix} + {q.coords.shape[1]} and "
            f"{k.prefix} + {k.coords.shape[1]}"
        )
    far = distance(q, k).to(placed.device, placed.dtype)[:, None]  # (B|1, 1, Lq, Lk)
    total = placed.sum(-1)
    return ((placed * far).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny)).mean(dim=(0, 2))


class ImageModel(Protocol):
    """A model of images with the `Positions` of its tokens, such as a `ViT`."""

    def positions(self, height: int, width: int, device: torch.device | str | None = None) -> Positions: ...

    def __call__(self, images: Tensor) -> Tensor: ...


class HeadSummary(TypedDict):
    """One head of one attention: its entropy in nats and mean distance in patches."""

    module: str
    head: int
    entropy: float
    distance: float


@torch.no_grad()
def summary(model: ImageModel, images: Tensor) -> list[HeadSummary]:
    """Entropy and mean distance of every head of every block of a `ViT` for a batch of images (B, C, H, W).

    Returns:
        rows {module, head, entropy, distance}: nats and patches.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"summary takes a model, an nn.Module, got {type(model).__name__}")
    if not hasattr(model, "positions"):
        raise not_ours(model, "has no `positions`, the places of its tokens")
    at = model.positions(images.shape[-2], images.shape[-1], images.device)
    with attention_maps(model) as maps:
        model(images)
    rows: list[HeadSummary] = []
    for name, one in maps.items():
        if tuple(one.shape[-2:]) != (at.prefix + at.coords.shape[1],) * 2:
            continue  # an attention over other tokens, such as that of a pooling
        measured = zip(entropy(one).tolist(), mean_distance(one, at).tolist(), strict=True)
        rows += [HeadSummary(module=name, head=head, entropy=e, distance=d) for head, (e, d) in enumerate(measured)]
    return rows
