"""Model cards in the format of the Hugging Face hub and of timm's `push_to_hf_hub`.

A card is the dict that `timm.models.push_to_hf_hub` takes as `model_card`; `save_card` writes the text that timm makes
of it into a README.md. Facts that were not given appear as "not stated".
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from timm.models import get_model_args
from torch import nn

from ..encodings import encodings_of
from ..errors import ConfigError
from ..spec import join_blocks
from .timm_api import TimmModel, pretrained_cfg_of, recorded_policies

UNKNOWN = "not stated"
EXCHANGED = "Encoding exchanged"
HOLDS = 5.0  # points of accuracy that a size may cost and still be one that the model holds up at
CITATIONS = {
    "ViT": "@article{dosovitskiy2020vit, title={An Image is Worth 16x16 Words: Transformers for Image Recognition at "
    "Scale}, author={Dosovitskiy, Alexey and others}, journal={arXiv:2010.11929}, year={2020}}",
    "Swin": "@article{liu2021swin, title={Swin Transformer: Hierarchical Vision Transformer using Shifted Windows}, "
    "author={Liu, Ze and others}, journal={arXiv:2103.14030}, year={2021}}",
}
HUB_LICENSES = (
    "apache-2.0",
    "mit",
    "cc-by-nc-4.0",
    "apple-ascl",
    "apple-amlr",
)  # of timm's weights; others have a name
Results = str | Path | Iterable[Mapping[str, str | float | None]]  # rows of a sweep, or the path of their csv


class Card(TypedDict):
    """The `model_card` of timm's `push_to_hf_hub`."""

    tags: list[str]
    license: str
    license_name: NotRequired[str]
    base_model: NotRequired[str]  # in the README.md of `save_card` alone: timm writes none
    description: str
    details: dict[str, str | list[str]]
    usage: str
    comparison: NotRequired[str]
    citation: NotRequired[str]


class Measured(NamedTuple):
    """A row of a sweep: top-1 in percent of n images of a size, under a policy (and length temperature)."""

    mode: str
    policy: str
    size: tuple[int, int]
    top1: float
    n: int


def card(
    model: TimmModel,
    results: Results | None = None,
    *,
    recipe: str = UNKNOWN,
    data: str = UNKNOWN,
    license: str | None = None,
    description: str = "",
) -> Card:
    """The `model_card` of a model for timm's `push_to_hf_hub`.

    Args:
        model: a ViT or a Swin, by `timm.create_model` or by hand.
        results: rows of `sweep` or `vit2dpe evaluate`, or the path of their results.csv; of this model alone.
        recipe: how it was trained: the command, and where the run is described.
        data: what it was trained on.
        license: of the weights, as the hub spells it ("apache-2.0"). Default: that of timm's weights, for a model that
            came from them through `from_timm`; else "other", because the data constrain it.
        description: a sentence in front.

    Raises:
        ConfigError: for results that are no rows of a sweep.
    """
    kind, cfg, record = type(model).__name__, pretrained_cfg_of(model), get_model_args(model).get("record", {})
    base, weights = get_model_args(model).get("base"), record.get("weights")
    license = license or (cfg.get("license") if weights else None) or "other"
    origin = "" if base is None else f", from timm's `{base}`"
    patch, grid = model.patch_embed.patch_size, model.train_grid
    size = tuple(n * p for n, p in zip(grid, patch, strict=True))
    rows, free = _rows(results), model.patch_embed.any_size
    usage, larger = (USAGE if len(size) == 2 else BY_CLASS), (*size[:-1], f"2 * {size[-1]}")
    sides, other = (", ".join(map(str, one)) for one in (size, larger))
    elsewhere = ELSEWHERE.format(sides=other) if free else ""
    made = Card(
        tags=["image-classification", "timm", "vit2dpe", "positional-encoding"],
        license=license,
        description=description or f"A {kind} whose positional encoding is {encoding_of(model)}{origin}.",
        details={
            "Model type": f"image classification and features, {kind} (`{_name(model)}`)",
            "Positional encoding": encoding_of(model),
            "Training size": f"{_spell(size)} pixels, {_spell(grid)} patches of {_spell(patch)}",
            "Other sizes": other_sizes(model),
            "Holds up at": _holds(rows, size),
            "Parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million",
            "Classes": str(model.num_classes),
            "Normalisation": f"mean {[*cfg.get('mean', ())]}, std {[*cfg.get('std', ())]}"
            if "mean" in cfg
            else UNKNOWN,
            "Data": data,
            "Recipe": recipe,
            "Software": f"vit2dpe {version('vit2dpe')}",
        },
        usage=usage.format(sides=sides, elsewhere=elsewhere),
    )
    if getattr(model, "windowing", None) is not None:
        made["details"]["Windows"] = str(model.windowing)
    if exchange := _exchange(model):
        made["details"][EXCHANGED] = exchange
    if base is not None:
        named = f"timm's record names the weights {weights}" if weights else "not from timm's weights"
        made["details"] |= {"Base model": f"timm's `{base}`; {named}"}
    if weights:
        made["base_model"] = weights
    if license not in (*HUB_LICENSES, "other") and license == cfg.get("license"):
        made |= {"license": "other", "license_name": license}
    if rows:
        made["comparison"] = _table(rows)
    for cited in type(model).__mro__:
        if cited.__name__ in CITATIONS:
            made["citation"] = CITATIONS[cited.__name__]
    return made


