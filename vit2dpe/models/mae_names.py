"""Names of MAE checkpoints in transformers, under the original's names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import CheckpointError

State = dict[str, Tensor]
BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


REST = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}


LISTS = {"vit.layers": "blocks", "decoder.decoder_layers": "decoder_blocks"}


# Files written before transformers 5 spell a block otherwise.
_OLDER = {
    "vit.encoder.layer.": "vit.layers.",
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}


def from_transformers(state: State) -> State:
    """`ViTMAEForPreTraining.state_dict()` under the original's names; q, k and v become one `qkv`.

    Raises:
        CheckpointError: for a name that is not one of that model's.
    """
    state = {_newer(name): value for name, value in state.items()}
    found: State = {}
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        block = re.fullmatch(r"(vit\.layers|decoder\.decoder_layers)\.(\d+)\.(.+)", owner)
        inside = f"{LISTS[block[1]]}.{block[2]}" if block else ""
        part = block[3] if block else ""
        if name in REST:
            found[REST[name]] = value
        elif owner in REST:
            found[f"{REST[owner]}.{last}"] = value
        elif part in BLOCK:
            found[f"{inside}.{BLOCK[part]}.{last}"] = value
        elif part == "attention.q_proj":
            found[f"{inside}.attn.qkv.{last}"] = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        elif part not in ("attention.k_proj", "attention.v_proj"):
            raise CheckpointError(f"{name} is not a name of transformers' ViTMAEForPreTraining")
    return found


def _newer(name: str) -> str:
    for older, newer in _OLDER.items():
        name = name.replace(older, newer)
    return name
