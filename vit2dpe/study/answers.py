"""Which test images each row of a study had right: a bit an image, beside the rows.

Equal numbers of right images hide how often two models differ; a comparison of models on the same images needs the
images. A file holds packed bits in the order of the rows of its table, and the digest of that table: where the two do
not belong together the bits are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_atomically

ANSWERS = "answers.safetensors"  # beside results.csv
Right = Tensor | None  # (n,) booleans of a row; None where nothing was kept


def write_answers(path: Path, answers: Sequence[Right], table: bytes) -> None:
    """Write the answers of all rows of a table; nothing where no row has any."""
    kept = [right for right in answers if right is not None]
    if not kept:
        return
    most = max(len(right) for right in kept)
    bits = torch.zeros(len(answers), -(-most // 8) * 8, dtype=torch.uint8)
    for i, right in enumerate(answers):
        if right is not None:
            bits[i, : len(right)] = right
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    packed = (bits.view(len(answers), -1, 8) * powers).sum(-1, dtype=torch.uint8)  # (rows, n / 8)
    counts = torch.tensor([-1 if right is None else len(right) for right in answers])
    write_atomically(path, save({"right": packed, "n": counts}, metadata={"table": _digest(table)}))


def read_answers(path: Path, table: Path, rows: int) -> list[Right]:
    """The answers of the rows of a table; None for each where the file is missing, or belongs to another table."""
    nothing: list[Right] = [None] * rows
    try:
        with safe_open(path, "pt") as file:
            packed, counts, meta = file.get_tensor("right"), file.get_tensor("n"), file.metadata() or {}
        if meta.get("table") != _digest(table.read_bytes()):
            return nothing
    except (OSError, SafetensorError):
        return nothing
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    answers = bits.view(len(packed), -1).bool()
    found: list[Right] = [None if n < 0 else one[:n] for one, n in zip(answers, counts.tolist(), strict=True)]
    return found if len(found) == rows else nothing


def _digest(table: bytes) -> str:
    return hashlib.sha256(table).hexdigest()
