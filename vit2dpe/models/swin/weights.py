"""Names and layouts of Swin checkpoints, translated on the way in: timm's, the original's, torchvision's.

Differences from ours:
    timm         the table is (T, H), T = (2h - 1)(2w - 1), and it and `cpb_mlp` lie in `attn`, not `attn.position`
    original     as timm's, but patch merging belongs to the stage before; classifier `head`; index and mask buffers
    torchvision  numbers instead of names; `head`; one `qkv.bias` in V2, whose part for k is ignored

A flat table does not determine its window: 225 rows are (5, 13) and (8, 8). It is taken for the window of the block
that it goes into and for nothing else. Ours have it in their shape, and are resized by the encoding's own rule.
"""

from __future__ import annotations

import re

from torch import Tensor

from ...encodings import LogCPB, RelativeBias, named_encodings
from ...errors import CheckpointError
from ..mae_names import State
from ..unwrap import Rest, unwrapped
from ..weights import resize_tables
from .timm_api import TimmSwin

BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask", "k_bias")
TABLE, NETWORK = "relative_position_bias_table", "cpb_mlp"


def checkpoint_filter_fn(state_dict: State, model: TimmSwin) -> State:
    """Unwraps a checkpoint and brings names and layouts to the model's; timm calls it before a strict load."""
    state = unwrapped(state_dict)
    convert_state_dict(model, state, "")
    return state


def convert_state_dict(module: TimmSwin, state_dict: State, prefix: str, *_: Rest) -> None:
    """Load pre-hook of Swin: rewrites names and layouts in place."""
    state = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    for name in state:
        del state_dict[prefix + name]
    state = state if prefix else unwrapped(state)
    state = {name: value for name, value in state.items() if name.rsplit(".", 1)[-1] not in BUFFERS}
    if any(name.startswith("features.") for name in state):
        state = _from_torchvision(state)
    elif "layers.0.downsample.reduction.weight" in state:
        state = _from_original(state)
    state = _into_encodings(module, state)
    resize_tables(module, module.train_extent, state, "")
    state_dict.update({prefix + name: value for name, value in state.items()})


def _from_original(state: State) -> State:
    def later(name: str) -> str:
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda at: f"layers.{int(at[1]) + 1}.downsample", name)
        return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)

    return {later(name): value for name, value in state.items()}


def _from_torchvision(state: State) -> State:
    """features.0 is the patch embedding; then stages and mergings take turns."""
    named: State = {}
    for name, value in state.items():
        name = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", name)
        name = re.sub(r"^features\.0\.2\.", "patch_embed.norm.", name)
        name = re.sub(r"^features\.(\d*[13579])\.", lambda at: f"layers.{int(at[1]) // 2}.blocks.", name)
        name = re.sub(r"^features\.(\d+)\.", lambda at: f"layers.{int(at[1]) // 2}.downsample.", name)
        name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        named[re.sub(r"^head\.", "head.fc.", name)] = value
    for name in [name for name in named if name.endswith("logit_scale")]:
        attn = name.removesuffix("logit_scale")
        bias = named.pop(f"{attn}qkv.bias", None)
        if bias is not None:
            named[f"{attn}q_bias"], _, named[f"{attn}v_bias"] = bias.chunk(3)
    return named


def _into_encodings(module: TimmSwin, state: State) -> State:
    """Tables and networks of `attn` go to the encoding in it that has such; a flat table gets its window."""
    encodings, moved = named_encodings(module), State()
    for name, value in state.items():
        foreign = re.match(rf"(.*\.attn)\.({TABLE}|{NETWORK}.*)$", name)
        if foreign is None:
            moved[name] = value
            continue
        kind = RelativeBias if foreign[2] == TABLE else LogCPB
        owners = [
            (owner, encoding)
            for owner, encoding in encodings.items()
            if f"{owner}.".startswith(f"{foreign[1]}.position.") and isinstance(encoding, kind)
        ]
        if len(owners) != 1:
            moved[name] = value
            continue
        ((owner, encoding),) = owners
        own = encoding.relative_position_bias_table if isinstance(encoding, RelativeBias) else None
        if own is not None and value.ndim == 2:
            value = _unflatten(name, value, own)
        moved[f"{owner}.{foreign[2]}"] = value
    return moved


def _unflatten(name: str, table: Tensor, own: Tensor) -> Tensor:
    _, *sizes = own.shape
    if table.shape[0] != sizes[0] * sizes[1]:
        window = " by ".join(str((size + 1) // 2) for size in sizes)
        raise CheckpointError(
            f"{name} has {table.shape[0]} rows, a window of {window} has {sizes[0] * sizes[1]}; a flat table does not "
            "say its window: build the model with that of the checkpoint (window_size=..., img_size=...), and call "
            "set_input_size after loading"
        )
    return table.t().reshape(table.shape[1], *sizes)
