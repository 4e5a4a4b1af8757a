"""A checkpoint for a timm name: `from_timm(name, weights=...)`, in timm's names or in those of an original file.

Names and layouts are brought to timm's by timm's own filter for that name (`checkpoint_filter_fn` and what it calls
for CLIP, DINOv2, SigLIP, AIMv2, BEiT-3, I-JEPA, RADIO, Perception Encoder, ...), Google's .npz by timm's reader. What
is here beside that: wrappers around names, an MAE's encoder, rope-vit's frequencies, other channels and other classes
than the file's, and errors that name what does not fit.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...models.mae_names import State, encoder_of
from ...models.timm_api import pretrained_cfg_of
from ...models.unwrap import unwrapped
from ...models.weights import adapt_channels
from .names import create

log = logging.getLogger(__name__)


Weights = str | os.PathLike[str] | Mapping[str, Tensor]


def create_with(name: str, weights: Weights, sizes: Mapping[str, tuple[int, int]], **kwargs: Any) -> nn.Module:
    """A timm model by its name, with the weights of a checkpoint.

    Its tables and its kernel are resized once where the file's have another size than the name: to the sizes that are
    asked for.

    Args:
        sizes: img_size and patch_size of the model that is wanted, where they were named.
        kwargs: of `timm.create_model`.

    Raises:
        ConfigError: for an unknown name.
        CheckpointError: for weights that do not fit.
    """
    theirs, named = create(name, **kwargs), "num_classes" in kwargs
    try:
        if read_weights(theirs, weights, named) or not sizes:
            return theirs
    except CheckpointError:
        if not sizes:
            raise
    theirs = create(name, **kwargs, **sizes)
    read_weights(theirs, weights, named)
    return theirs


def read_weights(theirs: nn.Module, weights: Weights, classes_named: bool = False) -> bool:
    """Load a checkpoint into a timm model that was made by its name.

    An image of other channels than the file's has the kernel adapted as timm does (`adapt_channels`), and that is
    logged. A head for other classes is left out, and logged, where the caller named the classes.

    Args:
        theirs: a timm model.
        weights: a path or a state_dict.
        classes_named: whether the number of classes was asked for, so that a head may be left as it was drawn.

    Returns:
        Whether its tables and its kernel are the file's, not resized.

    Raises:
        CheckpointError: for weights that are missing, too many or of other shapes, by name.
    """
    wanted = theirs.state_dict()
    if not isinstance(weights, Mapping) and Path(weights).suffix == ".npz":
        state = _from_npz(theirs, Path(weights))
        kept = _has_sizes_of(theirs, Path(weights))
    else:
        stored = weights if isinstance(weights, Mapping) else _file(Path(weights))
        state = _named_as_timm(theirs, stored)
        kept = _are_of(stored, [value for name, value in state.items() if _SIZED.search(name)])
    _adapt_channels(state, wanted)
    drawn = _leave_heads(theirs, state, wanted, classes_named)
    _leave_pooling(theirs, state)
    missing, extra = sorted(wanted.keys() - state.keys() - drawn), sorted(state.keys() - wanted.keys())
    if missing or extra:
        hint = (
            "; weights without a head go into a model built with num_classes=0, and reset_classifier gives it one"
            if "head.weight" in missing or "head.fc.weight" in missing
            else ""
        )
        raise CheckpointError(
            f"the weights do not fit: missing {', '.join(missing[:5]) or 'nothing'}, "
            f"unexpected {', '.join(extra[:5]) or 'nothing'}{hint}"
        )
    shapes = [
        f"{name} {tuple(value.shape)} for {tuple(wanted[name].shape)}"
        for name, value in state.items()
        if value.shape != wanted[name].shape
    ]
    if shapes:
        raise CheckpointError(f"the weights do not fit: of other shapes, {', '.join(shapes[:5])}")
    theirs.load_state_dict(state, strict=not drawn)
    return kept


_SIZED = re.compile(r"pos_embed$|patch_embed\.proj\.weight$|relative_position_bias_table$")


def _are_of(stored: Mapping[str, Tensor], tensors: list[Tensor]) -> bool:
    """Whether they are tensors of a file, or parts of them: what was resized has a memory of its own."""
    memories: set[int] = set()

    def visit(tree: object) -> None:
        if isinstance(tree, Tensor):
            memories.add(tree.untyped_storage().data_ptr())
        elif isinstance(tree, Mapping):
            for value in tree.values():
                visit(value)

    visit(stored)
    return all(tensor.untyped_storage().data_ptr() in memories for tensor in tensors)


def _has_sizes_of(theirs: nn.Module, path: Path) -> bool:
    """Whether the table and the kernel of a .npz have as many places as the model's."""
    with np.load(path) as file:
        tables = [file[name].shape[-2] for name in file.files if name.endswith("pos_embedding")]
        kernels = [file[name].shape[:2] for name in file.files if name.endswith("embedding/kernel")]
    state = theirs.state_dict()
    rows, kernel = state["pos_embed"].shape[-2], tuple(state["patch_embed.proj.weight"].shape[-2:])
    return all(found == rows for found in tables) and all(found == kernel for found in kernels)


