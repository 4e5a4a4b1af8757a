"""A model to start from, by `NAME`, `FILE` or `RUN`: described without its weights, then built with them.

    NAME   a name of timm, theirs or ours, arguments in parentheses; hf-hub:<user>/<name>, local-dir:<folder>
    RUN    a folder of `train` or `pretrain` (its last/), or one that holds model.json; of a masked model the encoder
    FILE   .safetensors, .pth, ..., or a folder of several with an index: the architecture is that of model.json or
           config.json beside it

What timm has under a covered name becomes one of our models (`from_timm`), so that its encoding can be exchanged.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..encodings import named_encodings
from ..encodings.own import check_known
from ..errors import CheckpointError, ConfigError
from ..interop.own_encoding import names_of, own_weights, with_own_options
from ..interop.shards import index_of
from ..interop.timm.convert import from_timm
from ..interop.timm.named import has_weights, named_model, split_name
from ..models.mae_names import encoder_of
from ..models.spec import Arguments, ModelSpec, takes_size, timm_spec
from ..models.timm_api import TimmModel, pair
from ..models.unwrap import unwrapped
from ..resolution.sweep import train_size_of
from ..spec import Plain, Size, show_size
from .checkpoint import read_meta
from .initial_weights import Loaded, read_weights, take
from .settings import MASKED

ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".json")
# Settings of a model of images, and the arguments of its constructor.
ARGUMENTS = dict(patch="patch_size", width="embed_dim", depth="depth", heads="num_heads", mlp_ratio="mlp_ratio") | dict(
    pool="global_pool", class_token="class_token"
)
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
    read: Callable[[], State] = field(default=dict, repr=False, compare=False)

    def __str__(self) -> str:
        encoding = "its own encoding" if self.position is None else self.position
        patch = "" if self.patch is None else f", patch {show_size(self.patch)}"
        return f"{self.source}: {self.what}, {encoding}, trained at {show_size(self.size)}{patch}"

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
            position: a word; options that it does not name are the model's own, where that has the encoding too.
            arguments: further arguments of the constructor.

        Raises:
            ConfigError: for a model whose encoding cannot be exchanged.
        """
        changes: Arguments = dict(arguments)
        if position is not None and position != self.position:
            changes |= self._with_position(position)
        if size is not None and size != self.size and self._takes_size():
            changes["img_size"] = list(size)
        given = dict(num_classes=num_classes, in_chans=channels)
        changes |= {name: value for name, value in given.items() if value is not None}
        return ModelSpec(self.spec.kind, self.spec.arguments | changes)

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
        own = on_meta(self.spec)
        if self.position is not None:
            owned = tuple(f"{owner}." for owner in named_encodings(own))
            encoding = {name for name in state if name.startswith(owned)} if owned else set()
            word = _position(spec)
            if word not in (None, self.position) and encoding:
                kept = own_weights(own, on_meta(self.changed(word)), state)
                taken = {id(value) for value in kept.values()}
                dropped = sorted(name for name in encoding if id(state[name]) not in taken)
                state = {name: value for name, value in state.items() if name not in encoding} | kept
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


def describe(source: str | Path, *, architecture: ModelSpec | None = None) -> Start:
    """What NAME, FILE or RUN holds, without its weights.

    Args:
        source: see the head of this file.
        architecture: of a FILE that has none beside it.

    Raises:
        ConfigError, CheckpointError: for what is not there, cannot be read or is no model of images; for a FILE whose
            architecture is not known.
    """
    text, path = str(source), Path(source).expanduser()
    folder = _beside(path)
    file = path if path.is_file() else None
    if path.exists():
        if (folder / "model.json").is_file():
            return _of_run(text, folder, file)
        if (folder / "config.json").is_file():
            return _of_hub_folder(text, folder, file)
        if file is None and index_of(path) is None:
            raise ConfigError(
                f"{text} is no run (there is no last/model.json), no folder of a hub (no config.json), and has no "
                "index of weights: give a run, a file or a name of timm"
            )
        if architecture is None:
            raise ConfigError(
                f"the architecture of {text} is not known: there is no model.json and no config.json beside it; name "
                "it, --model.name, or give --model.width, --model.depth, --model.heads and --model.patch"
            )
        spec = architecture
        return _start(text, spec, on_meta(spec), "a file of weights", lambda: unwrapped(read_weights(path)), {})
    if path.suffix in ENDINGS or path.is_absolute() or text.startswith((".", "~")):
        raise ConfigError(f"there is nothing at {text} to start from")
    return _of_name(text, *split_name(text))


def has_architecture(path: Path) -> bool:
    """Whether a file or folder has a model.json or config.json with it."""
    return any((_beside(path) / name).is_file() for name in ("model.json", "config.json"))


def _beside(path: Path) -> Path:
    """The folder of a checkpoint: last/ of a run, itself, or that of a file."""
    return path / "last" if (path / "last" / "model.json").is_file() else path if path.is_dir() else path.parent


