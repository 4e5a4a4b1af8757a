"""A trained model on disk: `model.safetensors` for the numbers, `model.json` for what they are. Never pickle.

The JSON carries everything needed to build the model again (its grid, its encoding with options) and the SHA-256 of
the numbers. Both files are written under a temporary name, flushed to disk and renamed, the JSON last.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from .. import __version__
from ..errors import CheckpointError

FORMAT = 1


def save_model(folder: Path, model: nn.Module, arguments: dict[str, Any], **about: Any) -> None:
    """Write `model` to `folder` so that `load_run` can build it again.

    Args:
        folder: made if missing.
        model: a ViT.
        arguments: of the constructor; plain JSON values, the encoding as a word.
        about: what else a reader should know (data, classes, mean, std, seed, numbers).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    payload = save(tensors)
    meta = dict(
        format=FORMAT,
        vit2dpe=__version__,
        torch=torch.__version__,
        model=type(model).__name__,
        arguments=arguments,
        train_grid=list(model.train_grid),  # type: ignore[arg-type]
        sha256=hashlib.sha256(payload).hexdigest(),
        **about,
    )
    write_atomically(folder / "model.safetensors", payload)
    write_atomically(folder / "model.json", json.dumps(meta, indent=1).encode())


def load_run(run: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The trained model of a run folder (or of its `last/`), in evaluation mode; `model.about` is its JSON.

    Raises:
        CheckpointError: if a file is missing, was altered, or comes from a newer version.
    """
    from ..models import ViT

    folder = Path(run)
    folder = folder / "last" if (folder / "last").is_dir() else folder
    meta = read_meta(folder)
    if meta.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{folder} has format {meta['format']}, this version reads up to {FORMAT}: upgrade vit2dpe"
        )
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing: the run is incomplete, train it again")
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != meta["sha256"]:
        raise CheckpointError(
            f"{weights} is not what was saved (SHA-256 {found[:12]}…, expected {meta['sha256'][:12]}…)"
        )
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} cannot be read: {error}") from None
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["arguments"].items()}
    model = ViT(**arguments)
    model.load_state_dict(tensors)
    model.about = meta  # type: ignore[assignment]
    return model.to(device).eval()


def read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: give the folder of a finished run, the one that holds last/model.json"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def write_atomically(path: Path, payload: bytes) -> None:
    """Either the whole new file or the old one, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