def _file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        state: Mapping[str, Tensor] = timm.models.load_state_dict(str(path))
    except Exception as error:  # torch and safetensors report damage and forbidden pickles in many ways
        first = str(error).strip().splitlines()
        why = first[0] if first else repr(error)
        raise CheckpointError(f"{path} cannot be read as tensors alone, and nothing else in it is run: {why}") from None
    return state


def _named_as_timm(theirs: nn.Module, stored: Mapping[str, Tensor]) -> State:
    """Under timm's names and in its layouts."""
    state, wanted = encoder_of(unwrapped(stored)), theirs.state_dict()
    if "freqs" in state and "rope.freqs" in wanted:  # rope-vit's (2, depth, H Dh/2)
        state["rope.freqs"] = state.pop("freqs").reshape(wanted["rope.freqs"].shape)
        state = {name: value for name, value in state.items() if not name.startswith("freqs_t_")}
    renamed = filter_of(theirs)
    state = state if renamed is None else dict(renamed(state, theirs))
    if "mask_token" not in wanted:  # of BEiT's own files, and others of pretrainings
        state.pop("mask_token", None)
    return state


def filter_of(theirs: nn.Module) -> Callable[[State, nn.Module], State] | None:
    """timm's filter of checkpoints for this model, with the options that timm gives it for the name."""
    name = pretrained_cfg_of(theirs).get("architecture", "")
    module = timm.models.model_entrypoint(name).__module__ if timm.is_model(name) else type(theirs).__module__
    found: Callable[..., State] | None = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if found is None:
        return None
    options: dict[str, bool | str] = {}
    if module == "timm.models.deit":
        options = dict(adapt_layer_scale=True)
    elif module == "timm.models.vision_transformer" and ("flexi" in name or "radio" in name):
        options = dict(interpolation="bilinear", antialias=False)
        if "radio" in name:  # each as in the code that its weights were published with
            options["align_corners"] = any(part in name for part in ("base_patch16_radio_v3", "huge_patch16_radio_v3"))
    return partial(found, **options)


def _from_npz(theirs: nn.Module, path: Path) -> State:
    """Google's files of ViT, AugReg and big_vision, by timm's reader; the tensors that it set.

    It leaves out silently what the file does not have, so the parameters are no numbers before it.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    reader: Callable[[str], None] | None = getattr(theirs, "load_pretrained", None)
    if reader is None:
        raise CheckpointError(f"{path}: timm reads no .npz for {type(theirs).__name__}, its VisionTransformer alone")
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    try:
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.fill_(torch.nan)
        reader(str(path))
        return {n: v.clone() for n, v in theirs.state_dict().items() if not v.is_floating_point() or v.isfinite().all()}
    except (KeyError, ValueError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is no file of Google's ViTs that fits this model: {error}") from None
    finally:
        theirs.load_state_dict(before)


def _adapt_channels(state: State, wanted: State) -> None:
    """The kernel of the patches for other channels, as timm does: repeated and scaled, for one channel summed."""
    name = "patch_embed.proj.weight"
    if name not in state or name not in wanted or state[name].ndim != 4:
        return
    came, channels = state[name].shape[1], wanted[name].shape[1]
    if came != channels:
        state[name] = adapt_channels(state[name], channels)
        log.warning("%s adapted from %d to %d channels", name, came, channels)


def _leave_heads(theirs: nn.Module, state: State, wanted: State, classes_named: bool) -> set[str]:
    """Take heads for other classes out of `state`; the names of those that stay as they were drawn.

    Raises:
        CheckpointError: for a head of other classes where the caller named none.
    """
    heads = [f"{owner}.{last}" for owner in ("head", "head_dist", "head.fc") for last in ("weight", "bias")]
    none = theirs.num_classes == 0
    left = [n for n in heads if n in state and (n in wanted or none) and (none or state[n].shape != wanted[n].shape)]
    if left and not none and not classes_named:
        came = state[left[0]].shape[0]
        raise CheckpointError(
            f"the weights have a head for {came} classes, the model one for {theirs.num_classes}: num_classes={came} "
            f"keeps it, num_classes={theirs.num_classes} leaves it out and draws a new one"
        )
    for name in left:
        del state[name]
    if left and none:
        log.warning("left out, as this model has no head: %s", ", ".join(left))
        return set()
    if left:
        log.warning("drawn anew, for %d classes: %s", theirs.num_classes, ", ".join(left))
    return set(left)


def _leave_pooling(theirs: nn.Module, state: State) -> None:
    """Take SigLIP's attention pooling out of `state` for a model that pools otherwise."""
    names = [name for name in state if name.startswith("attn_pool.")]
    if names and getattr(theirs, "attn_pool", None) is None:
        log.warning("left out, as this model pools otherwise: %s", ", ".join(names))
        for name in names:
            del state[name]
