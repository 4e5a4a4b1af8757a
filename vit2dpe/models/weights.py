"""Names, layouts and sizes of checkpoints, translated on the way in.

timm's ViT keeps one flat table `pos_embed` (1, prefix + h w, D); ours is `position.pos_embed` (1, h, w, D), and the
rows of prefix tokens, which have no place, are folded into the tokens themselves: x + row is the same either way. Our
tables have their grid in their shape, so one learned on another grid is resized, always from what was stored. A flat
table does not; it is taken for the model's own grid, or the one in the model's `pretrained_cfg`, and for nothing else.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable

from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..encodings import LearnedTable, MixedRoPE, PositionEncoding, Sum, named_encodings
from ..errors import CheckpointError
from ..positions import Positions
from .mae_names import State, encoder_of
from .timm_api import TimmViT, pretrained_cfg_of
from .unwrap import Rest, rewrite, unwrapped

log = logging.getLogger(__name__)


def checkpoint_filter_fn(state_dict: State, model: TimmViT) -> State:
    """Unwraps a checkpoint and brings names, layouts and sizes to the model's; timm calls it before a strict load."""
    state = unwrapped(state_dict)
    convert_state_dict(model, state, "")
    return state


def convert_state_dict(module: TimmViT, state_dict: State, prefix: str, *_: Rest) -> None:
    """Load pre-hook of ViT, in place: other people's files, timm's `pos_embed` and `rope.freqs`, tables of other grids.

    Of the file of a masked autoencoder the encoder is taken.
    """
    if not prefix:
        rewrite(state_dict, _from_dinov2(encoder_of(unwrapped(state_dict))))
    _split_frequencies(module, state_dict, prefix)
    _fold_flat_table(module, state_dict, prefix)
    _drop_formula(module, state_dict, prefix)
    resize_tables(module, module.train_extent, state_dict, prefix)


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """A kernel (D, C, p, p) for images of other channels, as timm does: summed for one, else repeated and scaled."""
    adapted: Tensor = adapt_input_conv(channels, kernel, base_chans=kernel.shape[1])
    return adapted


