"""A model to start from, once it is described (`start.py`): built at another size or with another encoding, and its
weights put into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..interop.own_encoding import carried, names_of, with_own_options
from ..models.spec import Arguments, ModelSpec, takes_size
from ..spec import Plain, Size, join_blocks, show_size
from .checkpoint import Chosen
from .initial_weights import Loaded, take

# Settings of a model of images, and the arguments of its constructor.
ARGUMENTS = dict(patch="patch_size", width="embed_dim", depth="depth", heads="num_heads", mlp_ratio="mlp_ratio") | dict(
    pool="global_pool", class_token="class_token"
)
OF_POLICY = ("policy", "temperature")  # arguments of a constructor that are an encoding's
State = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """A model to start from; nothing of its weights is in memory.

    Args:
        source: what it was described by.
        spec: how to build it with its own encoding, at its own size, without its weights and without a network.
        position: its encoding; None where that is welded in, see `reason`.
        size: (H, W) in pixels that it was trained at.
        patch: (rows, columns) in pixels; None where it has no patches.
        channels: of its images.
        mean, std: that its images were normalized with; None where that is not known.
        classes: names by index, of a run.
        what: what kind of source it is.
        reason: why its encoding cannot be exchanged.
        policy: what it does at other sizes, where that was written beside its arguments (`tune`); it goes with the
            encoding, and its model is built with it.
        read: its tensors, by the names of `spec`'s model.
    """

    source: str
    spec: ModelSpec
    position: str | None
    size: Size
    patch: Size | None
    channels: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: tuple[str, ...] | None
    what: str
    reason: ConfigError | None = None
    policy: Chosen | None = None
    read: Callable[[], State] = field(default=dict, repr=False, compare=False)

    def __str__(self) -> str:
        encoding = "its own encoding" if self.position is None else self.position
        patch = "" if self.patch is None else f", patch {show_size(self.patch)}"
        elsewhere = "" if self.policy is None else f", at other sizes {self.policy['policy']}"
        return f"{self.source}: {self.what}, {encoding}, trained at {show_size(self.size)}{patch}{elsewhere}"

    @property
    def settings(self) -> dict[str, Plain]:
        """Its architecture by the names of `ModelConfig`, as far as these can express it."""
        arguments, name = _arguments(self.spec), self.spec.arguments.get("model_name")
        found: dict[str, Plain] = {
            setting: arguments[argument]
            for setting, argument in ARGUMENTS.items()
            if isinstance(arguments.get(argument), int | float | str)
        }
        if self.patch is not None and self.patch[0] == self.patch[1]:
            found["patch"] = self.patch[0]
        if name is not None and "record" not in self.spec.arguments:
            found["name"] = str(name)
        return found if self.position is None else found | {"position": self.position}

    def changed(
        self,
        position: str | None = None,
        *,
        size: Size | None = None,
        num_classes: int | None = None,
        channels: int | None = None,
        **arguments: Plain,
    ) -> ModelSpec:
        """The spec of the model with another encoding, size, number of classes or channels; None: as it is.

        Args:
            position: a word; options that it does not name are the model's own, where that has the encoding too. Of
                other terms than the model's, its policy at other sizes goes too.
            arguments: further arguments of the constructor.

        Raises:
            ConfigError: for a model whose encoding cannot be exchanged.
        """
        changes, own = Arguments(arguments), self.spec.arguments
        if self.policy is not None:
            own = _without_policy(own) | {name: word for name, word in self.policy.items() if word is not None}
        if position is not None and position != self.position:
            changes |= self._with_position(position)
            if names_of(position) != names_of(str(self.position)):
                own = _without_policy(own)
        if size is not None and size != self.size and self._takes_size():
            changes["img_size"] = list(size)
        given = dict(num_classes=num_classes, in_chans=channels)
        changes |= {name: value for name, value in given.items() if value is not None}
        return ModelSpec(self.spec.kind, own | changes)

    def load(
        self,
        position: str | None = None,
        *,
        size: Size | None = None,
        num_classes: int | None = None,
        channels: int | None = None,
        **arguments: Plain,
    ) -> tuple[nn.Module, Loaded]:
        """The model with its weights, in evaluation mode, and what of them was taken; arguments as for `changed`.

        Raises:
            ConfigError, CheckpointError: for what cannot be built, read or loaded.
        """
        spec = self.changed(position, size=size, num_classes=num_classes, channels=channels, **arguments)
        model = spec.build().eval()
        loaded = self.load_into(model, spec)
        if isinstance(cfg := getattr(model, "pretrained_cfg", None), dict) and self.mean and self.std:
            cfg |= dict(mean=self.mean, std=self.std)
        return model, loaded

    def load_into(self, model: nn.Module, spec: ModelSpec, classes: Iterable[str] | None = None) -> Loaded:
        """Copy its weights into a model of `spec`, in place; parameters of encodings only into the same encodings.

        Args:
            model: built from `spec`.
            spec: as `changed` gives it, or of another architecture, of which what fits is taken.
            classes: those of the data; the head is drawn anew where they are others than the run's.

        Raises:
            CheckpointError: if what is left is another architecture, see `load_weights`.
        """
        state, dropped = self.read(), list[str]()
        own, word = on_meta(self.spec), position_of(spec)
        if self.position is not None and word not in (None, self.position):
            state, dropped = carried(own, on_meta(self.changed(word)), state)
        if classes is not None and self.classes is not None and set(classes) != set(self.classes):
            state = {name: value for name, value in state.items() if name not in _head(own)}
        loaded = take(model, state, Path(self.source))
        return loaded._replace(unused=[*loaded.unused, *dropped])

    def _with_position(self, position: str) -> Arguments:
        if self.position is None:
            raise self.reason or ConfigError(f"the encoding of {self.source} cannot be exchanged")
        word = with_own_options(position, self.position)
        if word == self.position:
            return {}
        changes: Arguments = {"position": word}
        if "record" in self.spec.arguments and names_of(word) == names_of(self.position):
            # The same encoding with other options keeps its policies; the way back to timm's names is no longer sure.
            changes["record"] = self.spec.arguments["record"] | dict(position=word, steps=None)
        return changes

    def _takes_size(self) -> bool:
        return self.spec.kind != "timm" or takes_size(self.spec.arguments["model_name"])


def on_meta(spec: ModelSpec) -> nn.Module:
    """The model without data: its names, shapes and sizes."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # timm draws parameters that have no data
        return spec.build()


def _without_policy(arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if name not in OF_POLICY}


def _arguments(spec: ModelSpec) -> Arguments:
    """Of the constructor, those of a record included."""
    record = spec.arguments.get("record")
    return (record["arguments"] if record else {}) | spec.arguments


def position_of(spec: ModelSpec) -> str | None:
    """The encoding's word, where it is given."""
    word = spec.arguments.get("position", (spec.arguments.get("record") or {}).get("position"))
    return spelled if isinstance(spelled := join_blocks(word), str) else None


def _head(model: nn.Module) -> set[str]:
    """The parameters of the classifier."""
    if not callable(classifier := getattr(model, "get_classifier", None)):
        return set()
    found = classifier()
    own = {id(one) for part in (found if isinstance(found, tuple) else (found,)) for one in part.parameters()}
    return {name for name, one in model.named_parameters() if id(one) in own}
