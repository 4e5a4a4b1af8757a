"""Words by block: `rope/rope/rope/none` turns queries and keys in three blocks of four.

    block i follows word i mod n of n words

What a word adds to tokens acts once, before the first block, and stands in the first word. What blocks share is
computed once a forward and handed to those that use it; what is `per_block` is built for the blocks whose word has it.

Source: layers without positions among rotary ones are RNoPE's (arXiv 2501.18795); every fourth in SmolLM3 and Llama 4
(transformers: `no_rope_layer_interval`). How ours differs: any words, sums of them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

from ..errors import ConfigError
from ..positions import Positions
from ..signal import Signal
from .base import NoPosition, PositionEncoding, Sum, terms


class Cycle(Sum):
    """What blocks share that follow different words: its Signal has a part for each word.

    Args:
        encodings: each is computed once.
        order: for each word, which of them its blocks follow.
    """

    def __init__(self, encodings: Sequence[PositionEncoding], order: Sequence[Sequence[int]]) -> None:
        super().__init__(encodings)
        self.order = [tuple(word) for word in order]

    def words(self) -> list[PositionEncoding]:
        """For each word, the encoding of its blocks, what is added to tokens in the first."""
        parts = terms(self)
        tokens = [i for i, part in enumerate(parts) if "token" in part.gives]
        chosen = [sorted({*self.order[0], *tokens}), *self.order[1:]]
        return [sum_of([parts[i] for i in word]) for word in chosen]

    def _signal(self, q: Positions, k: Positions) -> Signal:
        parts = [part(q, k) for part in self.terms]
        shared = Signal(temperature=self._temperature(k))
        for part in parts:
            shared = shared.plus(Signal(token=part.token))
        rest = [Signal(None, part.q_rotation, part.k_rotation, part.bias, part.temperature) for part in parts]
        distinct = list(dict.fromkeys(self.order))
        blocks = tuple([reduce(Signal.plus, [rest[i] for i in word], Signal()) for word in distinct])
        return shared.with_blocks(blocks, tuple([distinct.index(word) for word in self.order]))

    def extra_repr(self) -> str:
        return f"order={self.order}"


def over_blocks(words: Sequence[Sequence[PositionEncoding]]) -> PositionEncoding:
    """The encoding that blocks share, of the shared encodings of each word.

    Raises:
        ConfigError: for a later word that adds to tokens.
    """
    if len(words) == 1:
        return sum_of(words[0])
    parts = list({id(part): part for word in words for part in word if part.gives}.values())
    for part in parts:
        if "token" in part.gives and not any(part is one for one in words[0]):
            raise ConfigError(
                f"{type(part).__name__} adds to tokens once, before the first block: write it into the first word, "
                "such as sincos+rope/none"
            )
    acting = {id(part): i for i, part in enumerate(parts) if part.gives != {"token"}}
    order = [sorted(acting[id(part)] for part in word if id(part) in acting) for word in words]
    return sum_of(parts) if all(word == order[0] for word in order) else Cycle(parts, order)


def sum_of(parts: Sequence[PositionEncoding]) -> PositionEncoding:
    """Their sum; `none` of none."""
    return reduce(add, parts) if parts else NoPosition()
