"""`vit2dpe tune`: what a classifier does at another size, chosen from images without labels, and kept.

The choosing is `vit2dpe.tune`. Here a name or a folder becomes a model, files become batches, and the choice is written
where the model is read from: model.json of a run, config.json and README.md of a hub folder. The model of a name, and
that of a run of timm's, goes to a folder of its own.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from timm.models import get_model_args, save_for_hf
from torch import Tensor, nn

from ..data.datasets import normalize
from ..data.decode import check_fit
from ..data.prepare import Preparation
from ..data.sources import UNREADABLE
from ..encodings import named_encodings
from ..errors import CheckpointError, ConfigError, DataError, not_ours, unknown
from ..files import write_atomically
from ..interop.timm.convert import from_timm
from ..interop.timm.named import is_hub_folder
from ..models.card import other_sizes, save_card
from ..models.predict import HALF, prepared
from ..models.timm_api import TimmModel
from ..resolution.apply import set_policy
from ..resolution.sweep import train_size_of
from ..resolution.tuning import Tuned, TuneRow, tune
from ..spec import show_size
from ..training.checkpoint import save_model, write_policy
from ..training.devices import pick_device
from ..training.run_folder import printable, run_folder
from ..training.start import describe
from .evaluate import check_sizes, load_subject
from .held_out import Subject, fit_of_run
from .predict import list_images
from .settings import EvaluateConfig
from .tune_settings import TuneConfig

CHOICE = ("policy", "temperature", "window_policy", "record")  # arguments that hold it
HEAD = "\n## At other sizes\n"  # of the summary.md of a run


def tune_model(config: TuneConfig, command: str = "") -> Tuned:
    """Choose and keep what a classifier does at `config.size`; write `tune.csv`, print what was found.

    Returns:
        what `vit2dpe.tune` found. Where nothing helps the model is left as it is.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is tried, for what cannot work.
    """
    if not config.init or not config.root or config.size is None:
        raise ConfigError(
            "tune needs --init (a run folder, a hub folder or a timm name), --root (images) and --size (the one wanted)"
        )
    if config.unreadable not in UNREADABLE:
        raise unknown("unreadable", config.unreadable, UNREADABLE)
    if config.fit is not None:
        check_fit(config.fit)
    folder = _home(config.init)
    subject = _of_file(folder) if folder.is_file() else _of_name(replace(config, init=str(folder)))
    model = _ours(subject.model).to(pick_device(config.device)).eval()
    own, about = train_size_of(model), vars(subject.model).get("about") or {}
    check_sizes(model, len(subject.mean), [own, config.size])
    fit = config.fit or fit_of_run(str(folder)) or "crop"
    prepare = prepared(about, config.size, own, subject.mean, subject.std, subject.crop, fit)
    images = _Images(_read(config, prepare), prepare, config.batch_size)
    print(f"images: {len(images.pixels)}, half of them to choose on, half to tell from", flush=True)
    found = tune(
        model, images, config.size, crop=subject.crop, seed=config.seed, log=lambda line: print(line, flush=True)
    )
    in_place = folder.is_dir() and model is subject.model
    out = Path(config.out or (folder if in_place else "runs/tune")).expanduser()
    write_atomically(out / "tune.csv", to_csv(found).encode())
    print(f"\n{told(found, own)}\n\ntable    {printable(out / 'tune.csv')}")
    if found.helps:
        set_policy(model, found.policy, temperature=found.temperature)
        written = _keep(folder, model, found, own, command) if in_place else _save(out, model, subject, folder)
        print(f"model    {printable(written)}")
    return found


def to_csv(found: Tuned) -> str:
    """A line for each setting that was tried: policy,temperature,half,kl,agreement,n,height,width."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*TuneRow._fields, "height", "width"])
    writer.writerows([*row, *found.size] for row in found.rows)
    return text.getvalue()


def told(found: Tuned, own: tuple[int, int]) -> str:
    """What was found, measured on the images that nothing was chosen on."""
    rows = [row for row in found.rows if row.half == "told from"]
    lines = [
        f"agreement of the model at {show_size(found.size)} with itself at {show_size(own)}, on {rows[0].n} images "
        "that nothing was chosen on:",
        *(f"  {_named(row.policy, row.temperature)}: {row.agreement:.1f}%, {row.kl:.4f} nats apart" for row in rows),
    ]
    if not found.helps:
        return "\n".join([*lines, "nothing helps: no choice is shown to bring them closer, and nothing is written"])
    gain, plain = found.gain, found.over_plain
    closer = f"chosen: {_named(found.policy, found.temperature)}, {_interval(gain)} nats closer"
    return "\n".join([*lines, closer + (f", {_interval(plain)} than the best without a power" if plain.nats else "")])


def _interval(gain: tuple[float, float, float]) -> str:
    return "{:.4f} ({:.4f} to {:.4f})".format(*gain)


def _named(policy: str, temperature: str) -> str:
    return policy if temperature == "none" else f"{policy} with temperature {temperature}"


