"""The block of the text models: `layers.Block` with the norm before or after, a cache, and cross-attention by choice.

Legend: B batch, N tokens, S tokens of the memory, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...attention.cache import LayerCache
from ...attention.functional import Mask
from ...attention.modules import CrossAttention
from ...attention.tiles import Tiles
from ...encodings import PositionEncoding
from ...positions import Positions
from ...signal import Signal
from ..layers import Block, add_token, drop_branch
from ..parts import mlp_factory, norm_factory


class Memory(NamedTuple):
    """Input of cross-attention: an encoder's output (B, S, D) and a mask, False at padding, if there is any.

    The Signal is that between the decoder's places and the encoder's; empty unless `cross_position` is named.
    """

    tokens: Tensor
    mask: Tensor | None = None
    signal: Signal = Signal()


class TextBlock(Block):
    """A transformer block for sequences.

    Args:
        dim, heads: D and H.
        norm: a name in `layers.NORMS`, with `eps`; the same for queries and keys where `qk_norm` is on.
        mlp: "gelu", "gelu_tanh", "relu", or gated: "swiglu", "geglu", "geglu_tanh"; see `layers.mlp_factory`.
        hidden: channels inside the MLP.
        post_norm: norm after each residual sum (BERT, the first transformer) instead of before each branch.
        cross: whether there is cross-attention, between attention and MLP.
        bias: whether linear maps have biases (norms keep theirs).
        **block: further arguments of `layers.Block`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        norm: str = "layer",
        eps: float = 1e-5,
        mlp: str = "gelu",
        hidden: int,
        post_norm: bool = False,
        cross: bool = False,
        bias: bool = True,
        **block: Any,
    ) -> None:
        make_norm, make_mlp = norm_factory(norm, eps), mlp_factory(mlp)
        super().__init__(
            dim,
            heads,
            norm_layer=make_norm,
            mlp_layer=lambda width, _, **rest: make_mlp(width, hidden, **rest),
            qkv_bias=bias,
            proj_bias=bias,
            **block,
        )
        self.post_norm = post_norm
        self.norm_cross = make_norm(dim) if cross else None
        self.cross = None
        if cross:
            same = {name: block[name] for name in ("scale", "attn_drop", "proj_drop") if name in block}
            self.cross = CrossAttention(dim, heads, bias=bias, proj_bias=bias, **same)

    def forward(
        self,
        x: Tensor,
        signal: Signal,
        at: Positions,
        mask: Mask | Tiles | None = None,
        *,
        keys: Positions | None = None,
        cache: LayerCache | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            signal: shared by all blocks, for queries at `at` and keys at `keys`; its rotations are those of `at`.
            keys: where the keys are, cached ones first; default: at.
        """
        if self.attn.position is not None:
            own = signal_of(self.attn.position, at, keys)
            x, signal = add_token(x, own), signal.plus(own)
        x = self._sum(x, self.norm1, self.drop_path1, at, lambda y: self.ls1(self.attn(y, signal, mask, cache)))
        if self.cross is not None and self.norm_cross is not None and memory is not None:
            read = self.cross
            seen = (memory.tokens, memory.signal, memory.mask, cache)
            x = self._sum(x, self.norm_cross, self.drop_path1, at, lambda y: read(y, *seen))
        return self._sum(x, self.norm2, self.drop_path2, at, lambda y: self.ls2(self.mlp(y)))

    def _sum(
        self, x: Tensor, norm: nn.Module, drop_path: nn.Module, at: Positions, branch: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if not self.post_norm:
            return x + drop_branch(branch(norm(x)), drop_path, at)
        out: Tensor = norm(x + drop_branch(branch(x), drop_path, at))
        return out


def signal_of(position: nn.Module, at: Positions, keys: Positions | None) -> Signal:
    """The Signal of new tokens at `at` among keys at `keys`: rotations of the new ones alone, a bias to all keys."""
    signal: Signal = position(at)
    if keys is None or keys is at or not isinstance(position, PositionEncoding) or "bias" not in position.gives:
        return signal
    return _with_bias_of(signal, position(at, keys))


def _with_bias_of(signal: Signal, among: Signal) -> Signal:
    blocks = tuple([_with_bias_of(*pair) for pair in zip(signal.blocks, among.blocks, strict=True)])
    return signal.with_bias(among.bias).with_blocks(blocks, signal.order)
