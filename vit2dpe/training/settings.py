"""Settings of the optimizer, the run and models of images, shared by all trainings; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

from ..data.settings import AugmentConfig, DataConfig, ViewConfig, count_files, patch_for
from ..errors import ConfigError, SettingError, unknown
from ..ranges import Count, Depth, Natural, NotNegative, Positive, Range, Rate, Seed, Share, Threads
from ..spec import Blocks, Plain, Settings, Size, changed, filled, flat, plain

MANY = 5000  # training images from which on they are no few photos
MASKED = ("MAE", "SimMIM")  # models of `pretrain`, in a checkpoint


@dataclass(frozen=True)
class OptimConfig(Settings):
    """Optimizer and schedule.

    Args:
        name: an optimizer of timm, such as adamw, lamb, lion, sgd.
        lr: peak learning rate.
        weight_decay: biases, norms, tables, tokens and frequencies are exempt.
        betas: of Adam and its kin; two numbers.
        schedule: of timm, once for every update: cosine, tanh, step, poly; or noam (the inverse square root).
        min_lr: where the schedule ends; default lr / 100.
        warmup_epochs: linear warm-up, from lr / 100; default 5, in trainings of 5 epochs or fewer a tenth of them.
        epochs: passes over the training data.
        batch_size: samples of an update, over all processes and parts.
        drop_last: leave out the last batch of an epoch where it is smaller, as timm does; default: where run.compile is
            blocks, or run.graph is set: their graphs take one size.
        accumulate: parts that a batch is cut into where it does not fit in memory.
        clip_grad: largest gradient norm; 0: not clipped.
        layer_decay: learning rate of a block over that of the next; 1: all alike.
        position_lr: factor on the learning rate of what encodings learn: tables, slopes, frequencies, networks.
        freeze: leading blocks that keep the weights they started from, with everything before them; all blocks: the
            head alone is trained.
        ema: decay of the averaged weights that are evaluated and kept, such as 0.9998; 0: none.
        ema_warmup: let the decay grow from 0 to `ema` over the first updates.
    """

    name: str = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.05
    betas: tuple[Rate, Rate] | None = None
    schedule: str = "cosine"
    min_lr: NotNegative | None = None
    warmup_epochs: NotNegative | None = None
    epochs: Count = 100
    batch_size: Count = 128
    drop_last: bool | None = None
    accumulate: Count = 1
    clip_grad: NotNegative = 1.0
    layer_decay: Share = 1.0
    position_lr: Positive = 1.0
    freeze: Depth = 0
    ema: Rate = 0.0
    ema_warmup: bool = True

    @property
    def warmup(self) -> float:
        """`warmup_epochs`, or its default."""
        if self.warmup_epochs is None:
            return 5 if self.epochs > 5 else self.epochs / 10
        return self.warmup_epochs


@dataclass(frozen=True)
class RunConfig(Settings):
    """The run: where, on what, from which seed.

    Args:
        out: folder of the run.
        seed: decides every random draw.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16.
        threads: CPU threads; default torch's own choice.
        compile: torch.compile: none; model (or true), the whole of it; or blocks, one graph for all of them, which is
            compiled in a fraction of the time.
        graph: replay forward and backward pass as CUDA graphs, for batches of one size: where the host is slower than
            the device, as it is for small models.
        deterministic: the same bits each time on a GPU too, at some cost in time; a CPU has them always.
        grad_checkpointing: compute blocks again in the backward pass instead of keeping their activations.
        parallel: under torchrun: ddp, or fsdp to shard weights and optimizer.
        wait_minutes: under torchrun: how long processes wait for one that works alone: files, trackers, results.
        save_minutes: save also this often within an epoch; 0: at the end of every epoch only.
        eval_every: epochs from one evaluation to the next; the last epoch always has one, with 0 it alone; default: 1,
            in a study without patience 0.
        patience: stop after so many epochs without a better result; 0: never.
        bad_losses: give up after so many losses in a row that are not finite.
        tensorboard: write TensorBoard's events too, into out/tensorboard.
        wandb: the name of a Weights & Biases project to log to; with WANDB_MODE=offline into out/wandb only.
    """

    out: str = "runs/train"
    seed: Seed = 0
    device: str = "auto"
    precision: str = "auto"
    threads: Threads | None = None
    compile: bool | str = False
    graph: bool = False
    deterministic: bool = False
    grad_checkpointing: bool = False
    parallel: str = "ddp"
    wait_minutes: Annotated[float, Range(0, 100_000, above=True)] = 600
    save_minutes: NotNegative = 10
    eval_every: Natural | None = None
    patience: Natural = 0
    bad_losses: Count = 3
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        words: dict[bool | str, bool | str] = {"none": False, "model": True, "blocks": "blocks"}
        if isinstance(self.compile, str) and self.compile not in words:
            raise SettingError(
                "compile", f": {unknown('way to compile', self.compile, ['none', 'model', 'blocks', 'true', 'false'])}"
            )
        object.__setattr__(self, "compile", words.get(self.compile, self.compile))

    @property
    def one_size(self) -> bool:
        """Whether graphs are made that take batches of one size."""
        return self.graph or self.compile == "blocks"


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The model of images.

    Args:
        name: a model of timm, ours (vit2dpe_tiny_patch4_32, ...) or theirs; none: a ViT of the sizes below.
        position: spec of the encoding, such as rope, sincos+alibi, rope(base=10).
        patch: patch side in pixels.
        width: channels of a token.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP over width.
        pool: avg, token or map.
        class_token: whether there is one; default: with pool token.
        window: all blocks but `global_blocks` attend within windows of so many tokens a side; 0 or none: no windows.
        global_blocks: comma-separated numbers of blocks that attend to everything, such as 2,5,8,11; from the end, -1.
        drop_path: stochastic depth rate of the last block.
        jitter: in training every token's place is moved by up to so many patches along each axis (arXiv 2506.03737);
            0: not. Of a table no place leaves the image.
        init: default (the model's own), xavier, trunc_normal or gpt2.
        options: further arguments of the model, such as '{"qk_norm": true}'.
    """

    name: str | None = None
    position: str | None = None
    patch: Count | None = None
    width: Count | None = None
    depth: Depth | None = None
    heads: Count | None = None
    mlp_ratio: Positive | None = None
    pool: str | None = None
    class_token: bool | None = None
    window: Natural | None = None
    global_blocks: Blocks | None = None
    drop_path: Rate = 0.0
    jitter: NotNegative = 0.0
    init: str = "default"
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "none":
            object.__setattr__(self, "name", None)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Train a classifier of images with any encoding.

    Settings left at null take the preset of the data.

    Args:
        model: the model.
        data: the images.
        augment: augmentation of training images.
        optim: optimizer and schedule.
        run: where and how it runs.
        resume: go on from run.out/last, if it is there.
        init: start from these weights: a name of timm (its weights), a run folder, or a file. The architecture, the
            size of images and their normalization come with them, unless settings say otherwise; --model.position
            exchanges the encoding alone, and what was taken and what not is printed. Presets are then those of
            finetuning few images (`finetuning_preset`).
        per_class: also number, accuracy and precision of each class, of best/, into out/classes.csv and summary.md.
        training: what varies from step to step: plain (nothing), jitter (places, by up to half a patch), multisize (the
            image size: augment.train_sizes, or 3/4, 1 and 3/2 of it), or subtable (which part of a table of twice the
            sides; evaluation takes its middle).
        smoke: two steps on the CPU, to see that everything runs.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    resume: bool = False
    init: str | None = None
    per_class: bool = False
    training: str = "plain"
    smoke: bool = False

    @classmethod
    def preset(cls, given: Mapping[str, Plain]) -> Mapping[str, Plain]:
        """Of photos that are named by their folder alone, and of weights to start from."""
        return photos_preset(given) | finetuning_preset(given)


