"""`vit2dpe swap`: another encoding for a trained model, recovered from images without labels.

The old model teaches (`training.tasks.distill`) on the one training loop, so that a swap is resumed, logged and run on
several processes as any training is. Afterwards both are measured: `exchange_table.py`.

Source: for the rotary encoding of language models, which is dropped after training and followed by a short
recalibration, DroPE, arXiv 2512.12167. How ours differs: vision; any encoding of ours for any other one; a model's own
answers and features take the place of training data with labels.
"""

from __future__ import annotations

import hashlib
import shlex
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from ..data.datasets import Images, check_data, load_fitted, write_unreadable
from ..data.settings import AugmentConfig
from ..data.sources import FILES
from ..encodings import parse_blocks
from ..errors import CheckpointError, ConfigError, DataError
from ..interop.exchange import move_weights
from ..interop.timm.record import is_rate
from ..models.predict import hub_names
from ..models.spec import ModelSpec
from ..models.swin.model import Swin
from ..models.vit import ViT
from ..resolution.apply import policies_of
from ..resolution.sweep import train_size_of
from ..seeding import derive_seed
from ..spec import Size, changed, filled, show_size
from ..training.checkpoint import load_run, read_meta
from ..training.devices import pick_device, precision
from ..training.distributed import local_device
from ..training.initial_weights import Loaded
from ..training.log import Row as LogRow
from ..training.objectives.base import Prepared, run
from ..training.session import TrainSession
from ..training.settings import check_numbers, drop_last, image_smoke
from ..training.start import describe
from ..training.starting_model import Start, on_meta, position_of
from ..training.swap_settings import SwapConfig
from ..training.tasks.classification import ImageTask
from ..training.tasks.distill import DistillTask
from .evaluate import check_sizes
from .exchange_table import Model, measure, write
from .held_out import Batches, Subject, numbering


class Source(NamedTuple):
    """The old model, in evaluation mode, what is known of its images, and a digest of its weights."""

    model: ViT | Swin
    subject: Subject
    digest: str

    @property
    def size(self) -> Size:
        return train_size_of(self.model)


def swap(config: SwapConfig, command: str = "vit2dpe swap") -> Path:
    """Exchange the encoding of a trained model, recover it, and measure both.

    The run folder holds what `train` leaves, and `swap.csv`, `swap.png`. `load_run`, `evaluate`, `predict` and `--init`
    take it.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is trained, for what cannot work.
        TrainingError: for what went wrong on the way.
        Stopped: after a signal, when everything is saved.
    """
    config, source, spec = check(config)
    return run(config, command, partial(prepare, source=source, spec=spec))


def check(config: SwapConfig) -> tuple[SwapConfig, Source, ModelSpec]:
    """The settings with what was open filled in, the old model, and how the new one is built."""
    init = config.init
    if not init or not config.to:
        raise ConfigError("swap needs --init, the trained model, and --to, the other encoding, such as rope")
    parse_blocks(config.to)
    if not config.data.root and not config.data.name:
        raise ConfigError("swap needs images, with labels or without: --root photos")
    check_data(config.data)
    check_numbers(config.optim)
    precision(config.run.precision, pick_device(local_device(config.run.device)))
    if config.data.size is not None:
        raise ConfigError("data.size is that of the old model: leave it out; --sizes is what the new one learns at")
    if config.smoke:
        config = changed(config, image_smoke(config.data, config.optim))
    encoder = Path(init).expanduser() / "encoder"  # of a run of `pretrain`
    start = describe(encoder if (encoder / "model.json").is_file() else init)
    spec = with_encoding(start, config.to)
    source = load_source(start)
    own = source.size
    sizes = config.sizes or (own, own, scaled_size(source.model, 1.5), scaled_size(source.model, 2))
    measure = config.measure or tuple(dict.fromkeys(scaled_size(source.model, by) for by in (1, 1.5, 2, 3, 4)))
    for size in dict.fromkeys((*sizes, *measure)):
        source.model.patch_embed.grid(*size)
    new = spec.build()
    for model in (source.model, new):
        check_sizes(model.eval(), len(source.subject.mean), list(dict.fromkeys((own, *sizes))))
    named = {name: ",".join(map(show_size, given)) for name, given in (("sizes", sizes), ("measure", measure))}
    return changed(config, dict(named)), source, spec


def scaled_size(model: ViT | Swin, by: float) -> Size:
    """The model's size times a factor, in whole patches."""
    sides = zip(train_size_of(model), model.patch_embed.patch_size, strict=True)
    height, width = (max(1, round(side * by / patch)) * patch for side, patch in sides)
    return height, width


def with_encoding(start: Start, to: str) -> ModelSpec:
    """How the model is built with another encoding, without dropout.

    Raises:
        ConfigError: for the encoding that it has, and one that it cannot take.
    """
    rates = {name: 0.0 for name in start.spec.arguments if is_rate(name)}
    kind, arguments = start.changed(to)
    spec = ModelSpec(kind, arguments | rates)
    if parse_blocks(str(position_of(spec))) == parse_blocks(str(start.position)):
        raise ConfigError(f"the encoding of {start.source} is {start.position} already: give another one, --to rope")
    on_meta(spec)
    return spec


