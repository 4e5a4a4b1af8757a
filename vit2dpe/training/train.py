"""`vit2dpe train`: a classifier of images, from settings to a run folder."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from ..data.datasets import Images, check_data, load, write_unreadable
from ..data.rand_augment import AUGMENTATIONS
from ..data.settings import AugmentConfig
from ..encodings import parse
from ..errors import ConfigError, unknown
from ..models.spec import ModelSpec
from ..models.timm_api import TimmViT
from .distributed import World, parallelize
from .initial_weights import INITS, initialize, jitter_positions
from .optimizer import make_optimizer, make_schedule
from .session import check_run, training
from .settings import TrainConfig, model_arguments, resolve
from .tasks.classification import ImageTask


def train(config: TrainConfig, command: str = "vit2dpe train") -> Path:
    """Train as told and leave a run folder: config.yaml, env.json, metrics.csv, last/, best/, summary.md.

    Args:
        config: settings; those at None take the preset of the data.
        command: what was typed, for the record.

    Returns:
        the run folder.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is trained, for what cannot work.
        TrainingError: for what went wrong on the way.
        Stopped: after a signal, when everything is saved.
    """
    config = check(config)
    with training(config, command) as under_way:
        say, folder, world = under_way.say, under_way.folder, under_way.world
        data = load(config.data, config.run.seed)
        for note in data.notes:
            say(f"note: {note}")
        if world.first:
            write_unreadable(folder, data.unreadable)
        size = config.data.size or data.native
        spec = model_spec(config, size, len(data.mean), len(data.classes))
        model = under_way.model(spec, lambda model: initialize(model, config.model.init))
        if config.model.jitter:
            jitter_positions(model, config.model.jitter)
        task = image_task(config, data, size, under_way.device, world)
        facts = under_way.record(data.name, data.digest, images=data.used)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        say(
            f"{type(model).__name__} of {millions:.2f} M parameters; {len(data.train)} training and {len(data.test)} "
            f"test images of {size[0]}x{size[1]}, {len(data.classes)} classes; on {facts['hardware']}; into {folder}"
        )
        rows = under_way.fit(model, task, spec, stop_after=2 if config.smoke else None)
        if world.first:
            following = next_command(config, folder, size)
            by = str(task.best[0]) if task.best else "test_top1"
            best = max(rows, key=lambda row: row[by])  # the first of equals, as best/ is
            result = f"test top-1 {rows[-1]['test_top1']:.2f}%, of best/ (by {by}) {best['test_top1']:.2f}%"
            under_way.finish(f"{spec.arguments.get('position', '')} on {data.name}", rows, facts, result, following)
    return folder


def check(config: TrainConfig) -> TrainConfig:
    """The settings with every preset filled in, after refusing all that can be refused before data are read."""
    check_data(config.data)
    config = resolve(config)
    check_run(config)
    if config.model.position is not None:
        parse(config.model.position)
    if config.model.init not in INITS:
        raise unknown("init", config.model.init, INITS)
    check_augment(config.augment)
    size = config.data.size or config.data.source_size or {"digits": (8, 8)}.get(config.data.name, (32, 32))
    with torch.device("meta"):
        model = model_spec(config, size, 3, 10).build()
    if config.model.jitter:
        jitter_positions(model, config.model.jitter)
    for other in config.augment.train_sizes or ():
        if isinstance(model, TimmViT):
            model.patch_embed.grid(*other)
    make_schedule(make_optimizer(model, config.optim), config.optim, 1)
    parallelize(model, config.run.parallel, World())
    return config


def check_augment(augment: AugmentConfig) -> None:
    for name in ("label_smoothing", "erase"):
        if not 0 <= getattr(augment, name) < 1 + (name == "erase"):
            raise ConfigError(f"augment.{name} must be in [0, 1{')]'[name == 'erase']}, got {getattr(augment, name)}")
    if augment.crop is not None and not 0 < augment.crop <= 1:
        raise ConfigError(f"augment.crop is the smallest share of the area that is kept, in (0, 1], got {augment.crop}")
    if augment.crop is not None and augment.shift:
        raise ConfigError("augment.crop takes the place of augment.shift: leave one of them out")
    if (augment.shift or 0) < 0 or augment.mixup < 0 or augment.cutmix < 0:
        raise ConfigError("augment.shift, augment.mixup and augment.cutmix must be 0 or above")
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


def model_spec(config: TrainConfig, size: tuple[int, int], channels: int, classes: int) -> ModelSpec:
    """The model that the settings name, for images of this size, channels and classes."""
    model = config.model
    arguments = model_arguments(model, patch="patch_size", pool="global_pool", class_token="class_token")
    arguments |= dict(in_chans=channels, num_classes=classes, drop_path_rate=model.drop_path)
    if model.pool is not None and model.class_token is None:
        arguments["class_token"] = model.pool == "token"
    if model.name is None:
        return ModelSpec("ViT", arguments | dict(img_size=list(size)) | model.options)
    if _sized(model.name):
        arguments["img_size"] = list(size)
    return ModelSpec("timm", dict(model_name=model.name) | arguments | model.options)


def image_task(
    config: TrainConfig, data: Images, size: tuple[int, int], device: torch.device, world: World
) -> ImageTask:
    return ImageTask(
        data,
        size,
        config.optim.batch_size,
        seed=config.run.seed,
        device=device,
        augment=config.augment,
        world=world,
        workers=config.data.workers,
    )


def next_command(config: TrainConfig, folder: Path, size: tuple[int, int]) -> str:
    """A short finetune at half as much again: the cheapest way to see what the encoding is worth."""
    patch = config.model.patch or 16
    larger = "x".join(str(max(patch, round(side * 1.5 / patch) * patch)) for side in size)
    words = ["vit2dpe", "train", "--config", str(folder / "config.yaml"), "--init", str(folder), "--data.size", larger]
    words += ["--optim.epochs", "5", "--optim.warmup_epochs", "1", "--optim.lr", f"{config.optim.lr / 10:g}"]
    return shlex.join([*words, "--run.out", f"{folder}-{larger}"])


def _sized(name: str) -> bool:
    """Whether a model of timm's registry must be told the size of its images."""
    import timm

    if name.startswith("vit2dpe_") or not timm.is_model(name):
        return True
    config = timm.get_pretrained_cfg(name)
    return bool(config is not None and config.fixed_input_size)