# Presets of the data, by dotted names, for settings that are null. A named model has its own sizes.
PRESETS: Mapping[str, Mapping[str, Plain]] = {
    "digits": {
        "model.patch": 4, "model.width": 64, "model.depth": 3, "model.heads": 8, "model.mlp_ratio": 2.0,
        "model.pool": "avg", "model.position": "rope", "data.size": "16", "augment.shift": 1, "augment.flip": False,
    },
    "": {
        "model.patch": 4, "model.width": 192, "model.depth": 9, "model.heads": 3, "model.mlp_ratio": 2.0,
        "model.pool": "avg", "model.position": "rope", "augment.shift": 4, "augment.flip": True,
    },
}  # fmt: skip


def photos_preset(given: Mapping[str, Plain]) -> dict[str, Plain]:
    """The preset of photos that are named by `data.root` alone: batches of 32, and of few photos a quarter at most."""
    root = given.get("data.root")
    if given.get("data.name") or not root:
        return {}
    trained = count_files(str(root)) * 4 // 5
    return {"optim.batch_size": 128 if trained > MANY else max(2, min(32, trained // 4))}


def finetuning_preset(given: Mapping[str, Plain]) -> dict[str, Plain]:
    """Optimizer and schedule of a classifier that starts from weights: for few images, and short.

        lr 3e-4, layer_decay 0.75, 30 epochs, a tenth of them warm-up

    Weights that were trained on many images are near where they should be, and few images say little, so that the
    early layers hardly move: with 12 blocks the stem has 0.75^13, 2%, of the learning rate. Layer decay is that of BEiT
    and MAE (arXiv 2106.08254, 2111.06377: 0.65 to 0.75). Their learning rate, 5e-4 for 256 images of a batch of 1,024,
    is 2e-3; for batches of 32 that is 6e-5 by their linear rule and 3.5e-4 by the root of the batch size, which suits
    Adam. 30 epochs are DeiT's at another size (arXiv 2012.12877). A run of `pretrain` that is started from has no
    classifier yet and keeps the schedule of a training, as MAE has it (50 to 100 epochs).
    """
    init = given.get("init")
    if not init or of_masked_run(Path(str(init)).expanduser()):
        return {}
    epochs = given.get("optim.epochs", 30)
    preset: dict[str, Plain] = {"optim.lr": 3e-4, "optim.layer_decay": 0.75, "optim.epochs": epochs}
    return preset | ({"optim.warmup_epochs": epochs / 10} if isinstance(epochs, int) else {})


def of_masked_run(path: Path) -> bool:
    """Whether a folder is that of a run of `pretrain`."""
    files = [place / "model.json" for place in (path / "last", path) if (place / "model.json").is_file()]
    try:
        return bool(files) and json.loads(files[0].read_bytes()).get("model") in MASKED
    except (ValueError, AttributeError):  # refused where it is read
        return False


def resolve(config: TrainConfig, start: Mapping[str, Plain] | None = None) -> TrainConfig:
    """Every setting that is None filled from the weights and from the preset of the data; `smoke` applied.

    What depends on the size of the images stays open until they are read (`sized`).

    Args:
        start: settings, by dotted names, that come with the weights to start from.
    """
    if start is not None:
        config = filled(config, start)
    named = {"model.position": "rope"} if (config.model.name or "").startswith("vit2dpe_") else {}
    preset = image_preset(config.data, config.model, config.augment, named)
    if start is not None and config.model.name is None:
        preset = {name: value for name, value in preset.items() if name not in ARCHITECTURE}
    config = filled(config, preset | {"optim.warmup_epochs": config.optim.warmup})
    return changed(config, image_smoke(config.data, config.optim)) if config.smoke else config


def image_preset(
    data: DataConfig, model: ModelConfig, augment: ViewConfig, named: Mapping[str, Plain]
) -> dict[str, Plain]:
    """The preset of the data, without a shift where images are cropped; `named`: that of a named model."""
    preset = dict(PRESETS.get(data.source, PRESETS[""]))
    if data.source not in PRESETS:
        preset |= of_size(data.size or data.source_size, photos=data.name is None)
    if data.root is None:
        preset |= {"data.name": data.source}
    if model.name is not None:
        preset = {name: value for name, value in preset.items() if not name.startswith("model.")} | dict(named)
    return preset | ({"augment.shift": 0} if augment.crop is not None else {})


def of_size(size: Size | None, *, photos: bool) -> dict[str, Plain]:
    """Presets that depend on the size of training images, None where it is still open.

    Args:
        size: (H, W).
        photos: whether patches and shifts grow with the size; else they are those of pictures of 32 pixels.
    """
    if size is None:
        return dict.fromkeys(("model.patch", "augment.shift"))
    return {"model.patch": patch_for(size), "augment.shift": min(size) // 8} if photos else {}


ARCHITECTURE = tuple(name for name in PRESETS["digits"] if name.startswith("model."))
S = TypeVar("S", bound=Settings)


def sized(config: S, size: Size, *, photos: bool) -> S:
    """The settings with what depended on the size of the images."""
    own = {name: PRESETS[""][name] for name in ("model.patch", "augment.shift")} | of_size(size, photos=photos)
    if flat(config)["model.name"] is not None:
        del own["model.patch"]
    return filled(config, own)


def image_smoke(data: DataConfig, optim: OptimConfig) -> dict[str, Plain]:
    """Changes that make two small steps on the CPU of a training on images."""
    batch = min(16, optim.batch_size)
    few = None if data.val_fraction else 2 * batch  # two images of every class, where a part is held out
    return {
        "data.limit_train": few, "data.limit_test": 40, "optim.epochs": 1, "optim.batch_size": batch,
        "optim.accumulate": parts_of(optim, batch), "run.device": "cpu", "run.compile": False,
        "run.graph": False,
    }  # fmt: skip


def parts_of(optim: OptimConfig, batch: int) -> int:
    """`accumulate` of a smaller batch: no more parts than samples, where that was so before."""
    return min(optim.accumulate, batch) if optim.accumulate <= optim.batch_size else optim.accumulate


IN_WINDOWS = dict(window="window", global_blocks="global_blocks")  # settings of `ModelConfig`, and arguments of a ViT


def model_arguments(model: Settings, **more: str) -> dict[str, Plain]:
    """A model's sizes by the names of its constructor's arguments, without those that are None.

    Args:
        model: settings of a model, of images or of text.
        more: further settings and their arguments, such as `pool="global_pool"`.
    """
    names = dict(position="position", width="embed_dim", depth="depth", heads="num_heads", mlp_ratio="mlp_ratio") | more
    values = plain(model)
    values |= {name: list(x) for name in names if isinstance(x := getattr(model, name), Blocks)}
    return {argument: values[name] for name, argument in names.items() if values[name] is not None}


def own_options(options: Mapping[str, Plain], decided: Mapping[str, str]) -> dict[str, Plain]:
    """`model.options`, further arguments of a model.

    Args:
        decided: arguments that are none of them, and what decides on each.

    Raises:
        ConfigError: naming one of those.
    """
    for name in options:
        if name in decided:
            raise ConfigError(f"model.options: {name} is decided by {decided[name]}, leave it out")
    return dict(options)


def drop_last(optim: OptimConfig, run: RunConfig) -> bool | None:
    """Whether the last batch of an epoch is left out where it is smaller; None: unless there is no other."""
    return (None if run.one_size else False) if optim.drop_last is None else optim.drop_last


def check_numbers(optim: OptimConfig) -> None:
    """Refuse numbers that do not go together, whatever is trained.

    Raises:
        ConfigError: naming the setting, what it must be and what came.
    """
    if optim.accumulate > optim.batch_size:
        raise ConfigError(
            f"optim.accumulate cuts a batch into parts: at most optim.batch_size = {optim.batch_size} of them, "
            f"got {optim.accumulate}"
        )
    if optim.warmup >= optim.epochs > 1:
        raise ConfigError(f"optim.warmup_epochs must be below optim.epochs: got {optim.warmup} of {optim.epochs}")
