"""Model cards: what a model is, as the Hugging Face hub reads it and timm pushes it.

A card is the dict that `timm.models.push_to_hf_hub` takes as `model_card`; `save_card` writes the same text, by timm's
own writer, into a README.md. What nobody said stands in it as "not stated", never left out.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from timm.models._hub import generate_readme
from torch import nn

from ..encodings import PositionEncoding, Sum
from ..errors import ConfigError

UNKNOWN = "not stated"
HOLDS = 5.0  # points of accuracy that a size may cost and still be one that the model holds up at
CITATIONS = {
    "ViT": "@article{dosovitskiy2020vit, title={An Image is Worth 16x16 Words: Transformers for Image Recognition at "
    "Scale}, author={Dosovitskiy, Alexey and others}, journal={arXiv:2010.11929}, year={2020}}",
    "Swin": "@article{liu2021swin, title={Swin Transformer: Hierarchical Vision Transformer using Shifted Windows}, "
    "author={Liu, Ze and others}, journal={arXiv:2103.14030}, year={2021}}",
}


def card(
    model: Any,
    results: str | Path | Iterable[Mapping[str, Any]] | None = None,
    *,
    recipe: str = UNKNOWN,
    data: str = UNKNOWN,
    license: str = "other",
    description: str = "",
) -> dict[str, Any]:
    """What timm's `push_to_hf_hub` takes as `model_card`.

    Args:
        model: a ViT or a Swin, by `timm.create_model` or by hand.
        results: rows of `sweep` or `vit2dpe evaluate`, or the path of their results.csv; of this model alone.
        recipe: how it was trained: the command, and where the run is described.
        data: what it was trained on.
        license: of the weights, as the hub spells it ("apache-2.0"); the data have a say in it, so none is assumed.
        description: a sentence in front.

    Raises:
        ConfigError: for results that are no rows of a sweep.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or type(model).__name__
    patch, grid = model.patch_embed.patch_size, model.train_grid
    size = (grid[0] * patch[0], grid[1] * patch[1])
    rows = _rows(results)
    details: dict[str, Any] = {
        "Model type": f"image classification and features, {type(model).__name__} (`{name}`)",
        "Positional encoding": encoding_of(model),
        "Training size": f"{_spell(size)} pixels, {grid[0]}x{grid[1]} patches of {patch[0]}x{patch[1]}",
        "Other sizes": "any height and width that the patch divides",
        "Holds up at": _holds(rows, size),
        "Parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million",
        "Classes": model.num_classes,
        "Normalisation": f"mean {list(cfg.get('mean', []))}, std {list(cfg.get('std', []))}" if cfg else UNKNOWN,
        "Data": data,
        "Recipe": recipe,
        "Software": f"vit2dpe {version('vit2dpe')}",
    }
    found: dict[str, Any] = dict(
        tags=["image-classification", "timm", "vit2dpe", "positional-encoding"],
        license=license,
        description=description or f"A {type(model).__name__} whose positional encoding is {encoding_of(model)}.",
        details=details,
        usage=USAGE.format(height=size[0], width=size[1]),
    )
    if rows:
        found["comparison"] = _table(rows)
    if citation := CITATIONS.get(type(model).__name__):
        found["citation"] = citation
    return found


def save_card(model: Any, path: str | Path, results: Any = None, **said: Any) -> Path:
    """Write the model's card (arguments as for `card`): into README.md of a folder, or into a file named *.md.

    Beside `timm.models.save_for_hf(model, folder)` it makes the folder a complete entry of the hub;
    `timm.models.push_to_hf_hub(model, name, model_card=card(model, ...))` uploads the same.
    """
    path = Path(path)
    path = path if path.suffix == ".md" else path / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    text = generate_readme(card(model, results, **said), cfg.get("architecture") or type(model).__name__)
    path.write_text(text, encoding="utf-8")
    return path


def encoding_of(model: nn.Module) -> str:
    """The word that the model was built with; where it was built by hand, the classes of its encodings."""
    word = (getattr(model, "_model_args", None) or {}).get("position")
    inside = [m for m in model.modules() if isinstance(m, PositionEncoding) and m.gives and not isinstance(m, Sum)]
    classes = list(dict.fromkeys(f"`{type(m).__name__}`" for m in inside)) or ["none"]
    return f"`{word}` ({', '.join(classes)})" if isinstance(word, str) else ", ".join(classes)


USAGE = """
```python
import timm
import torch
import vit2dpe  # its names are known to timm from here on

model = timm.create_model("hf-hub:<user>/<name>", pretrained=True).eval()  # or local-dir:<folder>
logits = model(torch.randn(1, model.in_chans, {height}, {width}))
with vit2dpe.use_policy(model, "default"):  # or "interpolate", ...: what its encoding can take at another size
    logits = model(torch.randn(1, model.in_chans, {height}, 2 * {width}))
```
"""


def _rows(results: Any) -> list[dict[str, Any]]:
    if results is None:
        return []
    if isinstance(results, str | Path):
        with Path(results).open(newline="") as file:
            results = list(csv.DictReader(file))
    rows = [dict(row) for row in results]
    needed = {"policy", "temperature", "mode", "train_height", "train_width", "height", "width", "top1", "n"}
    if missing := needed - set(rows[0] if rows else ()):
        raise ConfigError(f"results must be rows of sweep, they lack {', '.join(sorted(missing))}")
    if len(several := {(row.get("encoding"), row.get("seed")) for row in rows}) > 1:
        raise ConfigError(f"results must be those of this model alone, they are of {len(several)} models")
    return [row | {key: float(row[key]) for key in needed - {"policy", "temperature", "mode"}} for row in rows]


def _holds(rows: list[dict[str, Any]], train: tuple[int, int]) -> str | list[str]:
    """The sizes, mode by mode, at which its best policy loses at most `HOLDS` points."""
    if not rows:
        return "not measured; `vit2dpe evaluate` measures it"
    said = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        best: dict[tuple[int, int], dict[str, Any]] = {}
        for row in (row for row in rows if row["mode"] == mode):
            at = (int(row["height"]), int(row["width"]))
            best[at] = max(best.get(at, row), row, key=lambda r: r["top1"])
        if train not in best:
            said.append(f"{mode}: not known, there is no result at the training size")
            continue
        good = [f"{_spell(at)} ({_way(r)})" for at, r in best.items() if r["top1"] >= best[train]["top1"] - HOLDS]
        said.append(f"{mode}: {', '.join(good)}; within {HOLDS:g} points of {best[train]['top1']:.1f}% top-1")
    return said


def _table(rows: list[dict[str, Any]]) -> str:
    sizes = sorted({(int(r["height"]), int(r["width"])) for r in rows}, key=lambda s: (s[0] * s[1], s))
    lines: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for row in rows:
        lines.setdefault((row["mode"], _way(row)), {})[int(row["height"]), int(row["width"])] = row["top1"]
    head = ["mode", "policy", *map(_spell, sizes)]
    body = [[*key, *(f"{at[s]:.1f}" if s in at else "" for s in sizes)] for key, at in lines.items()]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])
    return f"\nTop-1 in percent of {int(rows[0]['n']):,} images, over their size in pixels.\n\n{text}"


def _way(row: Mapping[str, Any]) -> str:
    return row["policy"] + ("" if row["temperature"] == "none" else f", {row['temperature']}")


def _spell(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
