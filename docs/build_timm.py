"""Writes the table of docs/timm.md from what `from_timm` makes of timm's models: `python docs/build_timm.py`.

Every architecture that timm registers in the modules below is built at depth 1 on the meta device and read, so a name
stands in the table because its reader took it, or with the reason for which it was refused.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path

import timm
import torch

from vit2dpe import ConfigError
from vit2dpe.interop.timm.read import FAMILIES, read

MODULES = ("vision_transformer", "deit", "eva", "beit", "vision_transformer_relpos", "naflexvit")
PAGE = Path(__file__).parent / "timm.md"
BEGIN, END = "<!-- built by docs/build_timm.py -->\n", "<!-- end -->\n"


def table() -> str:
    covered: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    refused: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        for name in timm.list_models(module=module):
            theirs = _small(name)
            try:
                recipe = read(theirs)
            except ConfigError as error:
                refused[str(error).partition(": ")[2].removeprefix("it has ").split("; ")[0].split(", which")[0]] += [
                    name
                ]
            else:
                word = "+".join(part.split("(")[0] for part in recipe.position.split("+"))
                covered[type(theirs).__name__, word, recipe.policy or ""].append(name)
    count = sum(map(len, covered.values()))
    lines = [
        f"{count} architectures of {len(FAMILIES)} families of timm {timm.__version__}; "
        f"{sum(map(len, refused.values()))} of their modules are refused.",
        "",
        "| family | encoding here | at other sizes | architectures |",
        "|---|---|---|---|",
    ]
    for (family, word, policy), names in sorted(covered.items()):
        does = f"`{policy}`" if policy else "as the encoding does"
        lines.append(f"| `{family}` | `{word}` | {does} | {len(names)}: {_some(names)} |")
    lines += ["", "| refused because it has | architectures |", "|---|---|"]
    lines += [f"| {reason} | {_some(names, 99)} |" for reason, names in sorted(refused.items())]
    return "\n".join(lines) + "\n"


def _small(name: str) -> torch.nn.Module:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            return timm.create_model(name, depth=1)
        except AssertionError:  # lists of one entry a block
            return timm.create_model(name)


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(f"`{name}`" for name in names[:most]) + (", ..." if len(names) > most else "")


def page() -> str:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
