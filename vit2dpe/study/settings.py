"""Configuration of `vit2dpe study`, `evaluate`, `predict` and `probe`. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from ..data.settings import AugmentConfig, DataConfig, source_of
from ..errors import ConfigError
from ..ranges import Count, Natural, Positive, Range, Share, Threads
from ..spec import Numbers, Plain, Settings, Size, Sizes, Words, changed, filled, flat
from ..training.settings import PRESETS as IMAGE_PRESETS
from ..training.settings import ModelConfig, OptimConfig, RunConfig, finetuning_preset, parts_of, photos_preset

_MODEL = ModelConfig(mlp_ratio=2.0)
_OPTIM = OptimConfig(lr=3e-3, warmup_epochs=2, epochs=40, batch_size=64)
_RUN = RunConfig(out="runs/study")


@dataclass(frozen=True)
class StudyConfig(Settings):
    """Train a ViT with each encoding at one size, then measure it at others.

    `StudyConfig.of(epochs=3, data="cifar10")` takes what is not given from the preset of the task or the data; so do
    the command line and YAML.

    Args:
        task: images; text (perplexity over length, of the file --root or else Shakespeare, downloaded); copy, reverse
            or sort (sequences of numbers).
        encodings: comma-separated specs, such as none,sincos,rope(base=10),sincos+alibi; or all. With init: keep is
            that of the weights, also in sums; default keep,none,learned,rope,relative.
        sizes: comma-separated sizes to measure at; trained at data.size.
        train_length: tokens of a training sequence, for the other tasks than images.
        lengths: comma-separated lengths to measure at.
        embed_scale: factor on the embedding of words. They start at N(0, 0.02), which a learned table matches and sines
            of length √(width/2) drown; arXiv 1706.03762 takes √width.
        depths: comma-separated numbers of blocks, each trained, instead of model.depth; of a swin, give stages.
        modes: scale (same picture, more pixels), canvas (more content at the same scale), or both.
        policies: comma-separated resolution policies; "all" that an encoding can take, or "default".
        temperatures: comma-separated: none, log (logits x ln N / ln N_train), yarn.
        seeds: how many seeds, 0 upward.
        arch: vit, or swin: windows that are shifted in every second block, and two stages at least.
        stages: blocks of each stage of a swin, comma-separated.
        window: side of a swin's windows at the training size, in tokens.
        finetune: also train so many epochs on at each other size, and measure there: rows of policy "finetuned".
        model: the model; width and heads of a swin are those of its first stage.
        data: digits (built in), or photos under --root: class folders or a CSV of paths and labels, of any sizes;
            cifar10 (downloaded) and the other sources of `vit2dpe train`; of text, limit_test is a number of
            validation tokens.
        augment: of training images.
        optim: how weights are updated; for the other tasks than images an epoch is 100 steps.
        run: where and how it runs; run.threads is 1 where trials run side by side.
        init: start every training from these weights: a name of timm (its weights), a run folder, or a file. The
            architecture comes with them, unless model says otherwise, and so does the size to train at, where it fits
            into minutes; optimizer and schedule are those of finetuning few images.
        scratch: with init: also train the model of encoding keep from scratch with the same schedule, a control that
            shows what the weights brought.
        minutes: photos are trained at the largest of 32, 48, 64, 96, 128, 160, 192, 224 with which the study takes no
            longer, where no size is given.
        jobs: how many trials are trained at a time, a process each; default as many as there are CPU cores, at most 8,
            and 1 on other devices.
        per_class: also the accuracy of each class in every row, into out/classes.csv.
        training: comma-separated kinds of training, each tried with every encoding: plain, jitter, multisize, subtable;
            see `vit2dpe train`.
        quick: three encodings on the built-in digits, in under 90 seconds on two idle cores.
        smoke: two steps an encoding, to see that everything runs.
    """

    SHORT: ClassVar[Mapping[str, str]] = {"train_size": "data.size"}

    task: str = "images"
    encodings: Words | None = None
    sizes: Sizes | None = None
    train_length: Count | None = None
    lengths: Numbers | None = None
    embed_scale: Positive = 1.0
    depths: Numbers | None = None
    modes: Words = ("scale", "canvas")
    policies: Words = ("all",)
    temperatures: Words = ("none",)
    seeds: Annotated[int, Range(1, 10_000)] = 1
    arch: str = "vit"
    stages: Numbers = (2, 2)
    window: Count = 4
    finetune: Natural = 0
    model: ModelConfig = _MODEL
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = _OPTIM
    run: RunConfig = _RUN
    init: str | None = None
    scratch: bool = True
    minutes: Positive = 10
    jobs: Annotated[int, Range(1, 1024)] | None = None
    per_class: bool = False
    training: Words = ("plain",)
    quick: bool = False
    smoke: bool = False

    @classmethod
    def preset(cls, given: Mapping[str, Plain]) -> dict[str, Plain]:
        """Of the task, for images of the data; and of `quick`.

        What depends on the size of the images stays open until they are looked at.
        """
        task, name, root = (given.get(key) for key in ("task", "data.name", "data.root"))
        if task not in (None, "images"):
            return {"data.name": "digits"} | PRESETS.get(str(task), {})  # unused; files of earlier versions name it
        data = source_of(name, root)
        preset = PRESETS.get(data.partition(":")[0], PRESETS["folder"])
        if photos := data.partition(":")[0] in PHOTOS:
            preset = {key: value for key, value in preset.items() if key not in OPEN}
            batch = photos_preset(given)
            if batch and int(str(batch["optim.batch_size"])) <= 32:
                preset |= _FEW
            preset |= batch
        if given.get("init"):
            preset = {key: value for key, value in preset.items() if key not in _COME_WITH_WEIGHTS}
            preset |= {"model.mlp_ratio": None, **finetuning_preset(given)}
        if photos:
            return preset
        quick = QUICK if given.get("quick") and data == "digits" else {}
        return preset | ({} if root else {"data.name": data}) | quick


# Presets by dotted names: models and augmentation of images are those that `vit2dpe train` takes.
_ENCODINGS = {"encodings": "none,learned,sincos,relative,alibi,rope,rope_mixed"}
_SHARED = ("model.patch", "model.width", "model.depth", "model.heads", "augment.shift", "augment.flip")
_FOLDER: dict[str, Plain] = _ENCODINGS | {name: IMAGE_PRESETS[""][name] for name in _SHARED} | {
    "data.size": "32", "sizes": "24,32,48,64,96", "optim.epochs": 60, "optim.batch_size": 128, "optim.lr": 1e-3,
}  # fmt: skip
PHOTOS = ("folder", "csv", "tar", "hf")  # sources whose images may be of any sizes
OPEN = ("data.size", "sizes", "model.patch", "augment.shift")  # what depends on those
_FEW: dict[str, Plain] = {"model.width": 96, "model.depth": 4, "optim.epochs": 40}
# Of presets, what comes with weights instead, or depends on them.
_COME_WITH_WEIGHTS = ("encodings", "data.size", "sizes", "model.patch", "model.width", "model.depth", "model.heads")
_SEQUENCES: dict[str, Plain] = {
    "encodings": "sincos,learned,none", "train_length": 16, "lengths": "16", "model.width": 64, "model.depth": 2,
    "model.heads": 2, "optim.epochs": 20, "optim.batch_size": 128, "optim.lr": 2e-3,
}  # fmt: skip
PRESETS: Mapping[str, dict[str, Plain]] = {
    "digits": _ENCODINGS | {name: IMAGE_PRESETS["digits"][name] for name in _SHARED} | {
        "data.size": "16", "sizes": "12,16,24,32,48", "optim.epochs": 40, "optim.batch_size": 64, "optim.lr": 3e-3,
    },
    "folder": _FOLDER, "cifar10": _FOLDER,
    "text": {
        "encodings": "none,learned,sincos,t5,alibi,fire,rope", "train_length": 256, "lengths": "256,512,1024,2048",
        "model.width": 128, "model.depth": 4, "model.heads": 4, "optim.epochs": 7, "optim.batch_size": 24,
        "optim.lr": 2e-3,
    },
    "copy": _SEQUENCES, "reverse": _SEQUENCES, "sort": _SEQUENCES,
}  # fmt: skip
QUICK: dict[str, Plain] = {
    "encodings": "none,learned,rope", "sizes": "16,24,32", "modes": "scale", "policies": "all", "optim.epochs": 12,
}  # fmt: skip

# Settings, by dotted names or the start of them, that a task does not use.
_OF_IMAGES = (
    "data.name", "data.size", "sizes", "modes", "data.source_size", "data.unreadable", "data.val_fraction",
    "data.cache", "data.workers", "arch", "stages", "window", "model.patch", "model.pool", "model.class_token",
    "model.window", "model.global_blocks",
    "augment.", "finetune", "data.fit", "data.balanced", "minutes", "per_class",
    "init", "scratch",
)  # fmt: skip
_OF_SEQUENCES = ("train_length", "lengths", "embed_scale")
_OF_NONE = ("model.name", "model.position", "model.init", "model.jitter", "optim.ema", "run.seed", "run.parallel")


def check_task(config: StudyConfig) -> None:
    """Refuse settings that the task does not use.

    Raises:
        ConfigError: naming them.
    """
    default, now = flat(StudyConfig()), flat(config)
    now["data.name"] = None if now["data.name"] == "digits" else now["data.name"]  # the default of earlier versions
    unused = (*(_OF_SEQUENCES if config.task == "images" else _OF_IMAGES), *_OF_NONE)
    unused += () if config.task in ("images", "text") else ("data.root",)
    strange = [
        {"data.name": "data", "data.size": "train_size"}.get(name, name.rpartition(".")[2])
        for start in unused
        for name in now
        if (name.startswith(start) if start.endswith(".") else name == start) and now[name] != default[name]
    ]
    if strange:
        of_train = any(now[name] != default[name] for name in _OF_NONE)
        hint = "; a file of settings of vit2dpe train is for vit2dpe train --config" if of_train else ""
        raise ConfigError(f"task {config.task} has no use for {', '.join(strange)}: leave it out{hint}")
    if config.quick and (config.task, config.data.source) != ("images", "digits"):
        raise ConfigError(
            "quick is for the built-in digits; elsewhere set --encodings, --sizes and --epochs, or --smoke"
        )


def resolve(config: StudyConfig) -> StudyConfig:
    """Settings that are None filled from the preset of the task or the data; `smoke` applied.

    Those of `OPEN` may stay None for photos, until `photos.settle`.
    """
    config = filled(config, config.preset(flat(config)))
    if config.smoke:
        batch = min(16, config.optim.batch_size)
        few: dict[str, Plain] = {"optim.batch_size": batch, "optim.epochs": 1, "seeds": min(1, config.seeds)}
        few |= {"optim.accumulate": parts_of(config.optim, batch)}
        config = changed(config, few | {"data.limit_train": 2 * batch, "data.limit_test": 40, "jobs": 1})
    return config


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Measure any timm model, or the model of a run folder, at sizes it was not trained at.

    Args:
        model: a timm name with arguments in parentheses, "vit_tiny_patch16_224" or
            "vit2dpe_tiny_patch4_32(position=rope, num_classes=10)"; hf-hub: and local-dir: too; or a run folder.
        data: digits, cifar10, a CSV of paths and labels, or a folder: of class folders, or one that holds test or val
            (test where there are both); of photos that a run was trained on, those it held out.
        root: where cifar10 lies, or is downloaded to; without data, the folder or the CSV.
        fit: how images are brought to one size: crop, pad or squash; default that of a run, or crop.
        sizes: comma-separated sizes in pixels, 128,160,224x320 (height x width); default the model's own.
        modes: scale (same picture, more pixels), canvas (more content at the same scale), or both.
        policies: comma-separated resolution policies; "all" that the model can take, or "default".
        temperatures: comma-separated: none, log (logits x ln N / ln N_train), yarn.
        checkpoint: weights for a timm name, instead of its pretrained ones.
        untrained: take a timm name without weights, to see that everything runs.
        train_size: the size it was trained at, where the model does not say it.
        crop: centre share of each side that is kept; default the model's own (1 for a run, digits and cifar10).
        spacing: the size of a pixel in the world (metres, microns) over that of training, of images as the model gets
            them: 0.5 for 0.5 m a pixel where it was trained at 1 m. Of a ViT of ours; default 1.
        limit: use only so many images, balanced over classes.
        per_class: also number, accuracy and precision of each class, into out/classes.csv.
        unreadable: of a folder: error, or skip: files that cannot be read are left out, counted and listed in
            out/unreadable.jsonl. With a limit only as many are tried as it takes.
        batch_size: images at a time.
        device: auto, cpu, cuda, cuda:1, mps.
        out: folder that results.csv goes to.
    """

    model: str = ""
    data: str = ""
    root: str | None = None
    fit: str | None = None
    sizes: Sizes | None = None
    modes: Words = ("scale",)
    policies: Words = ("all",)
    temperatures: Words = ("none",)
    checkpoint: str | None = None
    untrained: bool = False
    train_size: Size | None = None
    crop: Share | None = None
    spacing: Positive | None = None
    limit: Count | None = None
    per_class: bool = False
    unreadable: str = "error"
    batch_size: Count = 64
    device: str = "auto"
    out: str = "runs/evaluate"


