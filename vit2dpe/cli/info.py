"""`vit2dpe info`: what a name of timm, a file, a hub folder or a run holds, without its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..spec import Settings, Words


@dataclass(frozen=True)
class InfoConfig(Settings):
    """What a model is and what it can do at another size, before it is loaded.

    Args:
        models: names of timm, files of weights, folders of a hub, runs, as `train --init` takes them.
    """

    models: Words = field(default=(), metadata={"positional": True})


def info(config: InfoConfig, command: str = "") -> None:
    """Print a paragraph for each model.

    Raises:
        ConfigError, CheckpointError: for what is not there or cannot be read, as `describe`.
    """
    if not config.models:
        raise ConfigError("give a model: a name of timm, a file, a hub folder or a run, such as vit_small_patch16_224")
    from ..training.description import lines  # heavy
    from ..training.start import describe

    for i, source in enumerate(config.models):
        found = list(lines(describe(Path(source) if Path(source).exists() else source)))
        width = max(len(name) for name, _ in found)
        print(f"{'' if i == 0 else chr(10)}{source}")
        for name, text in found:
            print(f"  {name:{width}}  {text}")
