"""Text that comes from data, such as tokens, in a picture: in a font that has its letters, and never as a formula.

A letter that no font of this machine has, and one that cannot be seen, is written by its number: U+6F22.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.text import Text

BOXES = "lastresort"  # fonts that have a box for every letter
LONGEST = 24  # of a text that is written; what is longer is cut
REGULAR = (400, 500, "normal", "regular", "book", "medium")


class Legible(NamedTuple):
    """Texts as they are written, and the families of fonts that have their letters, the usual one first."""

    texts: list[str]
    families: list[str]

    def style(self, labels: Iterable[Text]) -> None:
        """Draw labels in these fonts, and as they are: two $ in a token are no formula."""
        for label in labels:
            label.set_parse_math(False)
            label.set_fontfamily(self.families)


def legible(texts: Sequence[str]) -> Legible:
    """The texts, letters that no font here has by their numbers."""
    from matplotlib import rcParams

    families = list(rcParams["font.family"])
    known = frozenset[int]().union(*(letters(_usual(family)) for family in families))
    missing = {ord(letter) for text in texts for letter in text if _visible(letter)} - known
    others = _other_fonts() if missing else {}
    while missing:
        best = max(others, key=lambda family: len(missing & letters(others[family])), default="")
        found = missing & letters(others[best]) if best else set[int]()
        if not found:
            break
        families.append(best)
        known, missing = known | found, missing - found
    return Legible([_spelled(text, known) for text in texts], families)


def _spelled(text: str, known: frozenset[int]) -> str:
    words: list[str] = []  # of letters that are there, and the numbers of those that are not
    for there, run in groupby(text, lambda letter: ord(letter) in known and _visible(letter)):
        same = "".join(run)
        words += [same] if there else [f"U+{ord(letter):04X}" for letter in same]
    shown = " ".join(words)
    shown = f"{shown[: LONGEST - 1]}…" if len(shown) > LONGEST else shown
    return f"◌{shown}" if shown and unicodedata.category(shown[0]) == "Mn" else shown  # an accent stands on something


def _visible(letter: str) -> bool:
    return letter in " \n" or unicodedata.category(letter)[0] not in "CZ"


def _usual(family: str) -> str:
    from matplotlib import font_manager

    return str(font_manager.findfont(font_manager.FontProperties(family=[family])))


def _other_fonts() -> dict[str, str]:
    """The file of each upright family of ordinary weight."""
    from matplotlib import font_manager

    return {
        font.name: font.fname
        for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name)
        if font.style == "normal" and font.weight in REGULAR and BOXES not in font.name.replace(" ", "").lower()
    }


@cache
def letters(file: str) -> frozenset[int]:
    """The letters of a font; none of one that cannot be read, or that is made of pixels."""
    from matplotlib import font_manager

    with suppress(RuntimeError, OSError):
        font = font_manager.get_font(file)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    return frozenset()