def save_card(model: TimmModel, path: str | Path, results: Results | None = None, **stated: str) -> Path:
    """Write the model's card (arguments as for `card`): into README.md of a folder, or into a file named *.md.

    Beside `timm.models.save_for_hf(model, folder)` it makes the folder a complete entry of the hub;
    `timm.models.push_to_hf_hub(model, name, model_card=card(model, ...))` uploads the same.
    """
    path = Path(path)
    path = path if path.suffix == ".md" else path / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_readme(card(model, results, **stated), _name(model)), encoding="utf-8")
    return path


def note_exchange(model: nn.Module) -> None:
    """Have timm's record of a model that `vit2dpe swap` made name the exchange, for hub folders and later cards."""
    cfg, exchange = pretrained_cfg_of(model), _exchange(model)
    if cfg and exchange:
        others = [note for note in cfg.get("notes") or () if not note.startswith(EXCHANGED)]
        noted = {**cfg, "notes": (*others, f"{EXCHANGED}: {exchange}")}
        vars(model).update(pretrained_cfg=noted, default_cfg=noted)


def _exchange(model: nn.Module) -> str | None:
    """Which encoding was exchanged for which: of a run, or as it is noted."""
    exchanged = (vars(model).get("about") or {}).get("swap")
    if isinstance(exchanged, dict):
        images = f"{exchanged['images']:,} images without labels"
        return f"`{exchanged['from']}` for `{exchanged['to']}`, recovered from {images}"
    notes = (note.partition(": ") for note in pretrained_cfg_of(model).get("notes") or ())
    return next((text for name, _, text in notes if name == EXCHANGED), None)


def other_sizes(model: TimmModel) -> str:
    """Which other sizes a model takes, and its own policies there."""
    if not model.patch_embed.any_size:
        return "none"
    policies = "".join(
        f", `{policy}`" + (f" with temperature `{temperature}`" if temperature not in (None, "none") else "")
        for policy, temperature in recorded_policies(model)
    )
    sides = "height and width" if len(model.train_grid) == 2 else "sides"
    return f"any {sides} that the patch divides{policies}"


def encoding_of(model: nn.Module) -> str:
    """The spec that the model was built with; where it was built by hand, the classes of its encodings."""
    spec = join_blocks(get_model_args(model).get("position"))
    classes = list(dict.fromkeys(f"`{type(encoding).__name__}`" for encoding in encodings_of(model))) or ["none"]
    return f"`{spec}` ({', '.join(classes)})" if isinstance(spec, str) else ", ".join(classes)


USAGE = """
```python
import timm
import torch
import vit2dpe  # its names are known to timm from here on

model = timm.create_model("hf-hub:<user>/<name>", pretrained=True).eval()  # or local-dir:<folder>
logits = model(torch.randn(1, model.in_chans, {sides}))
{elsewhere}```
"""
BY_CLASS = """
```python
import torch
import vit2dpe

model = vit2dpe.load_run("<folder>")  # what vit2dpe.training.save_model wrote: timm has no names of videos and lines
logits = model(torch.randn(1, model.in_chans, {sides}))
{elsewhere}```
"""
ELSEWHERE = """\
with vit2dpe.use_policy(model, "default"):  # or "interpolate", ...: what its encoding can take at another size
    logits = model(torch.randn(1, model.in_chans, {sides}))
"""


