"""Settings of a study, parsed and checked: which models it trains, and what it measures them at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..data.datasets import check_data
from ..encodings import ENCODINGS, parse_blocks
from ..errors import ConfigError, unknown
from ..models import Swin, ViT
from ..models.spec import ModelSpec
from ..resolution.policies import POLICIES, TEMPERATURES
from ..resolution.sweep import MODES
from ..spec import Numbers, Plain, Size, Sizes, Words, filled, parse_terms, show_size
from ..training.devices import pick_device, precision
from ..training.objectives.images import check_augment, started_spec
from ..training.settings import IN_WINDOWS, OptimConfig, check_numbers, model_arguments, of_size, own_options
from ..training.starting_model import Start, on_meta
from ..training.tasks.sequences import SEQUENCES
from ..training.varied import TRAININGS, augmented, varied_spec, vary
from .from_weights import KEEP, changed_word, kept, started, with_weights, words_for
from .rows import SCRATCH, WEIGHTS
from .settings import StudyConfig, resolve

TASKS = ("images", "text", *SEQUENCES)
ARCHITECTURES = {"vit": "ViT", "swin": "Swin"}


class Trial(NamedTuple):
    """One training of a study; `start` and `training`: as in `Row`."""

    encoding: str
    depth: int
    seed: int
    start: str = ""
    training: str = "plain"


@dataclass(frozen=True)
class Plan:
    """Settings of a study, parsed and checked.

    Args:
        config: with the presets of its task and data filled in.
        encodings, depths: each encoding is trained at each depth; a swin has its stages instead.
        train_size, sizes: (height, width) in pixels; of text and sequences (1, tokens).
        start: the weights that trainings start from.
        left_out: encodings and the trainings that they cannot have, with the reason; others can.
    """

    config: StudyConfig
    encodings: Words
    depths: Numbers
    train_size: Size
    sizes: Sizes
    start: Start | None = None
    left_out: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def trials(self) -> list[Trial]:
        """Of each seed all encodings at all depths, trained in each way; from weights then the control, the kept
        encoding from scratch."""
        seeds, start = range(self.config.seeds), "" if self.start is None else WEIGHTS
        ways = self.config.training
        pairs = [(encoding, way) for encoding in self.encodings for way in ways if (encoding, way) not in self.left_out]
        one = [(encoding, depth, start, way) for depth in self.depths for encoding, way in pairs]
        if self.start is not None and self.config.scratch and kept(self.start) in self.encodings:
            one.append((kept(self.start), self.depths[0], SCRATCH, "plain"))
        return [Trial(encoding, depth, seed, how, way) for seed in seeds for encoding, depth, how, way in one]

    def optim(self, trial: Trial) -> OptimConfig:
        """How weights are updated; off images, whose epochs are longer, warm-up is at most a tenth of the training.

        Of a control all blocks learn alike: what keeps good weights near where they are would keep drawn ones there.
        """
        optim = self.config.optim
        if trial.start == SCRATCH:
            return replace(optim, layer_decay=1.0, freeze=0)
        if self.config.task == "images":
            return optim
        return replace(optim, warmup_epochs=min(optim.warmup, optim.epochs / 10))

    def model_name(self, trial: Trial) -> str:
        """The encoding, how it is trained, the depth where there are several, and whether it is the control."""
        name = trial.encoding if trial.training == "plain" else f"{trial.encoding}, {trial.training}"
        name = f"{name}, depth {trial.depth}" if len(self.depths) > 1 else name
        return f"{name}, from scratch" if trial.start == SCRATCH else name

    def model_spec(self, trial: Trial, classes: int, channels: int = 3) -> ModelSpec:
        """How to build the model of a trial.

        Args:
            classes: of images, or the size of the vocabulary.
            channels: of images.
        """
        config = self.config
        if self.start is not None:
            model = replace(config.model, position=changed_word(trial.encoding, self.start))
            spec = started_spec(self.start, model, self.train_size, channels, classes)
            return varied_spec(spec, trial.training, self.train_size)
        sizes = replace(config.model, position=trial.encoding, depth=trial.depth)
        arguments = model_arguments(sizes) | dict(drop_path_rate=config.model.drop_path)
        decided = dict.fromkeys(("num_classes", "in_chans", "vocab_size", "pool", "cross", "masked_lm"), "the task")
        options = own_options(config.model.options, decided)
        if config.task != "images":
            arguments |= dict(vocab_size=classes, context=self.train_size[1], embed_scale=config.embed_scale)
            if config.task == "text":
                return ModelSpec("TextDecoder", arguments | options)
            return ModelSpec("TextEncoder", arguments | dict(pool="", num_classes=classes) | options)
        arguments |= dict(img_size=self.train_size, patch_size=config.model.patch, in_chans=channels)
        arguments |= dict(num_classes=classes, global_pool=config.model.pool or "avg")
        arguments |= model_arguments(sizes, **IN_WINDOWS)
        if config.arch == "vit":
            arguments["class_token"] = config.model.class_token or config.model.pool == "token"
        else:
            heads = [int(config.model.heads or 1) * 2**i for i in range(len(config.stages))]
            arguments |= dict(depths=list(config.stages), num_heads=heads, window_size=config.window)
            del arguments["depth"]
        spec = ModelSpec(ARCHITECTURES[config.arch], arguments | options)
        return varied_spec(spec, trial.training, self.train_size)


def check(config: StudyConfig, start: Start | None = None) -> Plan:
    """The plan of a study; refuses whatever can be refused before data are read.

    Args:
        start: the weights of `config.init`, where they are known already.

    Raises:
        ConfigError: for settings that cannot work.
        CheckpointError: for weights that cannot be read.
    """
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)
    config, images = resolve(config), config.task == "images"
    if config.init is not None:
        start = started(config) if start is None else start
        config = with_weights(config, start)
    if images:
        config = filled(config, _stand_ins(config, start))
        check_data(config.data)
        check_augment(config.augment)
    if config.arch not in ARCHITECTURES:
        raise unknown("arch", config.arch, ARCHITECTURES)
    if start is not None:
        encodings = words_for(config.encodings, start)
    else:
        encodings = tuple(ENCODINGS) if config.encodings == ("all",) else config.encodings or ()
        if KEEP in encodings:
            raise ConfigError("keep is the encoding of weights to start from: name them, --init RUN")
    for encoding in encodings if start is None or start.position is not None else ():
        parse_blocks(encoding)
    known("mode", config.modes, MODES)
    known("training", config.training, TRAININGS)
    if not images and (strange := [way for way in config.training if way not in TRAININGS[:2]]):
        raise ConfigError(f"training {strange[0]} is of images, the task is {config.task}: plain or jitter")
    known("temperature", config.temperatures, ["none", *TEMPERATURES])
    for policy in config.policies:
        parse_terms(policy, "policy", ["all", "default", *POLICIES])
    if config.finetune and config.arch != "vit":
        raise ConfigError(f"finetune is a number of epochs of arch vit; got {config.finetune}, {config.arch}")
    if config.depths and config.arch != "vit":
        raise ConfigError(f"depths are those of arch vit; the blocks of a {config.arch} are its stages: --stages 2,2")
    length, depth = config.train_length or 0, config.model.depth or 0
    train_size, sizes = (1, length), tuple((1, length) for length in config.lengths or (length,))
    if images:
        train_size, sizes = config.data.size or (0, 0), config.sizes or ()
    if not encodings or not sizes or train_size[1] < 1:
        raise ConfigError(f"a study needs at least one encoding and one {'size' if images else 'length'}")
    check_numbers(replace(config.optim, warmup_epochs=0))  # short studies may warm up to their end
    precision(config.run.precision, pick_device(config.run.device))
    plan = Plan(config, encodings, tuple(dict.fromkeys(config.depths or (depth,))), train_size, sizes, start)
    if start is not None and config.encodings is None:
        able = tuple(word for word in encodings if _able(replace(plan, encodings=(word,)), word == kept(start)))
        plan = replace(plan, config=replace(config, encodings=able), encodings=able)
    else:
        plan = replace(plan, left_out=_left_out(plan))
        _build(plan)
    return plan


def _stand_ins(config: StudyConfig, start: Start | None) -> dict[str, Plain]:
    """What only the images decide, for the checks before they are read."""
    if start is not None:
        size = show_size(config.data.size or start.size)
        return {"data.size": size, "sizes": size, "augment.shift": 0}
    patch = config.model.patch or of_size(config.data.size, photos=True)["model.patch"] or 4
    side = int(str(patch)) * 8
    size = show_size(config.data.size or (side, side))
    return {"data.size": size, "sizes": size, "model.patch": patch, "augment.shift": 0}


def _build(plan: Plan) -> None:
    """Every encoding's model, without memory for its weights; its patches have to fit every size."""
    for trial in dict.fromkeys(trial._replace(seed=0) for trial in plan.trials):
        try:
            model = on_meta(spec := plan.model_spec(trial, classes=2))
            vary(model, trial.training)
            augmented(plan.config.augment, trial.training, plan.train_size, spec)
        except ConfigError as error:
            raise error if trial.training == "plain" else ConfigError(f"{plan.model_name(trial)}: {error}") from error
        if isinstance(model, ViT | Swin):
            for size in (plan.train_size, *plan.sizes):
                model.patch_embed.grid(*size)
        elif plan.start is not None and plan.config.finetune:
            raise ConfigError(f"finetune is of a ViT or a Swin of ours; {plan.config.init} is a {type(model).__name__}")


def _left_out(plan: Plan) -> dict[tuple[str, str], str]:
    """The encodings that cannot be trained in a way in which another one of the plan can, with the reason."""
    found: dict[tuple[str, str], str] = {}
    for way in plan.config.training:
        refused: dict[tuple[str, str], str] = {}
        for encoding in plan.encodings if way != "plain" else ():
            try:
                of_way = replace(plan.config, training=(way,), scratch=False)
                _build(replace(plan, config=of_way, encodings=(encoding,), depths=plan.depths[:1]))
            except ConfigError as error:
                refused[encoding, way] = str(error)
        if len(refused) < len(plan.encodings):
            found |= refused
    return found


def _able(plan: Plan, required: bool) -> bool:
    """Whether the model of weights can have the encoding of a plan, which nobody asked for by name."""
    try:
        _build(plan)
    except ConfigError:
        if required:
            raise
        return False
    return True


def known(kind: str, words: Words, choices: Collection[str]) -> Words:
    """The words, each of them one of the choices."""
    for word in words:
        if word not in choices:
            raise unknown(kind, word, choices)
    return words
