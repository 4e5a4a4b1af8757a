"""Weights in several safetensors files beside an index, as `transformers` and `huggingface_hub` write large models.

`model.safetensors.index.json` has `weight_map`: the file of each tensor, by name. Files lie in the folder of the index.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError

ENDING = ".safetensors.index.json"


def index_of(path: Path) -> Path | None:
    """The index that a path is, or that lies in this folder; None where there is none."""
    if path.name.endswith(ENDING) and path.is_file():
        return path
    found = sorted(path.glob(f"*{ENDING}")) if path.is_dir() else []
    return found[0] if found else None


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index lists, by name.

    Raises:
        CheckpointError: for an index that cannot be read or names a file of another folder, and for a file that is
            missing, damaged, or lacks one of its tensors.
    """
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files, it has no weight_map: {error!r}") from None
    state: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file or "\\" in file:
            raise CheckpointError(f"{index} names a file {file!r}: files lie in the folder of the index")
        wanted = {name for name, where in names.items() if where == file}
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent / file} is missing: {index.name} has {len(wanted)} tensors in it")
        try:
            found = load_file(index.parent / file)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{index.parent / file} cannot be read: {error}") from None
        if missing := sorted(wanted - found.keys()):
            raise CheckpointError(f"{index.parent / file} lacks {', '.join(missing[:5])}, which {index.name} names")
        state |= {name: found[name] for name in wanted}
    return state
