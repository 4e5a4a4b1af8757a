"""`vit2dpe pretrain`: an encoder from images without labels, by masking (MAE, SimMIM)."""

from __future__ import annotations

import math
import shlex
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...data.datasets import Images, check_data, normalize
from ...data.identity import FILES
from ...data.settings import AugmentConfig
from ...data.splits import resize
from ...encodings import parse_blocks
from ...errors import ConfigError, unknown
from ...models.mae import MAE, keep_count
from ...models.simmim import SimMIM
from ...models.spec import ModelSpec
from ...plots.figures import need_matplotlib
from ...plots.reconstruction import save as save_pictures
from ...seeding import generator
from ...spec import Size
from ..checkpoint import load_run, read_meta, write_checkpoint
from ..distributed import World
from ..initial_weights import initialize, jitter_positions
from ..log import Row
from ..optimizer import make_optimizer, make_schedule
from ..pretrain_settings import PretrainConfig, resolve
from ..session import TrainSession, check_run
from ..settings import sized
from ..tasks.masked_images import MaskedTask
from .base import Prepared, keep, run
from .images import check_augment, image_task, likely_size, model_spec, read_images


def pretrain(config: PretrainConfig, command: str = "vit2dpe pretrain") -> Path:
    """Pretrain an encoder and leave a run folder: what `train` leaves, `encoder/`, which `load_run` reads, and
    `reconstructions.png`.

    Arguments, result and errors are those of `run`.
    """
    return run(check(config), command, prepare)


def prepare(config: PretrainConfig, session: TrainSession) -> Prepared:
    """Hidden patches, predicted from those that are visible."""
    data, size, config = read_images(config, session, labels=False)
    spec = masked_spec(config, size, len(data.mean))
    with torch.device("meta"):
        grid = masked_model(spec.build()).mask_grid(*size)
    task = masked_task(config, data, size, grid, session.device, session.world)
    n, unit, encoder = math.prod(grid), "patches" if config.objective == "mae" else "units", config.model

    def draw(model: nn.Module) -> None:
        """By default as the original of each objective does."""
        masked_model(model).init_weights() if encoder.init == "default" else initialize(model, encoder.init)

    return Prepared(
        spec,
        task,
        data.name,
        data.digest,
        f", sees {keep_count(n, task.mask_ratio)} of {n} {unit}; {len(data.train)} training images of "
        f"{size[0]}x{size[1]}",
        f"Masked pretraining ({config.objective}), {encoder.position or encoder.name}, on {data.name}",
        next_command(config, session.folder, bool(data.classes)),
        partial(finish, config, session.folder, data, size, spec),
        facts=dict(images=data.used),
        initialize=draw,
        adapt=(lambda model: jitter_positions(masked_model(model).encoder, encoder.jitter)) if encoder.jitter else keep,
        config=config,
    )


def check(config: PretrainConfig) -> PretrainConfig:
    """The settings with every preset filled in, after refusing all that can be refused before data are read."""
    check_data(config.data)
    config = resolve(config)
    check_run(config)
    check_augment(view_augment(config))
    if config.objective not in ("mae", "simmim"):
        raise unknown("objective", config.objective, ("mae", "simmim"))
    if config.objective == "simmim" and config.norm_pix:
        raise ConfigError("simmim predicts pixels as they are: leave norm_pix out")
    if config.pictures:
        need_matplotlib("; or --pictures 0")
    if config.data.balanced:
        raise ConfigError("masked pretraining sees no classes: leave data.balanced out")
    for position in (config.model.position, config.decoder.position):
        if position is not None:
            parse_blocks(position)
    if config.model.pool == "map":
        raise ConfigError("masking trains no attention pooling: --model.pool avg or token")
    size = likely_size(config)
    with torch.device("meta"):
        filled = sized(config, size, photos=config.data.name is None)
        model = masked_model(masked_spec(filled, size, 3).build())
    if config.model.jitter:
        jitter_positions(model.encoder, config.model.jitter)
    keep_count(math.prod(model.mask_grid(*size)), _mask_ratio(config))
    make_schedule(make_optimizer(model, config.optim), config.optim, 1)
    return config


def masked_model(model: nn.Module) -> MAE | SimMIM:
    """The model of a masked pretraining.

    Raises:
        ConfigError: for another one.
    """
    if isinstance(model, MAE | SimMIM):
        return model
    raise ConfigError(f"a MAE or a SimMIM is needed, got a {type(model).__name__}")


def masked_spec(config: PretrainConfig, size: Size, channels: int) -> ModelSpec:
    """The encoder that the settings name, without classifier and its norm before pooling, and its decoder."""
    encoder = model_spec(config.model, size, channels, 0).arguments
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
    named = {name: value for name, value in sizes.items() if value is not None}
    return ModelSpec("MAE", dict(encoder=encoder, decoder_position=decoder.position, norm_pix=config.norm_pix) | named)


def _mask_ratio(config: PretrainConfig) -> float:
    if config.mask_ratio is None:
        raise ConfigError("mask_ratio is still open: pass the config through pretrain_settings.resolve first")
    return config.mask_ratio


def masked_task(
    config: PretrainConfig, data: Images, size: Size, grid: tuple[int, ...], device: torch.device, world: World
) -> MaskedTask:
    images = image_task(config, view_augment(config), data, size, device, world)
    return MaskedTask(images, grid, _mask_ratio(config))


def view_augment(config: PretrainConfig) -> AugmentConfig:
    """The augmentation of a pretraining: views alone."""
    view = config.augment
    return AugmentConfig(shift=view.shift, flip=view.flip, crop=view.crop, label_smoothing=0.0)


def finish(
    config: PretrainConfig, folder: Path, data: Images, size: Size, spec: ModelSpec, rows: list[Row]
) -> list[str]:
    """Write `encoder/` and the pictures, from the weights that were kept."""
    model, meta = masked_model(load_run(folder)), read_meta(folder / "last")
    about = {name: meta[name] for name in ("data", "digest", "classes", "mean", "std", "train_size")}
    about |= {FILES: meta[FILES]} if FILES in meta else {}
    encoder = spec.arguments["encoder"]
    kind = ModelSpec("timm" if "model_name" in encoder else "ViT", encoder)
    tensors = dict(model.encoder.state_dict())
    write_checkpoint(folder / "encoder", kind, {"model": tensors}, grid=model.train_grid, **about)
    result = f"loss on hidden test patches {rows[-1]['test_loss']:.4f}"
    if not config.pictures:
        return [result]
    spaced = torch.linspace(0, len(data.test) - 1, config.pictures).long()  # test images may lie class by class
    images = normalize(resize(data.test.pixels(spaced), size), data.mean, data.std)  # (pictures, C, H, W)
    picture, draws = folder / "reconstructions.png", generator(config.run.seed, "pictures")
    save_pictures(picture, model, images, data.mean, data.std, _mask_ratio(config), generator=draws)
    return [f"{result}; pictures {picture}"]


def next_command(config: PretrainConfig, folder: Path, labelled: bool = True) -> str:
    words = ["vit2dpe", "train", *([] if config.data.name is None else ["--data.name", config.data.name])]
    if config.data.root is not None:
        words += ["--data.root", config.data.root if labelled else "FOLDER_WITH_CLASSES"]
    return shlex.join([*words, "--init", str(folder), "--run.out", f"{folder}-finetuned"])
