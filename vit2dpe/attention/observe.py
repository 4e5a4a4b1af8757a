"""Looking inside attention: the maps of every attention of a model, and what can be read off them.

    with vit2dpe.plots.encodings.attention(model) as maps:
        model(images)
    maps["blocks.0.attn"]  # (B, H, Lq, Lk), rows sum to 1

`attend` is the one place that all models go through, so it is the one place that is watched; `nn.MultiheadAttention` is
watched beside it. Nothing is watched, and nothing is paid, outside the context.

Legend: B batch, H heads, Lq, Lk tokens of queries and keys, N tokens, prefix included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..positions import Positions, distance
from ..signal import Signal
from . import functional as _attention
from .functional import rotate

Maps = dict[str, Tensor]


@contextmanager
def attention(model: nn.Module) -> Iterator[Maps]:
    """Within this context every call of `model` fills a dict: name of an attention module -> (B, H, Lq, Lk) float32.

    The maps are softmax(temperature · (scale · R(q) R(k)ᵀ + bias)) under the mask, before dropout; rows sum to 1, those
    of a query that may attend to nothing are 0, and maps times values are what the fused kernel gives. They are
    computed beside the kernel, so results do not change, and without gradients. In windows B counts windows. A module
    that is called again (a decoding step) leaves its last map. Compiled modules run in eager mode meanwhile.

    Raises:
        ConfigError: inside another such context.
    """
    if _attention.watcher is not None:
        raise ConfigError("attention is being looked at already: these contexts do not nest")
    maps: Maps = {}
    inside: list[str] = [""]

    def enter(name: str, *_: object) -> None:
        inside.append(name)

    def leave(*_: object) -> None:
        inside.pop()

    def see(*arguments: Any) -> None:
        maps[inside[-1]] = weights(*arguments)

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            hooks.append(module.register_forward_hook(partial(_stock, maps, name), with_kwargs=True))
        elif any(True for _ in module.children()):  # an attention has at least its projections
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(leave, always_call=True))
    _attention.watcher = see
    try:
        with torch.compiler.set_stance("force_eager"):
            yield maps
    finally:
        _attention.watcher = None
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def weights(q: Tensor, k: Tensor, signal: Signal, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """(B, H, Lq, Lk) float32: the weights that `attend` gives to the values, for its arguments."""
    q, k = q.to(torch.promote_types(q.dtype, torch.float32)), k.to(torch.promote_types(k.dtype, torch.float32))
    if signal.q_rotation is not None:
        q = rotate(q, signal.q_rotation)
    if signal.k_rotation is not None:
        k = rotate(k, signal.k_rotation)
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        for term in signal.bias:
            logits = logits + term.dense()
        if signal.temperature is not None:
            logits = logits * signal.temperature
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0).float()


@torch.no_grad()
def _stock(maps: Maps, name: str, module: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any], _: Any) -> None:
    """The stock attention gives its weights on request, by another route, so it is asked once more."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    given = dict(zip(names, args, strict=False)) | kwargs
    given |= dict(need_weights=True, average_attn_weights=False, is_causal=False)
    training, module.training = module.training, False  # no dropout, and no random number spent
    try:
        found = module.forward(**given)[1]
    finally:
        module.training = training
    found = torch.as_tensor(found).nan_to_num(0.0).float()
    maps[name] = found if found.ndim == 4 else found[None]


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
    return torch.special.entr(one).sum(-1).mean(dim=(0, 2))


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
    far = distance(q, k).to(placed.dtype)[:, None]  # (B|1, 1, Lq, Lk)
    total = placed.sum(-1)
    return ((placed * far).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny)).mean(dim=(0, 2))


@torch.no_grad()
def summary(model: Any, images: Tensor) -> list[dict[str, Any]]:
    """Entropy and mean distance of every head of every block of a `ViT` for a batch of images (B, C, H, W).

    Returns:
        rows {module, head, entropy, distance}: nats and patches.
    """
    at = model.positions(images.shape[-2], images.shape[-1], images.device)
    with attention(model) as maps:
        model(images)
    rows = []
    for name, one in maps.items():
        if tuple(one.shape[-2:]) != (at.prefix + at.coords.shape[1],) * 2:
            continue  # an attention over other tokens, such as that of a pooling
        measured = zip(entropy(one).tolist(), mean_distance(one, at).tolist(), strict=True)
        rows += [dict(module=name, head=head, entropy=e, distance=d) for head, (e, d) in enumerate(measured)]
    return rows
