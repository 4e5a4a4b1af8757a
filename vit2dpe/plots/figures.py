"""matplotlib, imported when a picture is drawn: a new figure, a file of it, and which blocks are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError, install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS, HEADS = 4, 3  # at most so many are drawn, of those a model has


def need_matplotlib(rest: str = "") -> None:
    """Refuse pictures where they cannot be drawn, before the work of which they are the end.

    Args:
        rest: what else can be done, added to the error.

    Raises:
        ConfigError: without matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError(f"pictures need matplotlib: {install('recipes')}{rest}") from None


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """An empty figure of width x height inches.

    Raises:
        ConfigError: without matplotlib.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save_figure(figure: Figure, path: str | Path, dpi: float | None = None) -> Path:
    """Write a figure into a file; its suffix selects the format (.png, .svg, .pdf), without one .png is added. Its
    folder is made.

    Raises:
        ConfigError: for a suffix of no format, and a path that cannot be written.
    """
    path, formats = Path(path), figure.canvas.get_supported_filetypes()
    path = path if path.suffix or not path.name else path.with_name(f"{path.name}.png")
    suffix = path.suffix.lower()[1:]
    if suffix not in formats:
        known = ", ".join(f".{name}" for name in formats)
        raise ConfigError(f"a picture's suffix says its format: one of {known}; got {str(path)!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi="figure" if dpi is None else dpi, format=suffix)
    except OSError as error:
        raise ConfigError(f"cannot write the picture {path}: {error.strerror or error}") from None
    return path


def choose_blocks(names: Sequence[str]) -> list[str]:
    """Up to `BLOCKS` of the blocks, evenly spaced, the first and the last among them."""
    count = min(BLOCKS, len(names))
    step = max(1, len(names) - 1) / max(1, count - 1)
    return list(dict.fromkeys(names[round(i * step)] for i in range(count)))
