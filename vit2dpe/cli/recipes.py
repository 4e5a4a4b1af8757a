"""`vit2dpe recipes`: the recipes that come with the package, which `--recipe NAME` reads.

They are the YAML files of recipes/ in the repository; the wheel has the same files inside of the package.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, clone, unknown
from ..spec import Settings, Words


@dataclass(frozen=True)
class RecipesConfig(Settings):
    """List the recipes that `--recipe NAME` takes, with their commands, or print some of them.

    Args:
        names: recipes to print as YAML, a start for one of your own (--config FILE); without names all are listed.
    """

    names: Words = field(default=(), metadata={"positional": True})


def recipes(config: RecipesConfig, command: str = "") -> None:
    """Print the list, or the files."""
    for name in config.names:
        print(find_recipe(name).read_text(encoding="utf-8").rstrip())
    if not config.names:
        for path in known_recipes().values():
            print("\n".join(_entry(path)))


def known_recipes() -> dict[str, Path]:
    """Name -> its file, without presets: those are named x.preset.yaml and go with x (--preset).

    Raises:
        ConfigError: where neither the package nor a clone around it has any.
    """
    packaged, root = Path(__file__).resolve().parents[1] / "recipes", clone()
    folder = packaged if root is None else root / "recipes"
    found = {path.stem: path for path in sorted(folder.glob("*.yaml")) if "." not in path.stem}
    if not found:
        raise ConfigError(f"there are no recipes in {folder}: this package was copied without them, install it again")
    return found


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ConfigError: for a name that is none, with the nearest one.
    """
    found = known_recipes()
    if name not in found:
        raise unknown("recipe", name, found)
    return found[name]


def _entry(path: Path) -> list[str]:
    """The command of a recipe, and the paragraph that opens it."""
    head = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    told = re.findall(rf"(vit2dpe (?:[a-z]+ )+)--config recipes/{path.name}", "\n".join(head))
    presets = sorted(other.stem.removeprefix(f"{path.stem}.") for other in path.parent.glob(f"{path.stem}.*.yaml"))
    variant = f" [--preset {'|'.join(presets)}]" if presets else ""
    words = textwrap.wrap(" ".join(head[: head.index("")]), 96)
    return [f"{told[0]}--recipe {path.stem}{variant}", *(f"    {line}" for line in words)]
