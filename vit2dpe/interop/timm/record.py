"""What a model that came from timm is built from: kept where timm saves it, and the model built again from that.

timm saves a model as a name and arguments that JSON can hold. The name of these is `vit2dpe_from_timm` (`registry.py`),
and the arguments are

    base       timm's name of the model it came from; of one that was built by its class, the class
    position   the encoding
    record     a `Record`: what else it takes to build the model, without timm's
    img_size, patch_size, in_chans, num_classes, global_pool, ...     kept up to date by timm and by our models
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NotRequired, TypeAlias, TypedDict, cast

from timm.models import get_model_args
from torch import nn

from ...encodings import PositionEncoding
from ...errors import CheckpointError
from ...models.deit import DistilledViT
from ...models.spec import Arguments
from ...models.swin.model import Swin
from ...models.swin.stage import Spec
from ...models.timm_api import PretrainedCfg, Step, pair, pretrained_cfg_of
from ...models.vit import ViT
from ...resolution.apply import restore_policy
from ...spec import Plain
from .steps import BiasTable, Embeds, FlatTable, Frequencies, Fuse, Rename, Reorder

NAME = "vit2dpe_from_timm"
Model: TypeAlias = ViT | Swin
KINDS: dict[str, Callable[..., Model]] = {"ViT": ViT, "DistilledViT": DistilledViT, "Swin": Swin}
STEPS: dict[str, Callable[..., Step]] = {
    kind.__name__: kind for kind in (Rename, Fuse, Reorder, FlatTable, Frequencies, BiasTable, Embeds)
}
CLASSIFIERS: dict[str, str | tuple[str, ...]] = {
    "ViT": "head",
    "DistilledViT": ("head", "head_dist"),
    "Swin": "head.fc",
}
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")  # of weights
SIZES = ("img_size", "patch_size", "window_size", "pretrained_window_sizes", "window_policy")


class Record(TypedDict):
    """How a model is built, in values that JSON can hold."""

    kind: str  # of `KINDS`
    position: NotRequired[str]  # as the model has it; left out for an instance
    arguments: Arguments  # of the constructor, without rates of dropout
    # Of `set_policy`, in order, what each measures from, and its temperature where it has one.
    policies: list[tuple[str, list[tuple[int, ...]]] | tuple[str, list[tuple[int, ...]], str]]
    steps: list[tuple[str, Arguments]] | None  # back to timm's names: the kind of each, and its fields
    asked: Arguments  # what the name was called with, as far as the rest of the record has taken it in
    weights: str | None  # the repository that its weights came from, on the hub


def remember(ours: Model, theirs: nn.Module, position: Spec | PositionEncoding, arguments: Arguments) -> None:
    """Make `ours`, of these constructor arguments, a model that timm saves and builds again."""
    cfg = pretrained_cfg_of(theirs)
    record = Record(
        kind=type(ours).__name__,
        arguments={name: value for name, value in arguments.items() if not is_rate(name)},
        policies=[],
        steps=_written(ours),
        asked={},
        weights=None if cfg.get("file") else cfg.get("hf_hub_id"),
    )
    if isinstance(position, str):
        record["position"] = position
    ours.record_arguments(base=cfg.get("architecture") or type(theirs).__name__, position=position, record=record)
    ours.record_size(None)
    ours.pretrained_cfg = ours.default_cfg = config_of(cfg, record["kind"], arguments)


def config_of(cfg: PretrainedCfg, kind: str, arguments: Arguments) -> PretrainedCfg:
    """timm's record of weights for a model of ours: our name and parameters, any size, not where timm's lie."""
    kept = without_source(cfg)
    if not kept:
        size = pair(arguments["img_size"])
        kept = PretrainedCfg(input_size=(arguments["in_chans"], *size), num_classes=arguments["num_classes"])
    own = PretrainedCfg(architecture=NAME, fixed_input_size=False, first_conv="patch_embed.proj")
    return {**kept, **own, "classifier": CLASSIFIERS[kind]}


def without_source(cfg: PretrainedCfg) -> PretrainedCfg:
    """timm's record of weights without where they are."""
    return cast("PretrainedCfg", {name: value for name, value in cfg.items() if name not in SOURCES})


def is_rate(name: str) -> bool:
    """Whether an argument is a rate of dropout; timm leaves them out of what it saves."""
    return name == "drop_rate" or name.endswith("_drop_rate") or name == "drop_path_rate"


def record_of(model: nn.Module) -> Record | None:
    """The record of a model that came from timm, with the sizes it has at present."""
    arguments = get_model_args(model)
    record: Record | None = arguments.get("record")
    if record is None:
        return None
    sizes = {name: arguments[name] for name in SIZES if name in arguments}
    return {**record, "arguments": record["arguments"] | sizes}


def checked(record: Record) -> Record:
    """A record as a folder holds it.

    Raises:
        CheckpointError: for a record of another version.
    """
    if record.get("kind") not in KINDS:
        raise CheckpointError(f"the record of a {record.get('kind')!r}; this version can build {', '.join(KINDS)}")
    if missing := {"arguments", "policies", "steps", "asked"} - record.keys():
        raise CheckpointError(f"the record of this model lacks {', '.join(sorted(missing))}")
    return record


def rebuild(base: str, record: Record, changes: Arguments) -> Model:
    """The model of a record, its weights drawn anew.

    Args:
        base: timm's name, which is kept for the next time.
        changes: arguments given beside the record. Those that are in `record["asked"]` have been taken in.

    Raises:
        ConfigError: for changes that the model cannot have.
    """
    asked = {name: as_json(value) for name, value in record["asked"].items()}
    changes = {name: value for name, value in changes.items() if name not in asked or as_json(value) != asked[name]}
    policy, temperature = changes.pop("policy", None), changes.pop("temperature", None)
    position = changes.pop("position", record.get("position"))
    model = KINDS[record["kind"]](position, **{"drop_path_rate": 0.0} | record["arguments"] | changes)
    model.record_arguments(base=base, position=position, record=record)
    model.record_size(None)
    if position == record.get("position"):
        if isinstance(model, ViT) and record["steps"] is not None:
            model.timm_steps = tuple(_step(kind, fields) for kind, fields in record["steps"])
        for spec, extents, *factor in record["policies"]:
            restore_policy(model, spec, [tuple(extent) for extent in extents], *factor)
    model.take_policy(policy, temperature)
    return model


def as_json(value: Plain) -> Plain:
    """As it is after it was written and read: a tuple becomes a list."""
    read: Plain = json.loads(json.dumps(value, default=repr))
    return read


def _written(ours: Model) -> list[tuple[str, Arguments]] | None:
    steps = ours.timm_steps if isinstance(ours, ViT) else None
    return None if steps is None else [(type(step).__name__, dict(vars(step))) for step in steps]


def _step(kind: str, fields: Arguments) -> Step:
    if kind not in STEPS:
        raise CheckpointError(f"a record of a step {kind!r}; this version has {', '.join(STEPS)}")
    return STEPS[kind](**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Plain) -> Plain:
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value
