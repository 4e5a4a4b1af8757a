"""From what names an encoding to the encodings of a model: what all blocks share, and what each of them owns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

from ..errors import ConfigError
from ..spec import Term
from .base import PositionEncoding, terms
from .cycle import Cycle, over_blocks, sum_of
from .registry import ENCODINGS, Dims, parse_blocks

Position = str | PositionEncoding | Sequence[str | PositionEncoding]  # of all blocks, or of each in turn
Word = dict[Hashable, Callable[[Dims], PositionEncoding]]  # of each term what builds it; equal terms have equal keys


def split_shared_and_per_block(
    position: Position,
    dims: Dims,
    block_position: Position | None = None,
    grids: Sequence[tuple[int, ...]] | None = None,
) -> tuple[PositionEncoding, list[PositionEncoding | None]]:
    """Split an encoding between a model and its blocks: (shared, one per block).

    Terms that are `per_block` are built afresh for every block, the others once for all. `block_position` is an
    encoding that every block owns, whatever it is. An instance is copied, so that models made from one share nothing;
    what a block owns has its parameters drawn anew. `grids` are those of the blocks, where they differ.
    """
    words = words_of(position, dims.depth)
    built = build_once(words, dims)
    shared = [{key: part for key, part in word.items() if not part.per_block} for word in built]
    own = [[make for key, make in word.items() if built[i][key].per_block] for i, word in enumerate(words)]
    more = [{}] if block_position is None else words_of(block_position, dims.depth)
    blocks: list[PositionEncoding | None] = []
    for index in range(dims.depth):
        at_block = replace(dims, block=index, grid=dims.grid if grids is None else grids[index])
        makes = [*own[index % len(own)], *more[index % len(more)].values()]
        blocks.append(sum_of([make(at_block) for make in makes]) if makes else None)
    return over_blocks([list(word.values()) for word in shared]), blocks


def words_of(position: Position, depth: int) -> list[Word]:
    """The words that blocks follow in turn, each with its terms.

    Raises:
        ConfigError: for what is no encoding, and for more words than blocks.
    """
    if isinstance(position, Cycle):
        position = position.words()
    given = [position] if isinstance(position, str | PositionEncoding) else position
    if not isinstance(given, Sequence) or not given or not all(isinstance(w, str | PositionEncoding) for w in given):
        came = repr(position) if isinstance(position, Sequence) else type(position).__name__
        raise ConfigError(
            f"position must be a word, a PositionEncoding or a list of them, one for each block, got {came}; 'none' is "
            "a word"
        )
    words: list[Word] = []
    for one in given:
        if isinstance(one, str):
            spelled = parse_blocks(one)
            words += [{key: partial(ENCODINGS[name], **o) for key, (name, o) in _keyed(word)} for word in spelled]
        else:
            words.append({id(part): partial(_copy, part) for part in terms(one)})
    if len(words) > max(1, depth):
        raise ConfigError(f"{len(words)} words, one for each block in turn, and the model has {depth} blocks")
    return words


def _keyed(word: list[Term]) -> list[tuple[Hashable, Term]]:
    """The terms of a word with their keys; one that stands in it twice has two."""
    return [((str(term), word[:i].count(term)), term) for i, term in enumerate(word)]


def build_once(words: list[Word], dims: Dims) -> list[dict[Hashable, PositionEncoding]]:
    """The encodings of each word; a term that several words have is one encoding."""
    made: dict[Hashable, PositionEncoding] = {}
    for word in words:
        made |= {key: make(dims) for key, make in word.items() if key not in made}
    return [{key: made[key] for key in word} for word in words]


def _copy(term: PositionEncoding, dims: Dims) -> PositionEncoding:
    mine = copy.deepcopy(term)
    if dims.block is not None:
        mine.reset_parameters()
        mine.set_block(dims.block, dims.depth)
    return mine
