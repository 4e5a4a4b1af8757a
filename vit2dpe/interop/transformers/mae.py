"""MAE weights under the names of the original and of transformers."""

from __future__ import annotations

import re

import torch

from ...errors import CheckpointError, ConfigError
from ...models.mae import MAE
from ...models.mae_names import BLOCK, LISTS, REST, State
from ...positions import Positions
from ..timm.convert import to_timm


def to_original(model: MAE) -> State:
    """Encoder and decoder in the original's flat list; `load_state_dict` takes it back."""
    encoder, decoder = model.encoder, dict(model.state_dict())
    decoder = {n: v for n, v in decoder.items() if not n.startswith(("encoder.", "decoder_position."))}
    for half, position, names in ("encoder", encoder.position, encoder.state_dict()), (
        "decoder", model.decoder_position, decoder
    ):  # fmt: skip
        if position.gives - {"token"} or any(".position." in name for name in names):
            raise ConfigError(
                f"the original's {half} can add a vector to each token, and this encoding does more: keep state_dict()"
            )
    at = Positions.grid(model.train_grid, model.mask_token.device).with_prefix(encoder.num_prefix_tokens)
    with torch.no_grad():
        token = model.decoder_position(at).token
    return to_timm(encoder) | decoder | ({} if token is None else {"decoder_pos_embed": token})


def to_transformers(state: State) -> State:
    """The original's names, as `to_original` gives them, for `ViTMAEForPreTraining` (transformers 5's spelling).

    Raises:
        CheckpointError: for a name that model has no place for.
    """
    rest, lists, parts = ({ours: theirs for theirs, ours in names.items()} for names in (REST, LISTS, BLOCK))
    renamed: State = {}
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        block = re.fullmatch(r"((?:decoder_)?blocks)\.(\d+)\.(.+)", owner)
        inside = f"{lists[block[1]]}.{block[2]}" if block else ""
        if name in rest:
            renamed[rest[name]] = value
        elif owner in rest:
            renamed[f"{rest[owner]}.{last}"] = value
        elif block and block[3] in parts:
            renamed[f"{inside}.{parts[block[3]]}.{last}"] = value
        elif block and block[3] == "attn.qkv":
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{inside}.attention.{letter}_proj.{last}"] = part
        else:
            raise CheckpointError(f"transformers' ViTMAEForPreTraining has no place for {name}")
    return renamed
