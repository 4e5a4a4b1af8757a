"""Biases as the float masks of stock modules, and where torch would read such a mask wrongly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention.functional import merge_bias
from ..errors import ConfigError
from ..signal import Signal


def attention_mask(signal: Signal, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The bias of a Signal as the float mask of a stock module.

    Args:
        signal: its bias terms are (B|1, H, L, S).
        batch: N.
        dtype: of the module's input.

    Returns:
        (L, S) where all samples and heads share it, else (N·H, L, S): the heads of sample 0, of sample 1, ... To be
        passed with `is_causal=False`, and to a module that `check` lets pass.

    Raises:
        ConfigError: for a Signal without bias, or with rotations or a temperature.
    """
    if signal.q_rotation is not None or signal.k_rotation is not None or signal.temperature is not None:
        raise ConfigError(
            "rotations and a length temperature act on q·k, a mask is added to it: use stock.RotaryEncoderLayer"
        )
    if not signal.bias:
        raise ConfigError("this Signal has no bias, so there is no mask to be made; token terms are added to the input")
    bias = merge_bias(list(signal.bias), None, 1.0, dtype)
    if bias is None or bias.shape[0] not in (1, batch):
        raise ConfigError(f"the bias is for {0 if bias is None else bias.shape[0]} samples, the batch has {batch}")
    return as_stock(bias, batch, bias.shape[1])


def by_head(mask: Tensor, batch: int, heads: int, queries: int, keys: int, name: str) -> Tensor:
    """A stock mask as (1|N, 1|H, L, S), of the type that it has.

    Args:
        mask: (L, S), (N, L, S) or (N·H, L, S).
        name: of the argument, for errors.

    Raises:
        ConfigError: for another shape or type.
    """
    check_type(mask, name)
    if mask.shape == (queries, keys):
        return mask[None, None]
    if mask.shape == (batch * heads, queries, keys):
        return mask.unflatten(0, (batch, heads))
    if mask.shape == (batch, queries, keys):
        return mask[:, None]
    raise ConfigError(
        f"{name} has the shape {tuple(mask.shape)}; for {batch} samples, {heads} heads, {queries} queries and {keys} "
        f"keys it is {(queries, keys)} for all, {(batch, queries, keys)} for each sample, or "
        f"{(batch * heads, queries, keys)} for each sample and head, the heads of a sample next to each other"
    )


def check_padding(padding: Tensor, batch: int, keys: int, name: str) -> None:
    """Raises ConfigError for a mask of padding that is not (N, S), or (S,) without a batch."""
    check_type(padding, name)
    if padding.shape not in ((batch, keys), (keys,) if batch == 1 else ()):
        raise ConfigError(
            f"{name} has the shape {tuple(padding.shape)}; for {batch} samples and {keys} keys it is {(batch, keys)}"
        )


def check_type(mask: Tensor, name: str) -> None:
    """Raises ConfigError for a mask that is neither boolean nor float."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ConfigError(
            f"{name} must be boolean, True where attention is not allowed, or float, added to the logits; got "
            f"{mask.dtype}: where 1 means a token that is there, give mask == 0"
        )


def as_stock(mask: Tensor, batch: int, heads: int) -> Tensor:
    """(1|N, 1|H, L, S) in the layout of stock modules: (L, S), or (N·H, L, S)."""
    return mask[0, 0] if mask.shape[:2] == (1, 1) else mask.expand(batch, heads, -1, -1).flatten(0, 1)


def floats(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A stock mask as a float mask that is added to the logits: True ("not allowed") becomes -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


def check(module: nn.Module) -> None:
    """Refuse a module in which a float mask would meet torch's fast path, in inference if not now.

    Raises:
        ConfigError: naming the layers.
    """
    if not torch.backends.mha.get_fastpath_enabled():
        return
    layers = [name or "the layer itself" for name, layer in module.named_modules() if _may_take_fast_path(layer)]
    if layers:
        some = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        raise ConfigError(
            f"in eval() without gradients torch reads a float mask as a boolean one in {some} (pytorch issue 118628): "
            "use stock.attach, stock.RotaryEncoderLayer, or torch.backends.mha.set_fastpath_enabled(False)"
        )


def _may_take_fast_path(layer: nn.Module) -> bool:
    """The conditions of `nn.TransformerEncoderLayer.forward` that no mode of running changes."""
    if (
        not isinstance(layer, nn.TransformerEncoderLayer)
        or type(layer).forward is not nn.TransformerEncoderLayer.forward
    ):
        return False
    attn = layer.self_attn
    # torch has no public name for whether a module has hooks, and a layer with one does not take the fast path.
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
    packed = attn.in_proj_weight is not None and attn.in_proj_bias is not None
    plain = packed and attn.batch_first and attn.num_heads % 2 == 0 and layer.norm1.eps == layer.norm2.eps
    return bool(plain and layer.activation_relu_or_gelu and not hooked)
