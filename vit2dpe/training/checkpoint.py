"""Checkpoints on disk: tensors in `model.safetensors`, metadata in `model.json`. Never pickle.

The JSON has what it takes to build the model again (its class, its arguments with the encoding's spec), the names of
further files (optimizer, averaged weights), the training's progress, and the SHA-256 of every file and of itself.

A folder is replaced without a moment at which it is incomplete: new files are written beside the old ones as
`<name>-<digest>.safetensors`, then the JSON is renamed over the old one, and that rename is the moment. Only then are
the new files renamed over the old. A reader takes `<name>-<digest>` where it is there and `<name>` else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .._version import __version__
from ..encodings.own import check_known, sources_in
from ..errors import CheckpointError, unknown
from ..files import sync_folder, write_atomically
from ..models.card import note_exchange
from ..models.spec import MODELS, ModelSpec, timm_spec
from ..models.timm_api import recorded_policies
from ..resolution.apply import set_policy
from ..spec import Plain


class Chosen(TypedDict):
    """A model's own policy at other sizes, as `set_policy` takes it."""

    policy: str
    temperature: str | None


class Meta(TypedDict, total=False):
    """`model.json`. Beside these, whatever the task describes and the command adds."""

    format: int
    vit2dpe: str  # versions that wrote it
    torch: str
    model: str  # a name in `models.spec.MODELS`
    arguments: dict[str, Any]  # of its constructor
    encodings: dict[str, str]  # of one's own: word, and what was imported for it
    train_grid: list[int] | None
    policy: Chosen  # where the arguments do not have it
    sha256: str  # of the file "model"
    files: dict[str, str]  # SHA-256 by file name, without .safetensors
    check: str  # SHA-256 of all this, without `check`
    state: dict[str, Any]  # of a training that can go on: `snapshots.TrainingState`, optimizer, scaler
    weights: str  # "trained" or "averaged"
    task: str
    data: str
    digest: str  # of the data
    digest_of_files: str  # of images from files, in memory or on disk
    classes: list[str]
    mean: list[float]
    std: list[float]
    fit: str  # of images of several sizes, where it is no crop
    train_size: list[int]  # (H, W)
    tokenizer: dict[str, str]
    trained: Plain
    ran: dict[str, Plain]  # of a study's trial: device, hardware, precision, torch, seconds
    final: dict[str, float] | None  # the last row of `metrics.csv`


FORMAT = 2
MIGRATIONS: dict[int, Callable[[Meta], Meta]] = {
    1: lambda meta: {**meta, "format": 2, "files": {"model": meta["sha256"]}},
}

_LEFT_OVER = re.compile(r"\..*\.\d+\.tmp|\w+-[0-9a-f]{16}\.safetensors")


def save_model(folder: Path, model: nn.Module, arguments: dict[str, Any] | None = None, **about: Plain) -> None:
    """Write `model` to `folder` so that `load_run` can build it again.

    Args:
        folder: made if missing; what it held is replaced in one moment.
        model: of a class in `MODELS`, or made by `timm.create_model` or `from_timm`.
        arguments: of the constructor; plain JSON values, the encoding as its spec. Default: those in timm's record of
            the model, without rates of dropout.
        about: further metadata (data, classes, mean, std, seed, numbers).

    Raises:
        ConfigError: for a model that was built by hand, without `arguments`; for an encoding given as an instance.
    """
    tensors = dict(model.state_dict())
    grid = getattr(model, "train_grid", None)
    spec = timm_spec(model) if arguments is None else ModelSpec(type(model).__name__, arguments)
    own = recorded_policies(model)
    if arguments is not None and own and own[-1] != (arguments.get("policy"), arguments.get("temperature")):
        policy, temperature = own[-1]
        about = {"policy": dict(policy=policy, temperature=temperature), **about}
    write_checkpoint(folder, spec, {"model": tensors}, grid=grid, **about)


