"""Initialization: from a distribution, or from the tensors of another run or file that fit; others are named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, unknown
from ..interop.shards import index_of, read_shards
from ..positions import Positions
from .checkpoint import check_finite, read_meta, read_tensors

Move = Callable[[Positions], Positions]
Perturb = Callable[[Positions], Move | None]  # draws a move for one forward pass
_LAST = ("attn.proj", "mlp.fc2")  # of a residual branch
_INDEX = re.compile(r"\.\d+\.")
INITS = ("default", "xavier", "trunc_normal", "gpt2")


class Loaded(NamedTuple):
    """Names of parameters."""

    taken: list[str]
    left: list[str]  # of the model, not in the file or of another shape
    unused: list[str]  # of the file
    adapted: tuple[str, ...] = ()  # of the taken ones, to other channels

    def __str__(self) -> str:
        kept = f"; adapted to other channels: {_some(list(self.adapted))}" if self.adapted else ""
        kept += f"; drawn anew: {_some(self.left)}" if self.left else ""
        return f"{len(self.taken)} tensors taken{kept}" + (f"; not used: {_some(self.unused)}" if self.unused else "")


def load_weights(model: nn.Module, source: str | Path, *, least: float = 0.5) -> Loaded:
    """Copy every tensor of `source` that fits into `model`, in place.

    The kernel of the patches is adapted to images of other channels, as timm does; a head for other classes stays as it
    was drawn. What is returned names both.

    Args:
        source: a run folder (its last/), a folder with model.json, a .safetensors, or a .pth of tensors, by name or
            under "model" or the like; of a file with an average of the weights (`state_dict_ema`, `model_ema`) that.
        least: the share of the model's tensors that must fit; below it is another architecture.

    Raises:
        CheckpointError: if the file is missing, altered, unsafe, not finite, or of another architecture.
    """
    path = Path(source).expanduser()
    return take(model, read_weights(path), path, least=least)


def take(model: nn.Module, state: dict[str, Tensor], path: Path, *, least: float = 0.5) -> Loaded:
    """`load_weights` of tensors that have been read; `path` is where from, for errors."""
    state = _fitted(model, state)
    own = model.state_dict()
    adapted = _adapted(model, state, own)
    # In the model's order: files have their own.
    taken = [name for name, value in own.items() if name in state and state[name].shape == value.shape]
    left = [name for name in own if name not in taken]
    unused = [name for name in left if name in state] + sorted(name for name in state if name not in own)
    if len(taken) < least * len(own):
        shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in unused if n in own]
        raise CheckpointError(
            f"{path} is of another architecture: {len(taken)} of {len(own)} tensors of {type(model).__name__} fit; "
            f"of other shape: {_some(shapes)}; missing: {_some([n for n in left if n not in state])}; "
            f"unexpected: {_some([n for n in unused if n not in own])}"
        )
    check_finite({name: state[name] for name in taken}, path)
    model.load_state_dict({name: state[name] for name in taken}, strict=False)
    return Loaded(taken, left, unused, adapted)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a run folder, a file, or files with an index, by name. No code in a file is executed."""
    for folder in (path / "last", path):
        if (folder / "model.json").is_file():
            return read_tensors(folder, read_meta(folder), "model")
    if (index := index_of(path)) is not None:
        return read_shards(index)
    if not path.is_file():
        raise CheckpointError(f"there is no run and no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load(path.read_bytes())
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # torch reports damage and forbidden pickles in many ways
        first = str(error).strip().splitlines()
        why = first[0] if first else repr(error)
        raise CheckpointError(
            f"{path} cannot be read as tensors alone, and nothing else in it is executed: {why}"
        ) from None
    return _unwrapped(tree, path)


def initialize(model: nn.Module, how: str) -> None:
    """Initialize linear layers, biases zero: xavier (uniform), trunc_normal (0.02), gpt2 (normal 0.02, the last layer
    of each residual branch over sqrt(2 depth), the blocks of all stages and of each stack for itself). Encodings, and
    everything else, keep their own initialization."""
    if how not in INITS:
        raise unknown("init", how, INITS)
    if how == "default":
        return
    from ..encodings import modules_outside_encodings

    linear = {name: module for name, module in modules_outside_encodings(model) if isinstance(module, nn.Linear)}
    depths = Counter(_stack(name) for name in linear if name.endswith(_LAST))
    deepest = max(depths.values(), default=1)
    for name, module in linear.items():
        if how == "xavier":
            nn.init.xavier_uniform_(module.weight)
        elif how == "trunc_normal":
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            depth = depths[_stack(name)] if _INDEX.search(name) else deepest  # a pooling behind the blocks
            nn.init.normal_(module.weight, std=0.02 / ((2 * depth) ** 0.5 if name.endswith(_LAST) else 1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _stack(name: str) -> str:
    """The same for all blocks of a residual stream: of a Swin those of all stages, of an MAE the encoder's alone."""
    return _INDEX.sub(".#.", name)


def jitter_positions(model: nn.Module, amount: float) -> None:
    """Jitter the positions of every encoding of `model` by up to ±amount patches in training; its state_dict stays.

    Raises:
        ConfigError: for a model without encodings of ours, and for an encoding that takes whole coordinates only.
    """
    from ..encodings import Jitter, encodings_of

    parts = encodings_of(model)
    if not parts:
        raise ConfigError(f"model.jitter moves what encodings see, and {type(model).__name__} has none of ours")
    for part in parts:
        part.perturb = _compose(Jitter(part, amount).perturb, part.perturb)  # type: ignore[method-assign, assignment]


def _compose(first: Perturb, second: Perturb) -> Perturb:
    """The moves of `first`, then those of `second`; either may be None."""

    def perturb(at: Positions) -> Move | None:
        move, more = first(at), second(at)
        if move is None or more is None:
            return move or more
        return lambda where: more(move(where))

    return perturb


def _fitted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from ..models import Swin, ViT
    from ..models.mae_names import encoder_of
    from ..models.swin import weights as swin_weights
    from ..models.unwrap import unwrapped
    from ..models.weights import checkpoint_filter_fn

    state = unwrapped(state)
    if not hasattr(model, "mask_token"):  # of a masked pretraining the encoder goes on
        state = encoder_of(state)
    if isinstance(model, ViT):
        state = checkpoint_filter_fn(state, model)
    elif isinstance(model, Swin):
        state = swin_weights.checkpoint_filter_fn(state, model)
    return state


def _adapted(model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[str, ...]:
    """Bring the first convolution of `state`, in place, to the channels of the model's; its name if they differed."""
    from ..models.timm_api import pretrained_cfg_of
    from ..models.weights import adapt_channels

    first = pretrained_cfg_of(model).get("first_conv")
    named = {f"{name}.weight" for name in ([first] if isinstance(first, str) else first or ())}
    changed = []
    for name in own:
        if name not in state or not (name in named or name.endswith("patch_embed.proj.weight")):
            continue
        came, wanted = state[name].shape, own[name].shape
        if len(came) == len(wanted) == 4 and came[1] != wanted[1] and (came[0], *came[2:]) == (wanted[0], *wanted[2:]):
            state[name] = adapt_channels(state[name], wanted[1])
            changed.append(name)
    return tuple(changed)


def _unwrapped(tree: Any, path: Path) -> dict[str, Tensor]:
    from ..models.unwrap import innermost

    tree = innermost(tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise CheckpointError(f"{path} holds no tensors by name")
    return tree


def _some(names: list[str], n: int = 5) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return (", ".join(names[:n]) or "none") + more