def load_source(start: Start) -> Source:
    """The model with its weights, as one of ours.

    Raises:
        ConfigError: for a model whose encoding cannot be exchanged.
    """
    model = start.load()[0].requires_grad_(False)
    if not isinstance(model, ViT | Swin):
        raise start.reason or ConfigError(f"{start.source} holds a {type(model).__name__}, no ViT and no Swin")
    if start.mean is None or start.std is None:
        raise ConfigError(f"{start.source} does not say how its images were normalized: give a run, or a name of timm")
    subset, classes = infer_imagenet_subset(model), start.classes or tuple(hub_names(model))
    if not classes and subset:
        classes = tuple(ImageNetInfo(subset).label_names())
    subject = Subject(model, str(start.position), None, classes or None, False, start.mean, start.std, 1.0)
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return Source(model, subject, digest.hexdigest())


def prepare(config: SwapConfig, session: TrainSession, source: Source, spec: ModelSpec) -> Prepared:
    """The images, and the task of learning from the old model."""
    subject, folder = source.subject, session.folder
    _check_teacher(config, folder, source)
    sizes, own = config.sizes or (source.size,), source.size
    images, _ = load_fitted(config.data, config.run.seed, lambda _: (own, *sizes), labels=False)
    if len(images.mean) != len(subject.mean):
        raise ConfigError(f"the model takes images of {len(subject.mean)} channels, these have {len(images.mean)}")
    images = images.as_recorded(dict(mean=subject.mean, std=subject.std))
    for note in images.notes:
        session.print(f"note: {note}")
    if session.world.first:
        write_unreadable(folder, images.unreadable)
    config = filled(config, {"augment.shift": min(images.native) // 8, "augment.flip": config.data.source != "digits"})
    view = AugmentConfig(config.augment.shift, config.augment.flip, config.augment.crop, label_smoothing=0.0)
    optim, where = config.optim, session.where
    task = DistillTask(
        ImageTask(
            images,
            images.native,
            optim.batch_size,
            augment=view,
            workers=config.data.workers,
            drop_last=drop_last(optim, config.run),
            **where,
        ),
        source.model.to(session.device),
        own,
        sizes,
        config.temperature,
        bool(source.model.num_classes),
        dict(
            classes=_names(source, images),
            teacher=source.digest,
            swap={"from": subject.label, "to": spec.arguments["position"], "images": len(images.train)},
        ),
    )
    to, told = spec.arguments["position"], list[str]()
    return Prepared(
        spec,
        task,
        images.name,
        images.digest,
        f"; {subject.label} is exchanged for {to}; {len(images.train)} images to learn from and {len(images.test)} to "
        f"measure on, at {', '.join(map(show_size, dict.fromkeys(sizes)))}",
        f"{subject.label} exchanged for {to}, on {images.name}",
        shlex.join(
            ["vit2dpe", "evaluate", "--model", str(folder), "--sizes", ",".join(map(show_size, dict.fromkeys(sizes)))]
        ),
        partial(finish, config, session, source, spec, images, told),
        facts=dict(images=images.used),
        begin=lambda model: Loaded(*move_weights(source.model, model)),
        config=config,
        summary=told.copy,
    )


def _names(source: Source, images: Images) -> list[str]:
    """The classes of the model by index; of a model that names none those of the images, where there are as many."""
    known, count = source.subject.classes, int(source.model.num_classes)
    if known or not count:
        return list(known or ())
    if len(images.classes) != count:
        return list(map(str, range(count)))
    index = numbering(source.subject, images.classes, folders=images.name.partition(":")[0] in FILES).tolist()
    return [images.classes[index.index(i)] for i in range(count)]


def _check_teacher(config: SwapConfig, folder: Path, source: Source) -> None:
    """Refuse to go on with another old model than the one that the run began with."""
    if config.resume and (folder / "last" / "model.json").is_file():
        before = read_meta(folder / "last").get("teacher")
        if before != source.digest:
            raise CheckpointError(
                f"{folder} learns from another model (sha256 {str(before)[:12]}, {config.init} has "
                f"{source.digest[:12]}): give the --init of before, or another --run.out"
            )


def finish(
    config: SwapConfig,
    session: TrainSession,
    source: Source,
    spec: ModelSpec,
    images: Images,
    told: list[str],
    rows: list[LogRow],
) -> list[str]:
    """Measure the old model, the new one as it was exchanged, and as it was recovered; write table and picture."""
    folder, to = session.folder, str(spec.arguments["position"])
    torch.manual_seed(derive_seed(config.run.seed, "init"))  # as it was before the first update
    swapped = spec.build().to(session.device).eval()
    move_weights(source.model, swapped)
    models = [
        Model(f"{source.subject.label} (old)", source.model, config.policies),
        Model(f"{to} (swapped)", swapped, policies_of(swapped)[:1]),
        Model(f"{to} (recovered)", load_run(folder, session.device), config.policies),
    ]
    labels = images.test.labels
    try:
        index = numbering(source.subject, images.classes, folders=images.name.partition(":")[0] in FILES)
        labelled = bool(images.classes and source.model.num_classes)
        labels = index[labels] if labelled else labels
    except DataError:
        labelled = False
        session.print("note: the classes of these images are not the model's: agreement alone is measured")
    batch = Batches(images.test, labels, source.subject, 64, images.digest, {})
    sizes = config.measure or (source.size,)
    session.print(f"measuring before and after, on {len(labels)} images at {', '.join(map(show_size, sizes))}")
    found = measure(models, batch, sizes, source.size, labelled)
    lines = write(folder, found)
    told += [line for text in lines[:-1] for line in (text, "")]
    return lines