def _from_dinov2(state: State) -> State:
    """DINOv2's own names: a mask token that only its training uses, registers, and maps of a gated MLP."""
    if "mask_token" not in state:
        return state
    names = {"register_tokens": "reg_token", "mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}
    renamed: State = {}
    for name, value in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    del renamed["mask_token"]
    return renamed


def _split_frequencies(module: TimmViT, state_dict: State, prefix: str) -> None:
    """`rope.freqs` (2, depth, H, Dh/2) of timm, or `freqs` (2, depth, H Dh/2) of rope-vit, to the blocks' `rope_mixed`.

    Both have columns first. rope-vit's fixed coordinates `freqs_t_x`, `freqs_t_y` add nothing.
    """
    owners = [
        f"{prefix}{name}.freqs"
        for name, part in module.blocks.named_modules(prefix="blocks")
        if isinstance(part, MixedRoPE)
    ]
    for name in ("rope.freqs", "freqs"):
        freqs = state_dict.get(prefix + name)
        if freqs is None or not owners:
            continue
        if freqs.shape[:2] != (2, len(owners)):
            raise CheckpointError(
                f"{name} is {tuple(freqs.shape)}; this model has {len(owners)} blocks with rope_mixed, and needs "
                f"(2, {len(owners)}, heads, head_dim / 2)"
            )
        del state_dict[prefix + name]
        like = module.get_parameter(owners[0].removeprefix(prefix))
        for owner, one in zip(owners, freqs.flatten(2).unbind(1), strict=True):
            if one.numel() != like.numel():
                raise CheckpointError(f"{name} is {tuple(freqs.shape)}, a block of this model has {tuple(like.shape)}")
            state_dict[owner] = one.flip(0).view(like.shape)
        for name in ("freqs_t_x", "freqs_t_y"):
            state_dict.pop(prefix + name, None)


def _fold_flat_table(module: TimmViT, state_dict: State, prefix: str) -> None:
    flat = state_dict.get(prefix + "pos_embed")
    tables = [name for name, part in module.position.named_modules() if isinstance(part, LearnedTable)]
    if flat is None or flat.ndim != 3 or not tables:
        return
    allowed = {0, int(module.cls_token is not None), module.num_prefix_tokens}
    grids = [module.train_grid, *_configured_grid(module)]
    fitting = [grid for grid in grids if flat.shape[1] - math.prod(grid) in allowed]
    if not fitting:
        sizes = " or ".join(f"{'x'.join(map(str, grid))} = {math.prod(grid)}" for grid in dict.fromkeys(grids))
        raise CheckpointError(
            f"pos_embed has {flat.shape[1]} rows, the model needs {sizes} and at most {module.num_prefix_tokens} for "
            "its prefix; a flat table does not say which grid it was learned on, so build the model at the size of the "
            "checkpoint (img_size=...), and call set_input_size after loading"
        )
    rows = flat.shape[1] - math.prod(fitting[0])
    del state_dict[prefix + "pos_embed"]
    owner = ".".join(part for part in ("position", tables[0], "pos_embed") if part)
    state_dict[prefix + owner] = flat[:, rows:].unflatten(1, fitting[0])
    # timm adds the rows to its leading tokens in their order; a table of fewer rows has them for the first.
    start = 0
    for name, token in module.prefix_tokens().items():
        if start < rows:
            key = prefix + name
            if key not in state_dict:
                raise CheckpointError(f"pos_embed has a row for {name}, the checkpoint no {key} to fold it into")
            state_dict[key] = state_dict[key] + flat[:, start : start + token.shape[1]]
        start += token.shape[1]


def _drop_formula(module: TimmViT, state_dict: State, prefix: str) -> None:
    """A stored table that the model's formula gives anyway, such as MAE's frozen sin-cos, is compared and left out."""
    flat = state_dict.get(prefix + "pos_embed")
    if flat is not None and flat.ndim == 3 and is_formula(module.position):
        check_formula(module.position, module.train_grid, flat, "pos_embed")
        del state_dict[prefix + "pos_embed"]


def is_formula(position: PositionEncoding) -> bool:
    """Whether it adds vectors to tokens and has nothing to learn."""
    return "token" in position.gives and not any(True for _ in position.parameters())


def check_formula(position: PositionEncoding, grid: tuple[int, ...], flat: Tensor, name: str) -> None:
    """Refuse a flat table (1, prefix + N, D) that differs from the formula's on this grid, zeros for the prefix."""
    rows = max(0, flat.shape[1] - math.prod(grid))
    token = position(Positions.grid(grid).with_prefix(rows)).token
    if token is None or token.shape != flat.shape:
        came = None if token is None else tuple(token.shape)
        raise CheckpointError(
            f"{name} is {tuple(flat.shape)}, this model's formula gives {came} on its grid {grid}: build the model at "
            "the size of the checkpoint (img_size=...), other sizes run anyway"
        )
    off = float((token - flat.to(token)).abs().max())
    if not off <= (1e-4 if flat.dtype.itemsize >= 4 else 1e-2):
        raise CheckpointError(
            f"{name} is not the table of this model's formula, it is off by {off:.2g}: sincos has layouts (mae, timm, "
            "...), and position='learned' keeps a table as it was stored"
        )


def resize_tables(
    model: nn.Module, train_extent: Callable[[PositionEncoding], tuple[int, ...]], state_dict: State, prefix: str
) -> None:
    """Resize tables that were learned on another grid, by the encoding's own rule; equal shapes keep their bits.

    Args:
        train_extent: the extent that an encoding of this model is trained on.
    """
    for owner, encoding in named_encodings(model).items():
        if isinstance(encoding, Sum):
            continue
        wanted = dict(encoding.named_parameters())
        keys = {name: f"{prefix}{owner}.{name}" for name in wanted}
        stored = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
        if all(value.shape == wanted[name].shape for name, value in stored.items()):
            continue
        if any(value.ndim != wanted[name].ndim for name, value in stored.items()):
            continue  # another encoding: the strict load refuses it
        resized, on_meta = copy.deepcopy(encoding), any(p.is_meta for p in encoding.parameters())
        resized = resized.to_empty(device="cpu") if on_meta else resized.to(device="cpu")
        for name, value in stored.items():
            _set_parameter(resized, name, value)
        resized.set_grid(train_extent(encoding))
        for name, value in resized.named_parameters():
            if value.shape == wanted[name].shape and name in stored and stored[name].shape != value.shape:
                log.info("%s resized from %s to %s", keys[name], tuple(stored[name].shape), tuple(value.shape))
                state_dict[keys[name]] = value.detach()


def _set_parameter(encoding: PositionEncoding, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = encoding.get_submodule(owner)
    in_list = isinstance(module, nn.ParameterList)
    value = value.float() if in_list or value.dtype.itemsize < 4 else value
    module.register_parameter(last, nn.Parameter(value, requires_grad=False))


def _configured_grid(module: TimmViT) -> list[tuple[int, int]]:
    """The grid of the size in `pretrained_cfg`, where timm put one."""
    size = pretrained_cfg_of(module).get("input_size")
    if not size:
        return []
    rows, cols = module.patch_embed.patch_size
    return [(size[-2] // rows, size[-1] // cols)]