def write_checkpoint(
    folder: Path,
    spec: ModelSpec,
    files: Mapping[str, Mapping[str, Tensor]],
    *,
    grid: Sequence[int] | None = None,
    **about: Plain,
) -> None:
    """Replace the checkpoint in `folder`; if that cannot be finished, the old one stays.

    Args:
        files: tensors by name, by file: "model" and whatever resuming needs.
        grid: the model's training grid.
        about: further metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(CheckpointError):  # what is damaged is replaced
        settle(folder)
    payloads = {name: save(_separate(tensors)) for name, tensors in files.items()}
    digests = {name: hashlib.sha256(payload).hexdigest() for name, payload in payloads.items()}
    meta = dict(
        format=FORMAT,
        vit2dpe=__version__,
        torch=torch.__version__,
        model=spec.kind,
        arguments=spec.arguments,
        train_grid=list(grid) if grid is not None else None,
        sha256=digests["model"],
        files=digests,
        **about,
    )
    if sources := sources_in(spec.arguments):
        meta["encodings"] = sources
    meta = json.loads(json.dumps(meta))  # as a reader will see it
    meta["check"] = _check(meta)
    try:
        for name, payload in payloads.items():
            write_atomically(folder / _pending(name, digests[name]), payload)
        write_atomically(folder / "model.json", json.dumps(meta, indent=1).encode())
    finally:
        with suppress(OSError, CheckpointError):
            settle(folder)


def settle(folder: Path) -> None:
    """Finish an interrupted write: rename the files that the JSON lists, remove those that it does not."""
    files = read_meta(folder)["files"] if (folder / "model.json").is_file() else {}
    wanted = {_pending(name, digest): f"{name}.safetensors" for name, digest in files.items()}
    for path in list(folder.iterdir()):
        if path.name in wanted:
            path.replace(folder / wanted[path.name])
        elif _LEFT_OVER.fullmatch(path.name):
            path.unlink()
    sync_folder(folder)


def load_run(
    run: str | Path, device: torch.device | str = "cpu", *, which: str = "last", allow_nan: bool = False
) -> nn.Module:
    """The trained model of a run folder, in evaluation mode; `model.about` is its JSON.

    Args:
        run: the folder of a run, or one that itself holds `model.json`.
        device: where the model goes.
        which: "last", or "best" by the number that the task names.
        allow_nan: accept weights that are not finite.

    Raises:
        ConfigError: for another `which`, and for an encoding of one's own that was not imported: it names what to
            import, and imports nothing.
        CheckpointError: if a file is missing, was altered, is not finite, or comes from a newer version.
    """
    if which not in ("last", "best"):
        raise unknown("checkpoint of a run", which, ("last", "best"))
    folder = Path(run)
    folder = folder / which if (folder / which).is_dir() else folder
    meta = read_meta(folder)
    tensors = read_tensors(folder, meta, "model")
    if not allow_nan:
        check_finite(tensors, folder)
    if meta["model"] not in MODELS:
        raise CheckpointError(f"{folder} holds a {meta['model']!r}; this version can build {', '.join(MODELS)}")
    check_known(meta.get("encodings", {}), str(folder))
    model = ModelSpec(meta["model"], meta["arguments"]).build()
    _resize(model, meta.get("train_grid"))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit the model that it names: {error}") from None
    if chosen := meta.get("policy"):
        set_policy(model, chosen["policy"], temperature=chosen["temperature"])
    model.about = meta  # type: ignore[assignment]
    note_exchange(model)
    return model.to(device).eval()


def _resize(model: nn.Module, grid: list[int] | None) -> None:
    """Call `set_input_size` again, if the model was resized after it was built."""
    resize = getattr(model, "set_input_size", None)
    if grid is None or resize is None or tuple(grid) == tuple(getattr(model, "train_grid", grid)):
        return
    patch = attrgetter("patch_embed.patch_size")(getattr(model, "encoder", model))
    resize(tuple(size * side for size, side in zip(grid, patch, strict=True)))


def write_policy(folder: Path, policy: str, temperature: str | None) -> None:
    """Have the checkpoint in `folder` name another policy of its model; its tensors and whatever else stay."""
    meta = read_meta(folder)
    meta["policy"] = Chosen(policy=policy, temperature=temperature)
    meta["check"] = _check(meta)
    write_atomically(folder / "model.json", json.dumps(meta, indent=1).encode())


def read_meta(folder: Path) -> Meta:
    """The metadata of a checkpoint, migrated to this version's format.

    Raises:
        CheckpointError: if it is missing, altered, or of a newer format.
    """
    path = folder / "model.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: give the folder of a finished run, the one that holds last/model.json"
        )
    try:
        meta = json.loads(path.read_bytes())
        version = int(meta.get("format", 0))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if version > FORMAT:
        raise CheckpointError(f"{folder} has format {version}, this version reads up to {FORMAT}: upgrade vit2dpe")
    if version < 1:
        raise CheckpointError(f"{path} is not a checkpoint of this library: it has no format")
    if version >= 2 and meta.get("check") != _check(meta):
        raise CheckpointError(f"{path} is not what was saved: its own digest differs")
    try:
        while meta["format"] < FORMAT:
            meta = MIGRATIONS[meta["format"]](meta)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}") from None
    files = meta.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise CheckpointError(f"{path} is not a checkpoint of this library: its list of files is none")
    for name in files:  # names of files of this folder, and no way out of it
        if not re.fullmatch(r"\w+", name):
            raise CheckpointError(f"{path} names a file {name!r}: only letters, digits and _ can be")
    return meta


def read_tensors(folder: Path, meta: Meta, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint; its digest is verified.

    Raises:
        CheckpointError: if the file is missing, altered or unreadable.
    """
    digest = meta["files"].get(name)
    if digest is None:
        raise CheckpointError(f"{folder} has no {name}; it has {', '.join(meta['files'])}")
    path = folder / _pending(name, digest)
    path = path if path.is_file() else folder / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the run is incomplete, train it again")
    payload = path.read_bytes()
    actual = hashlib.sha256(payload).hexdigest()
    if actual != digest:
        raise CheckpointError(f"{path} is not what was saved (SHA-256 {actual[:12]}…, expected {digest[:12]}…)")
    try:
        return load(payload)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def check_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    bad = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"{where}: {', '.join(bad[:5])} ({len(bad)} in all) are not finite; allow_nan=True takes them"
        )


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, contiguous, no two sharing memory (tied weights are written twice)."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return separate


def _pending(name: str, digest: str) -> str:
    return f"{name}-{digest[:16]}.safetensors"


def _check(meta: Meta) -> str:
    rest = {key: value for key, value in meta.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
