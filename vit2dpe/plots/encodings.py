"""Pictures of encodings: their effect on attention, for one query.

    token      cosine similarity of the vector in the centre, and of that in a corner, with the vectors everywhere
    rotation   mean over pairs of channels of cos(angle(q) - angle(k)), the query in the centre, for each head
    bias       the bias on the logits, the query in the centre, for each head

The fields that an encoding `gives` decide its panels and its Signal fills them, so an encoding that joins `ENCODINGS`
later is drawn as well. Rows run downward. Within a figure one scale serves all panels of a kind.

Legend: N places, H heads, D width, Dh head width. A leading 1 stands for "all samples".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.contract import probed
from ..encodings import ENCODINGS, Dims, PositionEncoding, parse
from ..errors import ConfigError
from ..positions import Positions
from ..signal import Dense, Rotation, Signal
from ..spec import split_blocks
from .figures import HEADS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

HIDDEN = -1e4  # a bias below it hides the key: it is drawn grey and is no part of the scale
KINDS = {"similarity": "cosine similarity", "kernel": "mean cosine", "bias": "bias on the logits"}


class Panel(NamedTuple):
    """One picture: `values` (*grid) seen from the place `query`; of the kind "text" it is the detail alone."""

    kind: str
    detail: str
    values: Tensor = torch.empty(0)
    query: tuple[int, ...] = ()


def draw(
    specs: Sequence[str], grid: tuple[int, ...] = (14, 14), *, width: int = 192, heads: int = 3, seed: int = 0
) -> Figure:
    """A figure with a row for each encoding and for each term of a sum: images, or curves on a line.

    Args:
        specs: encodings as models read them, of words by block each; "all": every name, with the reason where one
            refuses the grid.
        grid: two sizes (an image, rows before columns) or one (a text).
        width, heads, seed: of the model that the encodings are built for; learned ones are drawn as initialised.

    Raises:
        ConfigError: for no specs, an unknown one, or sizes that cannot be drawn; without matplotlib.
    """
    if len(grid) not in (1, 2):
        raise ConfigError(f"a picture has one or two axes: got grid={tuple(grid)}")
    dims = Dims(width, heads, tuple(grid))
    rows: list[tuple[str, list[Panel]]] = []
    for spec in [specs] if isinstance(specs, str) else specs:
        for name in ENCODINGS if spec == "all" else dict.fromkeys(split_blocks(spec)):
            try:
                rows += _rows(name, dims, seed)
            except ConfigError as error:
                if spec != "all":
                    raise
                rows.append((name, [Panel("text", fill(shorten(f"refused: {error}", 140), 75))]))
    if not rows:
        raise ConfigError("name at least one encoding to draw, or 'all'")
    return figure_of(rows)


def save(
    specs: Sequence[str],
    grid: tuple[int, ...],
    path: str | Path,
    *,
    width: int = 192,
    heads: int = 3,
    seed: int = 0,
) -> Path:
    """Draw into a file; its suffix selects the format (.png, .svg, .pdf); arguments as for `draw`."""
    return save_figure(draw(specs, grid, width=width, heads=heads, seed=seed), path)


def _rows(spec: str, dims: Dims, seed: int) -> Iterator[tuple[str, list[Panel]]]:
    """(title, panels) of each term of a sum, then of fields that several terms give together."""
    each, note = list[tuple[str, PositionEncoding]](), ""
    for name, options in parse(spec):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoding = ENCODINGS[name](dims, **options).eval()
        learned = " (at initialisation)" if any(True for _ in encoding.parameters()) else ""
        note = note or learned
        listed = ", ".join(f"{key}={value}" for key, value in options.items())
        each.append(((f"{name}({listed})" if listed else name) + learned, encoding))
    yield from panels_of(each, dims.grid, f"{spec}, summed{note}")


def panels_of(
    each: Sequence[tuple[str, PositionEncoding]], grid: tuple[int, ...], summed: str
) -> Iterator[tuple[str, list[Panel]]]:
    """(title, panels) of each encoding on a grid, then, under the title `summed`, of fields that several give."""
    signals, fields = list[Signal](), list[str]()
    for title, encoding in each:
        signals.append(from_centre(encoding, grid))
        fields += encoding.gives
        yield title, panels(encoding.gives, signals[-1], grid)
    if several := frozenset(field for field in fields if fields.count(field) > 1):
        yield summed, panels(several, reduce(Signal.plus, signals), grid)


@torch.no_grad()
def from_centre(encoding: PositionEncoding, grid: tuple[int, ...]) -> Signal:
    """The Signal of one query in the centre and keys at all N places, with the vectors (1, N, D) of them all.

    It is on the CPU, wherever the encoding is, and so can be added to that of an encoding without parameters.
    """
    device = next((parameter.device for parameter in encoding.parameters()), None)
    at = Positions.grid(grid, device)
    centre = [size // 2 for size in grid]
    here = Positions(torch.tensor([[centre]], dtype=torch.float32, device=device), grid, on_grid=True)
    signal, token = probed(encoding(here, at)), encoding(at, here).token  # N logits, not N x N
    q, k = (
        None if turn is None else Rotation(turn.cos.cpu(), turn.sin.cpu())
        for turn in (signal.q_rotation, signal.k_rotation)
    )
    dense = tuple(Dense(term.dense().cpu()) for term in signal.bias)
    return Signal(None if token is None else token.cpu(), q, k, dense, signal.temperature)


def panels(gives: frozenset[str], signal: Signal, grid: tuple[int, ...]) -> list[Panel]:
    """Similarities, kernels, biases of one encoding; a text if it gives nothing."""
    centre, corner = tuple(size // 2 for size in grid), (0,) * len(grid)
    drawn = []
    if "token" in gives and signal.token is not None:
        token = signal.token[0].view(*grid, -1)
        for query, where in ((centre, "the centre"), (corner, "a corner" if len(grid) > 1 else "the start")):
            drawn.append(Panel("similarity", f"token, from {where}", similarity(token, query), query))
    for field, kind, measure in (("rotation", "kernel", kernel), ("bias", "bias", bias)):
        every = measure(signal) if field in gives else torch.empty(0)
        for head, values in enumerate(every[:HEADS]):
            which = f"head {head}" if len(every) > 1 else "every head"
            drawn.append(Panel(kind, f"{field}, {which}", values.view(grid), centre))
    return drawn or [Panel("text", "gives nothing: attention sees a set of tokens, in no order")]


def similarity(token: Tensor, query: tuple[int, ...]) -> Tensor:
    """(*grid, D) -> (*grid) cosine similarity of the vector at one place with all."""
    return F.cosine_similarity(token[query], token, dim=-1)


def kernel(signal: Signal) -> Tensor:
    """(1|H, N) mean over Dh/2 pairs of cos(angle(q) - angle(k)): the share of q·k left between equal q and k."""
    q, k = signal.q_rotation, signal.k_rotation
    if q is None or k is None:
        return torch.empty(0)
    return (q.cos * k.cos + q.sin * k.sin)[0].mean(dim=-1)


def bias(signal: Signal) -> Tensor:
    """(H, N) all terms together; NaN where the key is hidden."""
    total = reduce(Tensor.add, (term.dense().detach()[0, :, 0] for term in signal.bias))
    return total.masked_fill(total < HIDDEN, float("nan"))


class _Size(NamedTuple):
    """Inches of the panels of a row: their own, and of what is between them and beside the last of a kind."""

    width: float
    height: float
    between: float
    bar: float


def _size(row: Sequence[Panel]) -> _Size:
    grid = row[0].values.shape
    if row[0].kind == "text" or len(grid) == 1:
        return _Size(2.4, 1.5, 0.8, 0.0)
    cell = 2.2 / max(grid)
    return _Size(max(cell * grid[1], 1.9), max(cell * grid[0], 0.6), 0.6, 0.75)


def figure_of(rows: Sequence[tuple[str, list[Panel]]]) -> Figure:
    """Rows of panels; all sizes are inches, so that a panel looks the same in any figure."""
    rows = [(title, [panel._replace(values=panel.values.cpu()) for panel in row]) for title, row in rows]
    left, above, below = 0.75, 0.55, 0.55
    sizes = [_size(row) for _, row in rows]
    wide = max(
        left + len(row) * (size.width + size.between) + size.bar * len({p.kind for p in row})
        for (_, row), size in zip(rows, sizes, strict=True)
    )
    wide = max(wide, *(0.095 * len(title) + 1.0 for title, _ in rows))
    tall = [
        0.8 if row[0].kind == "text" else above + size.height + below
        for (_, row), size in zip(rows, sizes, strict=True)
    ]
    figure = new_figure(max(wide, 5.0), sum(tall))
    inch_x, inch_y = 1 / figure.get_size_inches()
    scales = {kind: _scale(kind, [p for _, row in rows for p in row if p.kind == kind]) for kind in KINDS}
    top = sum(tall)
    for (title, row), high, (width, height, between, bar) in zip(rows, tall, sizes, strict=True):
        figure.text(left * inch_x, (top - 0.27) * inch_y, title, fontsize=11, fontweight="bold")
        x = left
        for panel, after in zip(row, [*row[1:], None], strict=True):
            if panel.kind == "text":
                figure.text(x * inch_x, (top - 0.35) * inch_y, panel.detail, fontsize=9, va="top")
                continue
            box = (x * inch_x, (top - above - height) * inch_y, width * inch_x, height * inch_y)
            last = after is None or after.kind != panel.kind
            _paint(figure.add_axes(box), panel, scales[panel.kind], last)
            x += width + between + bar * last
        top -= high
    return figure


def _scale(kind: str, panels: list[Panel]) -> Normalize:
    """The scale of all panels of a kind: similarities up to 1, the others centred at 0."""
    from matplotlib.colors import Normalize

    values = torch.cat([torch.zeros(1), *(panel.values.flatten() for panel in panels)]).nan_to_num()
    if kind == "similarity":
        return Normalize(float(values.min()), 1.0)
    most = float(values.abs().max()) or 1.0
    return Normalize(-most, most)


def _paint(ax: Axes, panel: Panel, scale: Normalize, last: bool) -> None:
    hidden = panel.values.isnan()
    low, high = panel.values[~hidden].add(0.0).aminmax()  # names values that are pale on the common scale; never -0
    note = ", grey: hidden" * bool(hidden.any())
    ax.set_title(f"{panel.detail}: {low:.2g} to {high:.2g}{note}", fontsize=9, loc="left", pad=4)
    (_curve if panel.values.ndim == 1 else _image)(ax, panel, scale, last)


def _image(ax: Axes, panel: Panel, scale: Normalize, last: bool) -> None:
    ax.set_facecolor("0.8")  # shows through where keys are hidden
    colours = "viridis" if panel.kind == "similarity" else "RdBu_r"
    image = ax.imshow(panel.values.numpy(), norm=scale, cmap=colours, origin="upper")
    row, column = panel.query
    _mark(ax, column, row)
    ax.set(xlabel="column", ylabel="row", anchor="NW")
    ax.locator_params(integer=True)
    if last:
        bar = 0.05 * max(panel.values.shape) / panel.values.shape[1]  # as thick beside a narrow picture as beside any
        ax.figure.colorbar(image, ax.inset_axes((1 + bar, 0, bar, 1)), label=KINDS[panel.kind])


def _curve(ax: Axes, panel: Panel, scale: Normalize, last: bool) -> None:
    (query,) = panel.query
    ax.axhline(0, color="0.8", linewidth=0.8)
    ax.plot(panel.values.numpy())
    _mark(ax, query, float(panel.values[query]))
    ax.set(xlabel="place", ylabel=KINDS[panel.kind], ylim=(1.08 * (scale.vmin or 0.0), 1.08 * (scale.vmax or 0.0)))
    ax.locator_params(axis="x", integer=True)


def _mark(ax: Axes, x: float, y: float) -> None:
    """A circle at the query."""
    ax.plot(x, y, "o", markersize=6, markerfacecolor="white", markeredgecolor="black")
