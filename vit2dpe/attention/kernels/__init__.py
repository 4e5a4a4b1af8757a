"""Implementations that are faster than the plain one where they serve; each states when, and what to do elsewhere."""

from __future__ import annotations

from typing import NamedTuple


class Selection(NamedTuple):
    """The implementation that is used, and the reason."""

    path: str
    why: str
