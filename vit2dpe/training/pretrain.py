"""`vit2dpe pretrain`: an encoder from images without labels, by masking, from settings to a run folder."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import torch

from ..data.datasets import Images, check_data, load, normalize, write_unreadable
from ..data.settings import AugmentConfig
from ..data.splits import resize
from ..encodings import parse
from ..errors import ConfigError, unknown
from ..models.mae import keep_count
from ..models.spec import ModelSpec
from ..plots.reconstruction import save as save_pictures
from ..seeding import generator
from .checkpoint import load_run, write_checkpoint
from .distributed import World
from .initial_weights import initialize, jitter_positions
from .optimizer import make_optimizer, make_schedule
from .pretrain_settings import PretrainConfig, resolve
from .session import check_run, training
from .settings import TrainConfig
from .tasks.classification import ImageTask
from .tasks.masked_images import MaskedTask
from .train import check_augment, model_spec


def pretrain(config: PretrainConfig, command: str = "vit2dpe pretrain") -> Path:
    """Pretrain as told and leave a run folder: what `train` leaves, `encoder/`, which `load_run` reads, and
    `reconstructions.png`.

    Arguments, result and errors are those of `train.train`.
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
        spec = masked_spec(config, size, len(data.mean))
        model = under_way.model(spec, lambda model: _draw(model, config.model.init))
        if config.model.jitter:
            jitter_positions(model.encoder, config.model.jitter)
        grid = model.mask_grid(*size)
        task = masked_task(config, data, size, grid, under_way.device, world)
        facts = under_way.record(data.name, data.digest, images=data.used)
        n, millions = math.prod(grid), sum(p.numel() for p in model.parameters()) / 1e6
        say(
            f"{type(model).__name__} of {millions:.2f} M parameters, sees {keep_count(n, task.mask_ratio)} of {n} "
            f"{'patches' if config.objective == 'mae' else 'units'}; {len(data.train)} training images of "
            f"{size[0]}x{size[1]}; on {facts['hardware']}; into {folder}"
        )
        rows = under_way.fit(model, task, spec, stop_after=2 if config.smoke else None)
        if world.first:
            finish(config, folder, data, size, spec)
            following = next_command(config, folder)
            title = (
                f"Masked pretraining ({config.objective}), {config.model.position or config.model.name}, on {data.name}"
            )
            pictures = f"; pictures {folder / 'reconstructions.png'}" if config.pictures else ""
            result = f"loss on hidden test patches {rows[-1]['test_loss']:.4f}{pictures}"
            under_way.finish(title, rows, facts, result, following)
    return folder


def _draw(model: Any, init: str) -> None:
    """First weights: by default as the original of each objective does."""
    if init == "default":
        model.init_weights()
    else:
        initialize(model, init)


def check(config: PretrainConfig) -> PretrainConfig:
    """The settings with every preset filled in, after refusing all that can be refused before data are read."""
    check_data(config.data)
    config = resolve(config)
    check_run(config)
    check_augment(views(config))
    if config.objective not in ("mae", "simmim"):
        raise unknown("objective", config.objective, ("mae", "simmim"))
    if config.objective == "simmim" and config.norm_pix:
        raise ConfigError("simmim paints pixels as they are: leave norm_pix out")
    for word in (config.model.position, config.decoder.position):
        if word is not None:
            parse(word)
    if config.model.pool == "map":
        raise ConfigError("masking trains no attention pooling: --model.pool avg or token")
    if config.pictures < 0:
        raise ConfigError(f"pictures must be 0 or more, got {config.pictures}")
    size = config.data.size or config.data.source_size or {"digits": (8, 8)}.get(config.data.name, (32, 32))
    with torch.device("meta"):
        model: Any = masked_spec(config, size, 3).build()
    if config.model.jitter:
        jitter_positions(model.encoder, config.model.jitter)
    keep_count(math.prod(model.mask_grid(*size)), _ratio(config))
    make_schedule(make_optimizer(model, config.optim), config.optim, 1)
    return config


def masked_spec(config: PretrainConfig, size: tuple[int, int], channels: int) -> ModelSpec:
    """The encoder that the settings name, without classifier, its norm before pooling, and what paints around it."""
    encoder = model_spec(TrainConfig(model=config.model), size, channels, 0).arguments
    if config.objective == "mae" or config.model.name is None:
        encoder = encoder | dict(fc_norm=False)
    if config.objective == "simmim":
        return ModelSpec("SimMIM", dict(encoder=encoder, mask_unit=config.mask_unit))
    decoder = config.decoder
    sizes = dict(
        decoder_embed_dim=decoder.width,
        decoder_depth=decoder.depth,
        decoder_num_heads=decoder.heads,
        decoder_mlp_ratio=decoder.mlp_ratio,
    )
    given = {name: value for name, value in sizes.items() if value is not None}
    return ModelSpec("MAE", dict(encoder=encoder, decoder_position=decoder.position, norm_pix=config.norm_pix) | given)


def _ratio(config: PretrainConfig) -> float:
    if config.mask_ratio is None:
        raise ConfigError("mask_ratio is still open: pass the config through pretrain_settings.resolve first")
    return config.mask_ratio


def masked_task(
    config: PretrainConfig,
    data: Images,
    size: tuple[int, int],
    grid: tuple[int, int],
    device: torch.device,
    world: World,
) -> MaskedTask:
    images = ImageTask(
        data,
        size,
        config.optim.batch_size,
        seed=config.run.seed,
        device=device,
        augment=views(config),
        world=world,
        workers=config.data.workers,
    )
    return MaskedTask(images, grid, _ratio(config))


def views(config: PretrainConfig) -> AugmentConfig:
    view = config.augment
    return AugmentConfig(shift=view.shift, flip=view.flip, crop=view.crop, label_smoothing=0.0)


def finish(config: PretrainConfig, folder: Path, data: Images, size: tuple[int, int], spec: ModelSpec) -> None:
    """`encoder/` and the pictures, from the weights that were kept."""
    model: Any = load_run(folder)
    about = {name: model.about[name] for name in ("data", "digest", "classes", "mean", "std", "train_size")}
    encoder = spec.arguments["encoder"]
    kind = ModelSpec("timm" if "model_name" in encoder else "ViT", encoder)
    tensors = dict(model.encoder.state_dict())
    write_checkpoint(folder / "encoder", kind, {"model": tensors}, grid=model.train_grid, **about)
    if config.pictures:
        spaced = torch.linspace(0, len(data.test) - 1, config.pictures).long()  # test images may lie class by class
        images = normalize(resize(data.test.pixels(spaced), size), data.mean, data.std)
        draws = generator(config.run.seed, "pictures")
        save_pictures(
            folder / "reconstructions.png", model, images, data.mean, data.std, _ratio(config), generator=draws
        )


def next_command(config: PretrainConfig, folder: Path) -> str:
    words = ["vit2dpe", "train", "--data.name", config.data.name]
    if config.data.root is not None:
        words += ["--data.root", config.data.root]
    return shlex.join([*words, "--init", str(folder), "--run.out", f"{folder}-finetuned"])
