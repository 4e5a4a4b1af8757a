"""Names and layouts of Swin checkpoints, translated on the way in and out: timm's, the original's, torchvision's.

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
from ...errors import CheckpointError, ConfigError
from ..mae_names import State
from ..weights import Rest, resize_tables, unwrapped
from .stage import SwinBlock, WindowAttention
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
    state = {name: value for name, value in state.items() if name.rsplit(".", 1)[-1] not in BUFFERS}
    if any(name.startswith("features.") for name in state):
        state = _from_torchvision(state)
    elif "layers.0.downsample.reduction.weight" in state:
        state = _from_original(state)
    state = _into_encodings(module, state)
    resize_tables(module, module.train_extent, state, "")
    state_dict.update({prefix + name: value for name, value in state.items()})


def to_timm_swin(model: TimmSwin) -> State:
    """The state of a Swin under timm's names, for `SwinTransformer` or `SwinTransformerV2` of the same sizes.

    A `logcpb` that was trained on other windows than the model's needs timm's `pretrained_window_sizes`.

    Raises:
        ConfigError: for encodings that timm's Swin has not: it has `relative` (V1) or `logcpb` (V2) in each block.
    """
    state: State = {n: v for n, v in model.state_dict().items() if not n.endswith("_extra_state")}
    for owner, part in named_encodings(model).items():
        if not part.gives:
            continue
        if not (owner.endswith(".attn.position") and isinstance(part, RelativeBias | LogCPB)):
            raise _no_such_swin(f"{owner} is a {type(part).__name__}")
        _check_kind(model, owner, part)
        for name in [name for name in state if name.startswith(f"{owner}.")]:
            value = state.pop(name)
            value = value.flatten(1).t().contiguous() if name.endswith(TABLE) else value
            state[name.replace(".attn.position.", ".attn.")] = value
    for owner, attention in model.named_modules():
        if isinstance(attention, WindowAttention) and attention.position is None:
            raise _no_such_swin(f"{owner} has no encoding of its own")
    return state


def _check_kind(model: TimmSwin, owner: str, part: RelativeBias | LogCPB) -> None:
    """timm's V1 is a table and q·k, its V2 a network of 512 hidden units, cosine attention and norms behind."""
    block = model.get_submodule(owner.removesuffix(".attn.position"))
    if not isinstance(block, SwinBlock):
        raise _no_such_swin(f"{owner} is not in a block of a Swin")
    v2 = block.attn.logit_scale is not None
    if block.post_norm != v2 or isinstance(part, LogCPB) != v2:
        came = f"{'logcpb' if isinstance(part, LogCPB) else 'relative'} with qk={'cosine' if v2 else 'dot'}"
        raise _no_such_swin(f"{owner} is {came}{' and norms behind' * block.post_norm}")
    if isinstance(part, LogCPB) and (part.form != "swin" or part.cpb_mlp[0].out_features != 512):
        raise _no_such_swin(
            f"{owner} is a network of form {part.form} with {part.cpb_mlp[0].out_features} hidden units, timm's is one "
            "of form swin with 512"
        )
    if isinstance(part, RelativeBias) and part.prefix_bias is not None:
        raise _no_such_swin(f"{owner} has entries for prefix tokens, of which a Swin has none")


def _no_such_swin(why: str) -> ConfigError:
    return ConfigError(
        f"{why}; timm's Swin is V1 (relative in each block, qk='dot', norms before) or V2 (logcpb in each block, "
        "qk='cosine', post_norm=True): keep such a model in its own names (state_dict), which vit2dpe loads"
    )


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
        if isinstance(encoding, RelativeBias) and value.ndim == 2:
            value = _unflatten(name, value, encoding)
        moved[f"{owner}.{foreign[2]}"] = value
    return moved


def _unflatten(name: str, table: Tensor, encoding: RelativeBias) -> Tensor:
    _, *sizes = encoding.relative_position_bias_table.shape
    if table.shape[0] != sizes[0] * sizes[1]:
        window = " by ".join(str((size + 1) // 2) for size in sizes)
        raise CheckpointError(
            f"{name} has {table.shape[0]} rows, a window of {window} has {sizes[0] * sizes[1]}; a flat table does not "
            "say its window: build the model with that of the checkpoint (window_size=..., img_size=...), and call "
            "set_input_size after loading"
        )
    return table.t().reshape(table.shape[1], *sizes)
