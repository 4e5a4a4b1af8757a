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
from collections.abc import Callable, Mapping
from pathlib import Path

from timm.data import resolve_model_data_config
from torch import nn

from ..encodings.own import check_known
from ..errors import CheckpointError, ConfigError
from ..interop.shards import index_of
from ..interop.timm.convert import from_timm
from ..interop.timm.named import has_weights, named_model, split_name
from ..models.mae_names import encoder_of
from ..models.spec import Arguments, ModelSpec, timm_spec
from ..models.timm_api import TimmModel, pair
from ..models.unwrap import unwrapped
from ..resolution.sweep import train_size_of
from .checkpoint import Chosen, read_meta
from .initial_weights import read_weights, take
from .settings import MASKED
from .starting_model import Start, State, on_meta, position_of

ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".json")


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

    position, patch, policy, chosen = None, None, None, about.get("policy")
    if isinstance(model, TimmModel):
        if isinstance(chosen, dict):
            policy = Chosen(policy=chosen["policy"], temperature=chosen["temperature"])
        position, patch = position_of(spec), pair(model.patch_embed.patch_size)
        if position is None:
            position = str(inspect.signature(type(model)).parameters["position"].default)
            spec = ModelSpec(spec.kind, spec.arguments | dict(position=position))
    classes = about.get("classes")
    return Start(
        source=text,
        spec=spec,
        position=position,
        size=train_size_of(model, about),
        patch=patch,
        channels=int(getattr(model, "in_chans", None) or 3),
        mean=numbers("mean"),
        std=numbers("std"),
        classes=tuple(map(str, classes)) if isinstance(classes, list | tuple) and classes else None,
        what=what,
        reason=reason,
        policy=policy,
        read=read,
    )
