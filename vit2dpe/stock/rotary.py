"""An encoder layer that takes any encoding, under the stock layer's parameter names."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..attention.functional import attend, merge_heads
from ..encodings import PositionEncoding
from ..encodings.base import Sum, terms
from ..signal import Dense, Signal
from .masks import by_head, check_padding
from .places import dims_of, instance_of, layout_of, table_dtype


class RotaryEncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` with any encoding, computed by `vit2dpe.attend` in every mode.

    Args:
        args, kwargs: those of `nn.TransformerEncoderLayer`.
        position: a spec or an instance.
        grid, prefix: as for `attach`.
        every_layer: in an `nn.TransformerEncoder` each layer adds the token terms, and not the first alone.

    The parameters, their names and the order in which they are drawn are the stock layer's, and so its state_dict
    loads here and ours there; an encoding that learns adds `position.*`. `nn.TransformerEncoder` copies it as any
    layer; give that `enable_nested_tensor=False`, or it warns that it cannot nest. There token terms are added before
    the first layer, and belong to all, and an encoding that differs from block to block (`lookhere`) is that of its
    layer; a layer outside of one is a model of one layer. `is_causal` without a mask makes the mask.

    Unlike a subclass that overrides `_sa_block`, which the fast path passes by in inference.
    """

    def __init__(
        self,
        *args: Any,
        position: str | PositionEncoding = "rope",
        grid: int | tuple[int, ...],
        prefix: int = 0,
        every_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        _watch_stacks()
        super().__init__(*args, **kwargs)
        # nn.TransformerEncoder reads this to decide whether the layer takes nested tensors: it does not.
        self.activation_relu_or_gelu = 0
        self.places = layout_of(self, grid, prefix)
        self.train_grid = self.places.grid
        self.every_layer, self.adds_token = every_layer, True
        like = self.linear1.weight
        self.position = instance_of(position, dims_of(self, self.places)).to(like.device, table_dtype(like))

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        signal = self.position(self.places.of(src))
        x = self.places.plus(src, signal) if self.adds_token else src
        x = x if x.ndim == 3 else x[None]  # (N, L, E) or (L, N, E)
        x = x if self.places.batch_first or src.ndim == 2 else x.transpose(0, 1)
        signal, mask = self._masks(x, signal, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = x + self._attention(self.norm1(x), signal, mask)
            x = x + self._feed_forward(self.norm2(x))
        else:
            x = self.norm1(x + self._attention(x, signal, mask))
            x = self.norm2(x + self._feed_forward(x))
        if src.ndim == 2:
            return x[0]
        return x if self.places.batch_first else x.transpose(0, 1)

    def _attention(self, x: Tensor, signal: Signal, mask: Tensor | None) -> Tensor:
        attn = self.self_attn
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (N, H, L, E/H)
        out = attend(q, k, v, signal, mask, dropout=attn.dropout if self.training else 0.0)
        return self.dropout1(attn.out_proj(merge_heads(out)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    def _masks(
        self, x: Tensor, signal: Signal, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> tuple[Signal, Tensor | None]:
        """Stock masks as ours: a boolean one, True where attention is allowed, and float ones as bias terms."""
        n, length, allowed = x.shape[0], x.shape[1], None
        if mask is None and is_causal:
            allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        terms: list[Tensor] = []
        if mask is not None:
            terms.append(by_head(mask, n, self.self_attn.num_heads, length, length, "src_mask"))
        if padding is not None:
            check_padding(padding, n, length, "src_key_padding_mask")
            terms.append(padding.reshape(n, 1, 1, length).expand(-1, -1, length, -1))
        for term in terms:
            if term.dtype == torch.bool:
                allowed = ~term if allowed is None else allowed & ~term
            else:
                signal = signal.plus(Signal(bias=(Dense(term),)))
        return signal, allowed


@cache
def _watch_stacks() -> None:
    """From now on the layers of every `nn.TransformerEncoder` are numbered when it is built.

    It makes equal copies of one layer. The hook, which is torch's and serves the process, runs where modules are
    assigned to one another, and at no other time. (docs/decisions/0014)
    """
    register_module_module_registration_hook(_number_layers)


def _number_layers(module: nn.Module, name: str, given: nn.Module | None) -> None:
    if name != "layers" or not isinstance(module, nn.TransformerEncoder) or not isinstance(given, nn.ModuleList):
        return
    layers = [layer for layer in given if isinstance(layer, RotaryEncoderLayer)]
    for block, layer in enumerate(given):
        if isinstance(layer, RotaryEncoderLayer):
            layer.position.set_block(block, len(given))
            layer.adds_token = layer.every_layer or layer is layers[0]
            if not layer.adds_token:
                layer.position = _with_tokens_of(layers[0].position, layer.position)


def _with_tokens_of(first: PositionEncoding, position: PositionEncoding) -> PositionEncoding:
    """`position` with the terms of `first` that are tokens alone, so that no layer keeps a table that it never adds."""
    if len(terms(first)) != len(terms(position)):
        return position
    pairs = list(zip(terms(first), terms(position), strict=True))
    parts = [one if one.gives == other.gives == {"token"} else other for one, other in pairs]
    if isinstance(position, Sum):
        position.terms = nn.ModuleList(parts)
        return position
    return parts[0]
