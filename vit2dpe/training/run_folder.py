"""Run folders: locked for one training at a time, checked before anything is computed, with provenance of the run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .._version import __version__
from ..errors import ConfigError
from ..files import write_atomically
from ..spec import Plain, Settings, flat, plain
from .distributed import ALONE, World
from .log import Row


@contextmanager
def run_folder(out: str | Path, *, resume: bool = False, world: World = ALONE) -> Iterator[Path]:
    """Create `out`, check that it is writable, and lock it for this process.

    Raises:
        ConfigError: if it cannot be written to, is held by another process, or holds a run that is not to be resumed.
    """
    folder = Path(out).expanduser()
    if not world.first:
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; give another --run.out") from None
    if (folder / "last" / "model.json").is_file() and not resume:
        raise ConfigError(f"{folder} holds a run already: --resume goes on with it, another --run.out keeps it")
    with _locked(folder):
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold `folder/lock`, which names this process; the system releases it when the process ends, however it ends."""
    path = folder / "lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        holder = None
        with suppress(OSError):  # where a held file cannot be read (Windows), or was released just now
            holder = path.read_text(errors="replace")
        raise ConfigError(
            f"{folder} is in use by process {holder or '(unknown)'}: wait until it ends, or give another --run.out"
        ) from None
    try:
        with suppress(OSError):  # Windows: neither written nor removed while it is locked; the release removes it
            path.write_text(f"{os.getpid()} {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def environment(command: str, device: torch.device, data: str, digest: str) -> dict[str, Plain]:
    """The provenance of a result: command, versions, hardware, data."""
    import timm

    cores = f", {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return dict(
        command=command,
        argv=sys.argv,
        vit2dpe=__version__,
        git=git_hash(),
        torch=torch.__version__,
        timm=timm.__version__,
        python=platform.python_version(),
        hardware=hardware(device) + ("" if device.type == "cuda" else cores),
        device=str(device),
        data=data,
        digest=digest,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
    )


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def git_hash() -> str | None:
    """The commit of this package's source, with a "+" if files were changed since; None for an installed copy."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists() or shutil.which("git") is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        run = ["git", "-C", str(here)]
        done = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*run, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10, check=False)
        return done.stdout.strip() + ("+" if changed.returncode else "")
    return None


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_facts(folder: Path, config: Settings, facts: Mapping[str, Plain]) -> None:
    """Write `config.yaml`, which `--config` reads, and `env.json`."""
    import yaml

    settings = plain(config) | {"resume": False}
    write_atomically(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
    write_atomically(folder / "env.json", json.dumps(facts, indent=1).encode())


# What is null until the data are read; config.yaml has what was chosen.
CHOSEN = ("data.name", "data.size", "model.patch", "augment.shift")


def changed_settings(folder: Path, config: Settings) -> list[str]:
    """Differences between `config` and the settings that the run in `folder` was started with, a line each."""
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        return []
    before, now = _flat(yaml.safe_load(path.read_text()) or {}), flat(config)
    keys = [key for key in now if before.get(key, now[key]) != now[key] and key not in ("resume", "init", "smoke")]
    keys = [key for key in keys if key not in CHOSEN or now[key] is not None]
    return [f"{key} was {before[key]}, is now {now[key]}" for key in keys]


def write_summary(
    folder: Path, title: str, rows: Sequence[Row], facts: Mapping[str, Plain], next_: str, more: Sequence[str] = ()
) -> None:
    """`summary.md`: the results, the exact command, more lines, and a command to try next."""
    last = rows[-1] if rows else {}
    shown = [key for key in last if key not in ("seconds", "cpu_seconds", "waiting")]
    lines = [
        f"# {title}",
        "",
        f"    {facts['command']}",
        "",
        f"{facts['data']} (sha256 {facts['digest']:.12}); {last.get('seconds', 0) / 60:.1f} minutes on "
        f"{facts['hardware']}, {facts['processes']} process{'es' * (facts['processes'] != 1)}; torch {facts['torch']}, "
        f"timm {facts['timm']}, vit2dpe {facts['vit2dpe']} ({facts['git'] or 'installed'})."
        + (f" Images used: {facts['images']}." if "images" in facts else ""),
        "",
        "| " + " | ".join(shown) + " |",
        "|" + "---:|" * len(shown),
        *("| " + " | ".join(_short(row.get(key)) for key in shown) + " |" for row in rows[-10:]),
        "",
        *more,
        f"Next: `{next_}`",
        "",
    ]
    write_atomically(folder / "summary.md", "\n".join(lines).encode("utf-8", "surrogateescape"))


def printable(text: object) -> str:
    """Text for any terminal: bytes of a path that are no UTF-8 are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _flat(tree: Mapping[str, Plain], prefix: str = "") -> dict[str, Plain]:
    """{"a": {"b": 1}} as {"a.b": 1}"""
    flat: dict[str, Plain] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return flat


def _short(value: float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
