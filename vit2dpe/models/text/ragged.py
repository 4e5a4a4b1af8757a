"""Texts of different lengths in one batch: one behind the other in a row, or padded.

Legend: N tokens of a text, B texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...positions import Positions
from ...segments import Segments


def pack(sequences: Sequence[Tensor] | Tensor) -> tuple[Tensor, Segments]:
    """Texts one behind the other in a row without padding, for the text models: `model(tokens, segments=segments)`.

    Each text is what it is alone: places begin anew, and attention stays within it. What is computed for pairs of
    tokens is computed for pairs of one text, so that a row takes the memory of its texts and not (ΣN)².

    Args:
        sequences: token ids, (N,) each; or a nested tensor of them.

    Returns:
        tokens: (1, ΣN), and of which text each one is, `segments.numbers` (1, ΣN): outputs of text i are
            `out[segments.numbers == i]`.

    Raises:
        ConfigError: without a text, for an empty one, and for what is not (N,).
    """
    texts = list(sequences.unbind() if isinstance(sequences, Tensor) else sequences)
    if not texts or any(text.ndim != 1 for text in texts):
        raise ConfigError("pack takes a list of at least one sequence of token ids, each (N,)")
    return torch.cat(texts)[None], Segments.of([len(text) for text in texts], device=texts[0].device)


def pad(sequences: list[Tensor], value: int = 0, left: bool = False) -> tuple[Tensor, Tensor]:
    """A ragged batch as a padded one: token ids (B, N) and `valid` (B, N)."""
    longest = max((len(s) for s in sequences), default=0)
    ids, valid = [], []
    for s in sequences:
        sides = (longest - len(s), 0) if left else (0, longest - len(s))
        ids.append(F.pad(s, sides, value=value))
        valid.append(F.pad(torch.ones_like(s, dtype=torch.bool), sides, value=False))
    return torch.stack(ids), torch.stack(valid)


def packed_places(numbers: Tensor) -> Tensor:
    """(B|1, N) numbers of texts -> places (B|1, N) int64, which begin anew at each text."""
    step = torch.arange(numbers.shape[1], device=numbers.device)
    first = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    begin = torch.where(first, step, 0).cummax(dim=1).values  # (B|1, N) where each text begins
    return step - begin


def lines(segments: Segments, line: int) -> list[Positions]:
    """Where the tokens of each kind of texts are, on a line of this length.

    Raises:
        ConfigError: for a text that is longer than the line.
    """
    longest = max((group.length for group in segments.groups), default=0)
    if longest > line:
        raise too_long(longest, line)
    device = segments.numbers.device
    return [Positions.sequence(group.length, length=line, device=device) for group in segments.groups]


def too_long(longest: int, line: int) -> ConfigError:
    return ConfigError(f"a packed document has {longest} tokens, the line {line}: name the longest with length=")
