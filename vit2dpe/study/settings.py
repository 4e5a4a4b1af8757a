"""What a study is told, as a dataclass that the command line and YAML fill. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import ConfigError
from ..spec import Settings, Size, plain

DEFAULT_ENCODINGS = "none,learned,sincos,relative,alibi,rope,rope_mixed"
TEXT_ENCODINGS = "none,learned,sincos,t5,alibi,fire,rope"


@dataclass(frozen=True)
class StudyConfig(Settings):
    """Train a ViT with each encoding at one size, then measure it at others.

    Settings left at None take the preset of the data source.

    Args:
        task: images; text (perplexity over length, of the file --root or else Shakespeare, downloaded); copy, reverse
            or sort (sequences of numbers).
        data: where images come from: digits (built in), folder (class folders under --root), cifar10 (downloaded).
        root: folder of the images; of task text, the file.
        encodings: comma-separated words, such as none,sincos,rope(base=10),sincos+alibi; or all.
        train_size: pixels of training images, 32 or 32x48 (height x width).
        sizes: comma-separated sizes to measure at.
        train_length: tokens of a training sequence, for the other tasks than images.
        lengths: comma-separated lengths to measure at.
        embed_scale: factor on the embedding of words. They start at N(0, 0.02), which a learned table matches and sines
            of length √(width/2) drown; arXiv 1706.03762 takes √width.
        depths: comma-separated numbers of blocks, each trained.
        modes: scale (same picture, more pixels), canvas (more content at the same scale), or both.
        policies: comma-separated resolution policies; "all" that an encoding can take, or "default".
        temperatures: comma-separated: none, log (logits x ln N / ln N_train), yarn.
        seeds: how many seeds, 0 upward.
        source_size: size that pictures of differing sizes are brought to once.
        limit_train: use only so many training images, balanced over classes.
        limit_test: use only so many test images, balanced over classes; of a text, so many validation tokens.
        unreadable: of a folder: error, or skip: images that cannot be read are left out, counted and listed in
            out/unreadable.jsonl.
        arch: vit, or swin: windows that are shifted in every second block, and two stages at least.
        stages: blocks of each stage of a swin, comma-separated.
        window: side of a swin's windows at the training size, in tokens.
        patch: patch side in pixels.
        width: channels of a token; of a swin, in its first stage.
        depth: blocks of a vit.
        heads: attention heads; of a swin, in its first stage.
        mlp_ratio: hidden channels of the MLP over width.
        epochs: passes over the training images.
        batch_size: images of a step.
        lr: peak learning rate.
        weight_decay: of AdamW; tables, tokens and frequencies are exempt.
        warmup_epochs: linear warm-up before the cosine.
        drop_path: stochastic depth rate of the last block.
        label_smoothing: of the cross-entropy.
        shift: random shift in training, pixels of the training size.
        flip: random horizontal flip in training.
        clip_grad: largest gradient norm.
        finetune: also train so many epochs on at each other size, and measure there: rows of policy "finetuned".
        precision: auto (bfloat16 on CUDA, else float32), float32 or bfloat16.
        device: auto, cpu, cuda, cuda:1, mps.
        jobs: how many cells are trained at a time, a process each; default as many as there are CPU cores, at most 8,
            and 1 on other devices.
        threads: CPU threads of each; default 1 where jobs run side by side, else torch's own choice.
        out: folder that the results go to.
        quick: three encodings on the built-in digits, in under 90 seconds on two idle cores.
        smoke: two steps an encoding, to see that everything runs.
    """

    task: str = "images"
    data: str = "digits"
    root: str | None = None
    encodings: str | None = None
    train_size: str | None = None
    sizes: str | None = None
    train_length: int | None = None
    lengths: str | None = None
    embed_scale: float = 1.0
    depths: str | None = None
    modes: str = "scale,canvas"
    policies: str = "all"
    temperatures: str = "none"
    seeds: int = 1
    source_size: Size | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    unreadable: str = "error"
    arch: str = "vit"
    stages: str = "2,2"
    window: int = 4
    patch: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float = 2.0
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 0.05
    warmup_epochs: float = 2
    drop_path: float = 0.0
    label_smoothing: float = 0.1
    shift: int | None = None
    flip: bool | None = None
    clip_grad: float = 1.0
    finetune: int = 0
    precision: str = "auto"
    device: str = "auto"
    jobs: int | None = None
    threads: int | None = None
    out: str = "runs/study"
    quick: bool = False
    smoke: bool = False


PRESETS: dict[str, dict[str, Any]] = {
    "digits": dict(
        encodings=DEFAULT_ENCODINGS, train_size="16", sizes="12,16,24,32,48", patch=4, width=64, depth=3, heads=8,
        epochs=40, batch_size=64, lr=3e-3, shift=1, flip=False,
    ),
    "folder": dict(
        encodings=DEFAULT_ENCODINGS, train_size="32", sizes="24,32,48,64,96", patch=4, width=192, depth=9, heads=3,
        epochs=60, batch_size=128, lr=1e-3, shift=4, flip=True,
    ),
}  # fmt: skip
PRESETS["cifar10"] = PRESETS["folder"]
PRESETS["text"] = dict(
    encodings=TEXT_ENCODINGS, train_length=256, lengths="256,512,1024,2048", width=128, depth=4, heads=4, epochs=7,
    batch_size=24, lr=2e-3,
)  # fmt: skip
PRESETS["copy"] = PRESETS["reverse"] = PRESETS["sort"] = dict(
    encodings="sincos,learned,none", train_length=16, lengths="16", width=64, depth=2, heads=2, epochs=20,
    batch_size=128, lr=2e-3,
)  # fmt: skip
QUICK = dict(encodings="none,learned,rope", sizes="16,24,32", modes="scale", policies="default", epochs=12)


# What a study of another task has no use for.
OF_IMAGES = (
    "data", "train_size", "sizes", "modes", "source_size", "unreadable", "arch", "stages", "window", "patch",
    "label_smoothing", "shift", "flip", "finetune",
)  # fmt: skip
OF_LINES = ("train_length", "lengths", "embed_scale", "depths")


def check_task(config: StudyConfig) -> None:
    """Refuse settings that the task would pass over.

    Raises:
        ConfigError: naming them.
    """
    default = StudyConfig()
    useless: tuple[str, ...] = OF_LINES if config.task == "images" else OF_IMAGES
    useless += () if config.task in ("images", "text") else ("root",)
    if strange := [name for name in useless if getattr(config, name) != getattr(default, name)]:
        raise ConfigError(f"task {config.task} has no use for {', '.join(strange)}: leave out what it would pass over")
    if config.quick and (config.task, config.data) != ("images", "digits"):
        raise ConfigError(
            "quick is for the built-in digits; elsewhere set --encodings, --sizes and --epochs, or --smoke"
        )


def resolve(config: StudyConfig) -> StudyConfig:
    """Every setting that is None filled from the preset of its data source; `quick` and `smoke` applied."""
    if config.quick:
        default = StudyConfig()
        changed = {f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)}
        config = replace(config, **{k: v for k, v in QUICK.items() if k not in changed})  # type: ignore[arg-type]
    preset = PRESETS[config.task] if config.task in PRESETS else PRESETS.get(config.data, PRESETS["folder"])
    missing = {name: value for name, value in preset.items() if getattr(config, name) is None}
    config = replace(config, **missing)
    if config.smoke:
        batch = min(16, int(config.batch_size or 1))
        few: dict[str, Any] = dict(batch_size=batch, limit_train=2 * batch, limit_test=40)
        config = replace(config, epochs=1, seeds=min(1, config.seeds), jobs=1, **few)
    return config


def as_dict(config: StudyConfig | EvaluateConfig) -> dict[str, Any]:
    return plain(config)


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Measure any timm model, or the model of a run folder, at sizes it was not trained at.

    Args:
        model: a timm name with arguments in parentheses, "vit_tiny_patch16_224" or
            "vit2dpe_tiny_patch4_32(position=rope, num_classes=10)"; hf-hub: and local-dir: too; or a run folder.
        data: digits, cifar10, or a folder: of class folders, or one that holds val or test.
        root: where cifar10 lies, or is downloaded to.
        sizes: comma-separated sizes in pixels, 128,160,224x320 (height x width); default the model's own.
        modes: scale (same picture, more pixels), canvas (more content at the same scale), or both.
        policies: comma-separated resolution policies; "all" that the model can take, or "default".
        temperatures: comma-separated: none, log (logits x ln N / ln N_train), yarn.
        checkpoint: weights for a timm name, instead of its pretrained ones.
        untrained: take a timm name without weights, to see that everything runs.
        train_size: the size it was trained at, where the model does not say it.
        crop: centre share of each side that is kept; default the model's own (1 for a run, digits and cifar10).
        limit: use only so many images, balanced over classes.
        unreadable: of a folder: error, or skip: files that cannot be read are left out, counted and listed in
            out/unreadable.jsonl. With a limit only as many are tried as it takes.
        batch_size: images at a time.
        device: auto, cpu, cuda, cuda:1, mps.
        out: folder that results.csv goes to.
    """

    model: str = ""
    data: str = ""
    root: str | None = None
    sizes: str | None = None
    modes: str = "scale"
    policies: str = "all"
    temperatures: str = "none"
    checkpoint: str | None = None
    untrained: bool = False
    train_size: str | None = None
    crop: float | None = None
    limit: int | None = None
    unreadable: str = "error"
    batch_size: int = 64
    device: str = "auto"
    out: str = "runs/evaluate"