def _readme(made: Card, name: str) -> str:
    """The text that `push_to_hf_hub` makes of a card (timm writes it to the hub alone); a test compares the two."""
    lines = ["---", "tags:", *(f"- {tag}" for tag in made["tags"]), "pipeline_tag: image-classification"]
    lines += ["library_name: timm", f"license: {made['license']}"]
    lines += [f"{key}: {made[key]}" for key in ("license_name", "base_model") if key in made]
    lines += ["---", f"# Model card for {name}"]
    lines += ["", made["description"], "", "## Model Details"]
    for key, value in made["details"].items():
        listed = (
            [f"- **{key}:** {value}"] if isinstance(value, str) else [f"- **{key}:**", *(f"  - {v}" for v in value)]
        )
        lines += listed
    lines += ["", "## Model Usage", made["usage"]]
    if "comparison" in made:
        lines += ["", "## Model Comparison", made["comparison"]]
    if "citation" in made:
        lines += ["", "## Citation", "```bibtex", made["citation"], "```"]
    return "\n".join(lines) + "\n"


def _name(model: nn.Module) -> str:
    """timm's name of what it came from, or of itself."""
    name: str | None = get_model_args(model).get("base") or pretrained_cfg_of(model).get("architecture")
    return name or type(model).__name__


def _rows(results: Results | None) -> list[Measured]:
    if results is None:
        return []
    if isinstance(results, str | Path):
        with Path(results).open(newline="") as file:
            results = list(csv.DictReader(file))
    rows = [{key: str(value) for key, value in row.items()} for row in results]
    needed = {"policy", "temperature", "mode", "train_height", "train_width", "height", "width", "top1", "n"}
    if missing := needed - set(rows[0] if rows else ()):
        raise ConfigError(f"results must be rows of sweep, they lack {', '.join(sorted(missing))}")
    if len(several := {(row.get("encoding"), row.get("seed"), row.get("depth")) for row in rows}) > 1:
        raise ConfigError(f"results must be those of this model alone, they are of {len(several)} models")
    measured = []
    for row in rows:
        policy = row["policy"] + ("" if row["temperature"] == "none" else f", {row['temperature']}")
        size = (int(float(row["height"])), int(float(row["width"])))
        measured.append(Measured(row["mode"], policy, size, float(row["top1"]), int(float(row["n"]))))
    return measured


def _holds(rows: list[Measured], train: tuple[int, ...]) -> str | list[str]:
    """The sizes, mode by mode, at which its best policy loses at most `HOLDS` points."""
    if not rows:
        return "not measured; `vit2dpe evaluate` measures it"
    lines = []
    for mode in dict.fromkeys(row.mode for row in rows):
        best: dict[tuple[int, ...], Measured] = {}
        for row in (row for row in rows if row.mode == mode):
            best[row.size] = max(best.get(row.size, row), row, key=lambda r: r.top1)
        if train not in best:
            lines.append(f"{mode}: not known, there is no result at the training size")
            continue
        good = [f"{_spell(size)} ({r.policy})" for size, r in best.items() if r.top1 >= best[train].top1 - HOLDS]
        lines.append(f"{mode}: {', '.join(good)}; within {HOLDS:g} points of {best[train].top1:.1f}% top-1")
    return lines


def _table(rows: list[Measured]) -> str:
    sizes = sorted({row.size for row in rows}, key=lambda size: (size[0] * size[1], size))
    lines: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for row in rows:
        lines.setdefault((row.mode, row.policy), {})[row.size] = row.top1
    head = ["mode", "policy", *map(_spell, sizes)]
    body = [[*key, *(f"{at[s]:.1f}" if s in at else "" for s in sizes)] for key, at in lines.items()]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])
    return f"\nTop-1 in percent of {rows[0].n:,} images, over their size in pixels.\n\n{text}"


def _spell(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