@dataclass(frozen=True)
class PredictConfig(Settings):
    """Name the classes of images, or of lines of text, with a run or any timm model.

    Args:
        inputs: the model, as `evaluate --model` takes it (a run folder, a hub folder, a timm name with arguments,
            hf-hub:user/name, local-dir:folder), then image files and folders of them, at any depth; for a run of text
            files of lines, or - for the lines of standard input.
        out: a CSV to write: path (of text: the line), then class and probability of each of the top k.
        top: classes for each image, the likeliest first.
        size: that images are brought to, 48 or 48x64 (height x width); default the model's own.
        policy: what encodings do at another size: interpolate, ntk, ...
        spacing: the size of a pixel in the world over that of training, of images at `size`; default 1.
        fit: how images are brought to one size: crop, pad or squash; default that of a run, or crop. Or native: each
            keeps its aspect ratio, in at most `max_tokens` patches; of a ViT.
        checkpoint: weights for a timm name, instead of its pretrained ones.
        unreadable: error, or skip: what cannot be read is left out, counted and named.
        batch_size: images or lines at a time.
        device: auto, cpu, cuda, cuda:1, mps.
        max_tokens: with fit native, the most patches of an image; default: those of the model's own size.
    """

    inputs: Words = field(default=(), metadata={"positional": True})
    out: str | None = None
    top: Count = 5
    size: Size | None = None
    policy: str = "default"
    spacing: Positive | None = None
    fit: str | None = None
    checkpoint: str | None = None
    unreadable: str = "error"
    batch_size: Count = 64
    device: str = "auto"
    max_tokens: Count | None = None


@dataclass(frozen=True)
class ProbeConfig(Settings):
    """Evaluate the frozen features of a run: a linear classifier and k nearest neighbours on them.

    Args:
        run: folder of the run, of `vit2dpe pretrain` or `vit2dpe train`.
        which: last or best.
        pool: avg (mean over patches), token (the class token) or both; default avg.
        k: neighbours.
        data: other data than the run's; where it is null, the run's, and what is null of the next three is too.
        root: where they lie.
        limit_train: use only so many training images, balanced over classes.
        limit_test: use only so many test images, balanced over classes.
        device: auto, cpu, cuda, cuda:1, mps.
        threads: CPU threads; default torch's own choice.
    """

    run: str | None = None
    which: str = "last"
    pool: str | None = None
    k: Count = 20
    data: str | None = None
    root: str | None = None
    limit_train: Count | None = None
    limit_test: Count | None = None
    device: str = "auto"
    threads: Threads | None = None