def on_meta(spec: ModelSpec) -> nn.Module:
    """The model without data: its names, shapes and sizes."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # timm draws parameters that have no data
        return spec.build()


def _of_run(text: str, folder: Path, file: Path | None) -> Start:
    """The model of a checkpoint; of a timm model that a run was trained with, ours of the same function."""
    meta = read_meta(folder)
    check_known(meta.get("encodings", {}), str(folder))
    kind, arguments = meta["model"], dict(meta["arguments"])
    masked = kind in MASKED
    if masked:  # its classifier has the norm behind the pooling that goes with it
        arguments = {name: value for name, value in arguments["encoder"].items() if name != "fc_norm"}
        kind = "timm" if "model_name" in arguments else "ViT"
    model, grid = on_meta(spec := ModelSpec(kind, arguments)), meta.get("train_grid")
    if not hasattr(model, "forward_features") or hasattr(model, "vocab_size"):
        raise ConfigError(f"{text} holds a {kind}, which is no model of images")
    if grid is not None and isinstance(model, TimmModel) and tuple(grid) != tuple(model.train_grid):
        size = [side * patch for side, patch in zip(grid, model.patch_embed.patch_size, strict=True)]
        model = on_meta(spec := ModelSpec(kind, arguments | dict(img_size=size)))
    what = f"the encoder of a {meta['model']}" if masked else "the model of a run"

    def read() -> State:
        state = read_weights(folder if file is None else file)
        return state if file is None and not masked else encoder_of(unwrapped(state))

    if isinstance(model, TimmModel):
        return _start(text, spec, model, what, read, meta)
    try:
        ours = from_timm(model)
    except ConfigError as error:
        return _start(text, spec, model, what, read, meta, error)

    def converted() -> State:
        theirs = spec.build()
        take(theirs, read(), file or folder, least=1.0)
        return from_timm(theirs).state_dict()

    return _start(text, timm_spec(ours), ours, what, converted, meta)


def _of_hub_folder(text: str, folder: Path, file: Path | None) -> Start:
    """A folder with config.json: timm's, or a ViT of `transformers`, whose normalization stands beside it."""
    from ..interop.transformers.convert import convert, read_folder

    try:
        config = json.loads((folder / "config.json").read_bytes())
        prepared = folder / "preprocessor_config.json"
        images = json.loads(prepared.read_bytes()) if prepared.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"a config.json in {folder} cannot be read: {error}") from None
    if "architecture" in config:
        arguments: Arguments = {} if file is None else {"pretrained_cfg_overlay": dict(file=str(file), source="")}
        return _of_name(text, f"local-dir:{folder}", arguments)
    converted = convert(*(read_folder(folder) if file is None else (config, read_weights(file))))
    spec = ModelSpec(converted.model.__name__, converted.arguments)
    model = on_meta(spec)
    if not isinstance(model, TimmModel):
        raise ConfigError(f"{text} holds a {spec.kind}, which is no model of images")
    about = dict(mean=images.get("image_mean"), std=images.get("image_std"))
    return _start(text, spec, model, "weights of transformers", lambda: converted.state, about)


def _of_name(text: str, name: str, arguments: Arguments) -> Start:
    if "/" in name and ":" not in name:
        raise ConfigError(f"there is nothing at {text} to start from; a model of the hub is written hf-hub:{name}")
    model, reason = named_model(name, arguments, pretrained=False)
    if not has_weights(name, arguments):
        raise ConfigError(
            f"timm has no weights for {name}: timm.list_pretrained() in Python lists names that have them"
        )
    data = resolve_model_data_config(model)
    return _start(
        text,
        timm_spec(model),
        model,
        "weights of timm" if isinstance(model, TimmModel) else "weights and model of timm",
        lambda: named_model(name, arguments, pretrained=True)[0].state_dict(),
        dict(mean=data["mean"], std=data["std"]),
        reason,
    )


def _start(
    text: str,
    spec: ModelSpec,
    model: nn.Module,
    what: str,
    read: Callable[[], State],
    about: Mapping[str, object],
    reason: ConfigError | None = None,
) -> Start:
    def numbers(name: str) -> tuple[float, ...] | None:
        values = about.get(name)
        return tuple(map(float, values)) if isinstance(values, list | tuple) else None

    position, patch = None, None
    if isinstance(model, TimmModel):
        position, patch = _position(spec), pair(model.patch_embed.patch_size)
        if position is None:
            position = str(inspect.signature(type(model)).parameters["position"].default)
            spec = ModelSpec(spec.kind, spec.arguments | dict(position=position))
    classes = about.get("classes")
    return Start(
        source=text,
        spec=spec,
        position=position,
        size=train_size_of(model),
        patch=patch,
        channels=int(getattr(model, "in_chans", None) or 3),
        mean=numbers("mean"),
        std=numbers("std"),
        classes=tuple(map(str, classes)) if isinstance(classes, list | tuple) and classes else None,
        what=what,
        reason=reason,
        read=read,
    )


def _arguments(spec: ModelSpec) -> Arguments:
    """Of the constructor, those of a record included."""
    record = spec.arguments.get("record")
    return (record["arguments"] if record else {}) | spec.arguments


def _position(spec: ModelSpec) -> str | None:
    """The encoding's word, where it is given."""
    word = spec.arguments.get("position", (spec.arguments.get("record") or {}).get("position"))
    return word if isinstance(word, str) else None


def _head(model: nn.Module) -> set[str]:
    """The parameters of the classifier."""
    if not callable(classifier := getattr(model, "get_classifier", None)):
        return set()
    found = classifier()
    own = {id(one) for part in (found if isinstance(found, tuple) else (found,)) for one in part.parameters()}
    return {name for name, one in model.named_parameters() if id(one) in own}
