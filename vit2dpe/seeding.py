"""Seeds derived from a key, (seed, epoch, step, rank, purpose), for every random draw.

A draw is repeated without those before it: resuming needs no generator's state, and the number of workers is free.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key, in order; the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for this key: the same draws on every device."""
    return torch.Generator().manual_seed(derive_seed(*key))
