"""`vit2dpe doctor`: checks versions, devices, attention kernels, known bad combinations and free disk space."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from ..errors import TrainingError, install
from ..spec import Settings

EXTRAS = ("recipes", "text", "tracking")
BY_NAME = ("datasets", "onnx", "onnxruntime")  # imported where they are asked for, in no extra
LEAST_DISK = 2 * 2**30


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """Say whether this machine is fit to train on, and what is missing.

    Args:
        out: folder that runs would be written to.
    """

    out: str = "."


class Finding(NamedTuple):
    """A line of the report: "ok", "note" (something optional is missing) or "bad"."""

    grade: str
    text: str


def doctor(config: DoctorConfig, command: str = "") -> list[Finding]:
    """Print the findings.

    Raises:
        TrainingError: naming what is bad, so that the command exits with status 1.
    """
    findings = [finding for check in CHECKS for finding in check(config)]
    for grade, text in findings:
        print(f"{grade:4}  {text}")
    if bad := [text for grade, text in findings if grade == "bad"]:
        raise TrainingError(f"{len(bad)} of {len(findings)} findings are bad: {'; '.join(bad)}")
    return findings


def versions(config: DoctorConfig) -> Iterator[Finding]:
    """What this package requires (its pyproject.toml, as installed), and what its extras add."""
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("vit2dpe") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("note", "vit2dpe runs from a folder and is not installed: its requirements are not checked")
        return
    for name, specifier in [(r.name, r.specifier) for r in requirements if r.marker is None]:
        installed, least = version_of(name), next((s.version for s in specifier if s.operator == ">="), "0")
        if installed is None:
            yield Finding("bad", f"{name} is not installed: pip install {name}")
        elif release(installed) < release(least):
            yield Finding("bad", f"{name} {installed} is older than {least}: pip install -U {name}")
        else:
            yield Finding("ok", f"{name} {installed}")
    extras = {
        extra: [r.name for r in requirements if r.marker and r.marker.evaluate({"extra": extra})] for extra in EXTRAS
    }
    for extra, names in (extras | {"by name": list(BY_NAME)}).items():
        missing = [name for name in names if version_of(name) is None]
        line = install(extra) if extra in EXTRAS else f"pip install {' '.join(missing)}"
        text = f"not installed: {', '.join(missing)}: {line}" if missing else "installed"
        yield Finding("note" if missing else "ok", f"[{extra}] {text}")


def imports(config: DoctorConfig) -> Iterator[Finding]:
    """Packages that are installed but do not import, such as a torchvision built for another torch."""
    for name in ("torch", "torchvision", "timm"):
        try:
            __import__(name)
        except Exception as error:  # whatever a broken wheel raises
            yield Finding("bad", f"{name} does not import: {str(error).splitlines()[0] if str(error) else repr(error)}")


def bad_pairs(config: DoctorConfig) -> Iterator[Finding]:
    pillow, torch = version_of("pillow"), version_of("torch")
    if pillow is not None and release(pillow) >= (13,):
        why = "timm's RandAugment raises in posterize: use ours (augment.policy), or pillow<13"
        yield Finding("note", f"Pillow {pillow}: {why}")
    if torch is not None and release(torch) < (2, 6):
        yield Finding("bad", f"torch {torch} executes code of a file even with weights_only=True (CVE-2025-32434)")
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        yield Finding("note", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: other libraries may execute files")


def devices(config: DoctorConfig) -> Iterator[Finding]:
    try:
        import torch
    except Exception:  # reported by `imports`
        return
    yield Finding("ok", f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "float16 only: --run.precision float16"
        yield Finding("ok", f"cuda:{i}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, {half}")
    if torch.backends.mps.is_available():
        yield Finding("ok", "mps: Apple's GPU")
    elif not torch.cuda.is_available():
        yield Finding("note", "no GPU: training runs on the CPU")
    backends = []
    if torch.distributed.is_available():
        there = dict(gloo=torch.distributed.is_gloo_available(), nccl=torch.distributed.is_nccl_available())
        backends = [name for name, able in there.items() if able]
    yield Finding("ok" if backends else "note", f"several processes: {', '.join(backends) or 'not available'}")


def kernels(config: DoctorConfig) -> Iterator[Finding]:
    """The attention kernels that accept our inputs, tried one by one; the plain one always does."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except Exception:  # reported by `imports`
        return
    import warnings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.zeros(1, 2, 16, 32, device=device, dtype=dtype)
    for case, mask in (("without bias", None), ("with bias", torch.zeros(1, 2, 16, 16, device=device, dtype=dtype))):
        able = []
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            with warnings.catch_warnings(), sdpa_kernel([getattr(SDPBackend, name)]):
                warnings.simplefilter("ignore")
                try:
                    torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
                    able.append(name.removesuffix("_ATTENTION").lower())
                except RuntimeError:
                    continue
        yield Finding("ok" if able else "bad", f"attention {case} on {device}: {', '.join(able) or 'no kernel'}")


def disk(config: DoctorConfig) -> Iterator[Finding]:
    folder = Path(config.out).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield Finding("bad", f"{folder} cannot be written to")
        return
    free = shutil.disk_usage(folder).free
    yield Finding("ok" if free >= LEAST_DISK else "bad", f"{folder}: {free / 2**30:.1f} GiB free")


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """(2, 15, 0) of "2.15.0+cu132", and of "2.15.0a0": vendors' builds carry such versions."""
    return Version(version).release


CHECKS: tuple[Callable[[DoctorConfig], Iterator[Finding]], ...] = (versions, imports, bad_pairs, devices, kernels, disk)
