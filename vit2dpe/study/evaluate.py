"""`vit2dpe evaluate`: any timm model, ours or not, or a run of ours, swept over image sizes.

The measuring is `vit2dpe.resolution.sweep`; here a name becomes a model, and a folder becomes batches that it
understands: its channels, mean, deviation and crop, and its numbering of the classes.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn

from ..data.datasets import SOURCES, write_unreadable
from ..encodings import named_encodings
from ..errors import ConfigError
from ..files import write_atomically
from ..interop.timm.named import REFUSALS, is_hub_folder, split_name
from ..models.predict import hub_names
from ..models.timm_api import every_policy
from ..resolution.apply import use_policy
from ..resolution.sweep import MODES, spacing_of, sweep, train_size_of
from ..spec import Size, join_blocks
from ..training.by_class import CLASSES, balanced_accuracy, markdown, rows_of, write_classes
from ..training.checkpoint import Meta, load_run, read_meta
from ..training.devices import pick_device
from .held_out import Subject, load_test_images
from .plan import known
from .report import about_study
from .rows import Row, to_csv
from .settings import EvaluateConfig
from .tables import spell, table


def evaluate_model(config: EvaluateConfig, command: str = "") -> list[Row]:
    """Measure a model at `config.sizes`; write `results.csv` and `env.json` to `config.out`, print the table.

    Returns:
        the rows of results.csv.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is measured, for what cannot work.
    """
    config = replace(config, data=config.data or config.root or "")
    if not config.model or not config.data:
        raise ConfigError("evaluate needs --model (a timm name or a run folder) and --data (a folder, digits, cifar10)")
    device = pick_device(config.device)
    subject = load_subject(config)
    model = subject.model.to(device).eval()
    train_size = config.train_size or train_size_of(model)
    sizes = config.sizes or (train_size,)
    modes = known("mode", config.modes, MODES)
    policies = every_policy(model) if "all" in config.policies else config.policies
    crop = subject.crop if config.crop is None else config.crop
    check_sizes(model, len(subject.mean), sizes, config.spacing, policies)

    height, width = (round(max(side) / crop) for side in zip(train_size, *sizes, strict=True))
    data, total = load_test_images(config, subject, (height, width))
    print(f"images: {len(data)} used of {total}", flush=True)
    write_unreadable(Path(config.out), data.unreadable)
    counts: list[Tensor] = []
    measured = sweep(
        model,
        data,
        sizes,
        policies,
        modes=modes,
        temperatures=config.temperatures,
        train_size=train_size,
        crop=crop,
        by_class=counts if config.per_class else None,
        spacing=config.spacing,
    )
    rows = [
        Row(encoding=subject.label, seed=subject.seed, value=row["top1"], spacing=config.spacing, **row)
        for row in measured
    ]
    out = Path(config.out)
    about = about_study(command, config, device, config.data, data.digest)
    write_atomically(out / "env.json", json.dumps(about, indent=1).encode())
    write_atomically(out / "results.csv", to_csv(rows).encode())
    print(f"\n{table(rows)}\n\ntable    {out / 'results.csv'}")
    if config.per_class:
        _write_classes(out / CLASSES, rows, counts, subject)
    return rows


def _write_classes(path: Path, rows: Sequence[Row], counts: Sequence[Tensor], subject: Subject) -> None:
    """Write the classes of every row, and print those of the first."""
    names = ("policy", "temperature", "mode", "height", "width")
    found = [
        ({name: getattr(row, name) for name in names}, rows_of(count, subject.classes or (), seen=True))
        for row, count in zip(rows, counts, strict=True)
    ]
    write_classes(path, found)
    what, first = found[0]
    print("\n".join(["", *markdown(f"By class, {what['policy']} at {spell(rows[0].size)}", first)]))
    print(f"{balanced_accuracy(first)}\nclasses  {path}")


def load_subject(config: EvaluateConfig) -> Subject:
    """The model of a run folder, or a timm model with its weights, and what is known about its inputs."""
    folder = Path(config.model)
    if folder.is_dir() and not is_hub_folder(folder):
        run = load_run(folder)
        about: Meta = vars(run)["about"]
        if lacking := [key for key in ("classes", "mean", "std") if key not in about]:
            raise ConfigError(
                f"{folder} does not say {', '.join(lacking)} of its images: it is no classifier of images"
            )
        if not getattr(run, "num_classes", 0):
            raise ConfigError(
                f"{folder} holds a {about['model']}, which is no classifier: train one from it, "
                f"vit2dpe train --init {folder}, or measure its features with vit2dpe probe"
            )
        label, trained = str(join_blocks(about["arguments"].get("position", about["model"]))), about.get("trained")
        seed = trained.get("seed") if isinstance(trained, dict) else None
        return Subject(run, label, seed, tuple(about["classes"]), True, about["mean"], about["std"], 1.0)
    name, model = _timm_model(config)
    data = resolve_model_data_config(model)
    subset, classes = infer_imagenet_subset(model), tuple(hub_names(model)) or None
    trained_here = _beside(config.checkpoint)
    if trained_here is not None:
        of = trained_here
        return Subject(model, name, None, tuple(of["classes"]), True, of["mean"], of["std"], 1.0)
    if subset and classes is None:
        classes = tuple(ImageNetInfo(subset).label_names())
    crop = 1.0 if config.data in SOURCES else data["crop_pct"]
    return Subject(model, name, None, classes, False, data["mean"], data["std"], crop)


def _beside(checkpoint: str | None) -> Meta | None:
    """What the model.json beside a file of weights says, if they are a classifier that was trained here."""
    folder = None if checkpoint is None else Path(checkpoint).expanduser().parent
    if folder is None or not (folder / "model.json").is_file():
        return None
    about = read_meta(folder)
    return about if {"classes", "mean", "std"} <= about.keys() else None


def _timm_model(config: EvaluateConfig) -> tuple[str, nn.Module]:
    name, options = split_name(config.model)
    name = f"local-dir:{name}" if is_hub_folder(Path(name)) else name
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"{name!r} is neither a folder nor a timm model; {hint}timm.list_models('*vit*') in Python lists names"
        )
    pretrained = not config.untrained and config.checkpoint is None
    try:
        with torch.device("meta"):
            kind = type(timm.create_model(name, **options))
        if "dynamic_img_size" in inspect.signature(kind).parameters:
            options = {"dynamic_img_size": True, **options}  # timm's default takes one size only
        model = timm.create_model(name, pretrained=pretrained, **options)
        if config.checkpoint is not None:
            load_checkpoint(model, config.checkpoint)
    except REFUSALS as error:
        wanted = "its pretrained weights" if pretrained else "these settings"
        raise ConfigError(
            f"timm could not make {name} with {wanted}: {error}; --checkpoint takes a file of weights, --untrained none"
        ) from error
    return name, model


def check_sizes(
    model: nn.Module,
    channels: int,
    sizes: Sequence[Size],
    spacing: float | None = None,
    policies: Sequence[str] = ("default",),
) -> None:
    """Every size once under each policy, on one blank image, before hours are spent on the first of them."""
    more = spacing_of(model, spacing)
    device = next(model.parameters()).device
    for policy, (height, width) in product(policies if named_encodings(model) else ("default",), sizes):
        context = nullcontext() if policy == "default" else use_policy(model, policy)
        with torch.inference_mode(), context:
            try:
                model(torch.zeros(1, channels, height, width, device=device), **more)
            except (AssertionError, RuntimeError, ValueError, IndexError) as error:
                raise ConfigError(f"{type(model).__name__} does not take {height}x{width} images: {error}") from error