def _home(init: str) -> Path:
    """Where a model is read from: of the tensors of a run or a hub folder that folder; a name is a path to nowhere."""
    path = Path(init)
    home = path.expanduser()
    beside = home.name == "model.safetensors" and any(
        (home.parent / f"{n}.json").is_file() for n in ("model", "config")
    )
    return home.parent if beside else home if home.exists() else path


def _of_name(config: TuneConfig) -> Subject:
    return load_subject(EvaluateConfig(model=config.init, checkpoint=config.checkpoint, untrained=config.untrained))


def _of_file(path: Path) -> Subject:
    """The classifier of a file of weights, by what is beside it."""
    start = describe(path)
    if start.position is None:
        raise start.reason or ConfigError(f"{path} holds a model whose encoding takes no policy")
    model, _ = start.load()
    channels = int(getattr(model, "in_chans", 3))
    mean, std = (numbers or HALF[:channels] for numbers in (start.mean, start.std))
    return Subject(model, path.name, None, start.classes, False, mean, std, 1.0)


def _ours(model: nn.Module) -> nn.Module:
    """The model, or ours of the same function."""
    if named_encodings(model):
        return model
    try:
        return from_timm(model)
    except ConfigError as error:
        raise ConfigError(
            f"{type(model).__name__} takes no policy, and is not read as a model of ours: {error}"
        ) from error


class _Images:
    """Images in memory, normalized batch by batch as often as they are iterated."""

    def __init__(self, pixels: Tensor, prepare: Preparation, batch_size: int) -> None:
        self.pixels, self.prepare, self.batch_size = pixels, prepare, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.pixels.split(self.batch_size):
            yield normalize(batch.float() / 255, self.prepare.mean, self.prepare.std)


def _read(config: TuneConfig, prepare: Preparation) -> Tensor:
    """uint8 (n, C, H, W) of the images that are drawn; one that cannot be read is refused, or replaced by another."""
    files = list_images([config.root])
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(config.seed)).tolist()
    read: list[Tensor] = []
    wrong: list[DataError] = []

    def one(index: int) -> Tensor | DataError:
        try:
            return prepare.pixels(files[index])
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        while order and len(read) < config.limit:
            drawn, order = order[: config.limit - len(read)], order[config.limit - len(read) :]
            for found in pool.map(one, drawn):
                if isinstance(found, Tensor):
                    read.append(found)
                elif config.unreadable == "error":
                    raise found
                else:
                    wrong.append(found)
    if wrong:
        print(f"note: left out because they cannot be read: {len(wrong)}; the first one: {printable(wrong[0])}")
    if not read:
        raise DataError(f"none of {len(files)} images could be read; the first one: {wrong[0]}")
    return torch.cat(read)


def _keep(folder: Path, model: nn.Module, found: Tuned, own: tuple[int, int], command: str) -> Path:
    """Write the choice into the folder that the model was read from; returns the file that has it now."""
    if is_hub_folder(folder):
        return _keep_in_hub_folder(folder, model)
    inside = folder / "last" if (folder / "last").is_dir() else folder
    with run_folder(folder, resume=True):
        write_policy(inside, found.policy, None if found.temperature == "none" else found.temperature)
        if (summary := folder / "summary.md").is_file():
            before = summary.read_text(encoding="utf-8", errors="surrogateescape").partition(HEAD)[0]
            after = f"{before.rstrip()}\n{HEAD}\n    {command}\n\n{told(found, own)}\n"
            write_atomically(summary, after.encode("utf-8", "surrogateescape"))
    return inside / "model.json"


def _keep_in_hub_folder(folder: Path, model: nn.Module) -> Path:
    path, card = folder / "config.json", folder / "README.md"
    try:
        settings = json.loads(path.read_bytes())
        chosen = {name: value for name, value in get_model_args(model).items() if name in CHOICE}
        settings["model_args"] = settings.get("model_args", {}) | chosen
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    write_atomically(path, json.dumps(settings, indent=2).encode())
    if card.is_file() and isinstance(model, TimmModel):
        line = f"- **Other sizes:** {other_sizes(model)}"
        text = re.sub(
            r"^- \*\*Other sizes:\*\* .*$", lambda _: line, card.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        write_atomically(card, text.encode())
    return path


def _save(out: Path, model: nn.Module, subject: Subject, source: Path) -> Path:
    """Write the model into a folder of its own: of a run or a file of ours as a run's, else as one of the hub."""
    if about := vars(subject.model).get("about"):
        kept = ("classes", "mean", "std", "fit", "data", "task", "train_size")
        save_model(out, model, **{name: about[name] for name in kept if name in about})
        return out / "model.json"
    if not isinstance(model, TimmModel):
        raise not_ours(model, "cannot be written")
    if source.is_file() and (start := describe(source)).spec.kind != "timm":
        classes = None if subject.classes is None else list(subject.classes)
        save_model(out, model, start.spec.arguments, classes=classes, mean=list(subject.mean), std=list(subject.std))
        return out / "model.json"
    save_for_hf(model, str(out), safe_serialization=True)
    return save_card(model, out).with_name("config.json")
