"""Files that are complete at any moment, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from .errors import TrainingError


def write_atomically(path: Path, payload: bytes) -> None:
    """Replace a file: readers find either all of the new content or all of the old.

    Raises:
        TrainingError: if it cannot be written; the old file is kept.
    """
    temporary = path.with_name(f".{path.name[:80]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}, {len(payload):,} bytes, {_free(path.parent)} free: {error.strerror or error}; "
            "what was there before still is"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "unknown"


def sync_folder(folder: Path) -> None:
    """Flush renames to disk; not where folders cannot be opened (Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cache_dir() -> Path:
    """The folder of decoded images and downloads: $VIT2DPE_CACHE, else ~/.cache/vit2dpe. Not created here."""
    return Path(os.environ.get("VIT2DPE_CACHE") or "~/.cache/vit2dpe").expanduser()
