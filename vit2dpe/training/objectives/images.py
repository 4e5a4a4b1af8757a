"""`vit2dpe train`: a classifier of images. What masked images share with it stands here too."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ...data.datasets import Images, check_data, load_fitted, write_unreadable
from ...data.photos import Survey, train_size
from ...data.rand_augment import AUGMENTATIONS
from ...data.settings import AugmentConfig
from ...data.sources import FILES
from ...encodings import parse_blocks
from ...errors import ConfigError, unknown
from ...models.spec import ModelSpec, takes_size
from ...models.timm_api import TimmViT
from ...spec import Plain, Size, Sizes, changed, plain, show_size
from ..by_class import classes_section, measure_classes
from ..checkpoint import read_meta
from ..distributed import World, parallelize
from ..initial_weights import INITS, Loaded, initialize
from ..log import Row
from ..optimizer import make_optimizer, make_schedule
from ..pretrain_settings import PretrainConfig
from ..session import TrainSession, Where, check_run
from ..settings import IN_WINDOWS, ModelConfig, TrainConfig, drop_last, model_arguments, own_options, resolve, sized
from ..start import describe, has_architecture
from ..starting_model import ARGUMENTS, Start, on_meta
from ..tasks.classification import ImageTask
from ..varied import augmented, check_training, varied_spec, vary
from .base import Prepared, run

C = TypeVar("C", TrainConfig, PretrainConfig)


def train(config: TrainConfig, command: str = "vit2dpe train") -> Path:
    """Train a classifier of images; arguments, result and errors are those of `run`."""
    return run(check(config), command, prepare)


def prepare(config: TrainConfig, session: TrainSession) -> Prepared:
    """Classes of images, by any model of images."""
    start, model = start_of(config), config.model
    data, size, config = read_images(config, session)
    begin: Callable[[nn.Module], Loaded] | None = None
    if start is None:
        spec = varied_spec(model_spec(config.model, size, len(data.mean), len(data.classes)), config.training, size)
        if config.init is not None:
            session.print(f"note: {config.init} does not say how its images were normalized: these have their own mean")
    else:
        spec = started_spec(start, model, size, len(data.mean), len(data.classes))
        spec = varied_spec(spec, config.training, size)
        session.print(str(start))
        optim = config.optim
        session.print(
            f"note: finetuning, {optim.epochs} epochs with {optim.warmup:g} of warm-up, optim.lr {optim.lr:g}, "
            f"optim.layer_decay {optim.layer_decay:g}"
            + (f", {optim.freeze} blocks frozen" if optim.freeze else "; optim.freeze N would keep the first N blocks")
        )
        data, config = as_weights(start, data, session.print), replace(config, model=model)
        begin = partial(start.load_into, spec=spec, classes=data.classes)
    augment = augmented(config.augment, config.training, size, spec)
    task = image_task(config, augment, data, size, session.device, session.world)
    return Prepared(
        spec,
        task,
        data.name,
        data.digest,
        f"; {len(data.train)} training and {len(data.test)} test images of {size[0]}x{size[1]}, "
        f"{len(data.classes)} classes",
        f"{spec.arguments.get('position', '')} on {data.name}",
        next_command(config, session.folder, size),
        partial(best_accuracy, by=str(task.best[0]) if task.best else "test_top1"),
        partial(measure_classes, session, data, size, config.data.workers) if config.per_class else list,
        partial(classes_section, session.folder) if config.per_class else list,
        facts=dict(images=data.used),
        initialize=partial(initialize, how=config.model.init),
        begin=begin,
        adapt=partial(vary, training=config.training, jitter=config.model.jitter),
        config=config,
    )


def start_of(config: TrainConfig) -> Start | None:
    """The model to start from: of a run that goes on, its own, and the first weights are not needed again.

    None without one, and for a file that has no architecture beside it where the settings have.

    Raises:
        ConfigError, CheckpointError: as `describe`.
    """
    if config.init is None:
        return None
    last, path = Path(config.run.out).expanduser() / "last", Path(config.init).expanduser()
    if config.resume and (last / "model.json").is_file():
        return replace(describe(last), policy=None)  # its arguments stay those that it began with
    of = config.model
    named = any(value is not None for value in (of.name, of.patch, of.width, of.depth, of.heads))
    return None if named and path.exists() and not has_architecture(path) else describe(config.init)


def started_spec(start: Start, model: ModelConfig, size: Size, channels: int, classes: int) -> ModelSpec:
    """The model of the weights with what the settings change; that of the settings, where they name another one."""
    own = start.settings
    if model.name is not None and model.name != own.get("name"):
        return model_spec(model, size, channels, classes)
    given, options = plain(model), _own_options(model)
    changes = {ARGUMENTS[name]: given[name] for name in ARGUMENTS if given[name] not in (None, own.get(name))}
    windows = {name: model_arguments(model, **IN_WINDOWS).get(name) for name in IN_WINDOWS}
    changes |= {name: value for name, value in windows.items() if value is not None}
    changes |= dict(drop_path_rate=model.drop_path) | options
    spec = start.changed(model.position, size=size, num_classes=classes, channels=channels, **changes)
    _check_pool(spec.arguments.get("global_pool"), classes)
    return spec


def as_weights(start: Start, data: Images, say: Callable[[str], None]) -> Images:
    """The images, to be normalized as those were that the weights were trained on; of other channels by the average."""
    if start.mean is None or start.std is None:
        say(f"note: {start.source} does not say how its images were normalized: these have their own mean")
        return data
    channels = len(data.mean)
    mean, std = (list(of) if len(of) == channels else [sum(of) / len(of)] * channels for of in (start.mean, start.std))
    normalized = data.as_recorded(dict(mean=mean, std=std))
    if normalized.mean != data.mean or normalized.std != data.std:
        shown = ", ".join("(" + ", ".join(f"{value:.3f}" for value in values) + ")" for values in (mean, std))
        say(f"note: images are normalized as those of the weights were: mean and deviation {shown}")
    return normalized


def check(config: TrainConfig) -> TrainConfig:
    """The settings with every preset filled in, after refusing all that can be refused before data are read."""
    check_data(config.data)
    start = start_of(config)
    config = resolve(config, None if start is None else come_with(start))
    check_run(config)
    if config.model.position is not None:
        parse_blocks(config.model.position)
    if config.model.init not in INITS:
        raise unknown("init", config.model.init, INITS)
    check_augment(config.augment)
    check_training(config.training)
    size = likely_size(config)
    if start is None:
        spec = model_spec(sized(config, size, photos=config.data.name is None).model, size, 3, 10)
    else:
        spec = started_spec(start, config.model, size, 3, 10)
    model = on_meta(spec := varied_spec(spec, config.training, size))
    vary(model, config.training, config.model.jitter)
    for one in augmented(config.augment, config.training, size, spec).train_sizes or ():
        if isinstance(model, TimmViT):
            model.patch_embed.grid(*one)
    make_schedule(make_optimizer(model, config.optim), config.optim, 1)
    parallelize(model, config.run.parallel, World())
    return config


def come_with(start: Start) -> dict[str, Plain]:
    """The settings, by dotted names, that come with weights."""
    return {"data.size": show_size(start.size)} | {f"model.{name}": value for name, value in start.settings.items()}


def check_augment(augment: AugmentConfig) -> None:
    if augment.crop is not None and augment.shift:
        raise ConfigError("augment.crop takes the place of augment.shift: leave one of them out")
    name, options = augment.policy
    if name not in AUGMENTATIONS:
        raise unknown("policy", name, AUGMENTATIONS)
    for option in options:
        if name != "rand" or option not in ("ops", "magnitude"):
            raise unknown(f"option of {name}", option, ("ops", "magnitude") if name == "rand" else ("(it takes none)",))
    ops, magnitude = options.get("ops", 1), options.get("magnitude", 0)
    if not (isinstance(ops, int) and ops > 0 and isinstance(magnitude, int | float) and 0 <= magnitude <= 30):
        raise ConfigError(
            f"augment.policy is none, trivial or rand(ops=2, magnitude=9) with 0 to 30, got {augment.policy}"
        )


def likely_size(config: TrainConfig | PretrainConfig) -> Size:
    """The size of training images as far as it is known before they are read; only checks depend on it."""
    return config.data.size or config.data.source_size or ((8, 8) if config.data.source == "digits" else (32, 32))


def read_images(config: C, session: TrainSession, *, labels: bool = True) -> tuple[Images, Size, C]:
    """The data, the size of training images, and the settings with what depended on it.

    Prints what was odd about the images and lists files that were left out.
    """
    data, chosen, augment = config.data, config.data.size, config.augment
    several: Sizes = (augment.train_sizes or ()) if isinstance(augment, AugmentConfig) else ()

    def needed(found: Survey) -> list[Size]:
        height, width = chosen or train_size(found, config.model.patch)
        factor = 1 if config.augment.crop is None else 2  # random parts are enlarged
        return [(factor * height, factor * width), *several]

    images, found = load_fitted(data, config.run.seed, needed, labels=labels)
    if config.resume and (session.folder / "last" / "model.json").is_file():
        images = images.as_recorded(read_meta(session.folder / "last"))
    # One rank's images may be in memory and another's on disk, where mean and deviation are estimated.
    mean, std = json.loads(session.world.gather([json.dumps([images.mean, images.std])])[0])
    images = images.as_recorded(dict(mean=mean, std=std))
    size = chosen or (images.native if found is None else train_size(found, config.model.patch))
    for note in images.notes:
        session.print(f"note: {note}")
    if found is not None and chosen is None:
        session.print(f"note: trained at {show_size(size)}, by their median short side; --size chooses another")
    if session.world.first:
        write_unreadable(session.folder, images.unreadable)
    photos = data.source in (*FILES, "hf") and (data.name is None or found is not None)
    config = sized(config, size, photos=photos)
    return images, size, config if found is None else changed(config, {"data.size": show_size(size)})


def model_spec(model: ModelConfig, size: Size, channels: int, classes: int) -> ModelSpec:
    """The model that the settings name, for images of this size, channels and classes."""
    arguments = model_arguments(model, patch="patch_size", pool="global_pool", class_token="class_token", **IN_WINDOWS)
    arguments |= dict(in_chans=channels, num_classes=classes, drop_path_rate=model.drop_path)
    if model.pool is not None and model.class_token is None:
        arguments["class_token"] = model.pool == "token"
    for pool in (model.pool, model.options.get("global_pool")):
        _check_pool(pool, classes)
    options = _own_options(model)
    if model.name is None:
        return ModelSpec("ViT", arguments | dict(img_size=list(size)) | options)
    if takes_size(model.name):
        arguments["img_size"] = list(size)
    return ModelSpec("timm", dict(model_name=model.name) | arguments | options)


def _own_options(model: ModelConfig) -> dict[str, Plain]:
    return own_options(model.options, dict(num_classes="the data", in_chans="the data", device="run.device"))


def _check_pool(pool: Plain, classes: int) -> None:
    if pool == "" and classes:
        raise ConfigError("a classifier pools its tokens: --model.pool avg, token or map")


def image_task(
    config: TrainConfig | PretrainConfig,
    augment: AugmentConfig,
    data: Images,
    size: Size,
    device: torch.device,
    world: World,
) -> ImageTask:
    """Batches of images by these settings."""
    batch, seed, workers = config.optim.batch_size, config.run.seed, config.data.workers
    where, order = Where(seed=seed, device=device, world=world), config.data.balanced
    rest = drop_last(config.optim, config.run)
    return ImageTask(data, size, batch, augment=augment, workers=workers, balanced=order, drop_last=rest, **where)


def best_accuracy(rows: list[Row], by: str) -> list[str]:
    best = max(rows, key=lambda row: row[by])  # the first of equals, as best/ is
    return [f"test top-1 {rows[-1]['test_top1']:.2f}%, of best/ (by {by}) {best['test_top1']:.2f}%"]


def next_command(config: TrainConfig, folder: Path, size: Size) -> str:
    """A short finetune at half as much again: the cheapest way to see how the encoding does at another size."""
    patch = config.model.patch or 16
    larger = "x".join(str(max(patch, round(side * 1.5 / patch) * patch)) for side in size)
    words = ["vit2dpe", "train", "--config", str(folder / "config.yaml"), "--init", str(folder), "--data.size", larger]
    words += ["--optim.epochs", "5", "--optim.warmup_epochs", "1", "--optim.lr", f"{config.optim.lr / 10:g}"]
    return shlex.join([*words, "--run.out", f"{folder}-{larger}"])
