"""Names of MAE checkpoints: those of transformers under the original's, and the encoder's share of either.

The tables name parts as theirs -> ours; `interop/transformers/mae.py` reads them the other way.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import CheckpointError

State = dict[str, Tensor]  # a state_dict
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


def is_transformers(state: State) -> bool:
    """Whether these are the names of transformers' ViTMAEForPreTraining."""
    return any(name.startswith("vit.embeddings.") for name in state)


def from_transformers(state: State) -> State:
    """`ViTMAEForPreTraining.state_dict()` under the original's names; q, k and v become one `qkv`.

    Raises:
        CheckpointError: for a name that is not one of that model's.
    """
    state = {_newer(name): value for name, value in state.items()}
    renamed: State = {}
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        block = re.fullmatch(r"(vit\.layers|decoder\.decoder_layers)\.(\d+)\.(.+)", owner)
        ours = f"{LISTS[block[1]]}.{block[2]}" if block else ""
        part = block[3] if block else ""
        if name in REST:
            renamed[REST[name]] = value
        elif owner in REST:
            renamed[f"{REST[owner]}.{last}"] = value
        elif part in BLOCK:
            renamed[f"{ours}.{BLOCK[part]}.{last}"] = value
        elif part == "attention.q_proj":
            renamed[f"{ours}.attn.qkv.{last}"] = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        elif part not in ("attention.k_proj", "attention.v_proj"):
            raise CheckpointError(f"{name} is not a name of transformers' ViTMAEForPreTraining")
    return renamed


def _newer(name: str) -> str:
    for older, newer in _OLDER.items():
        name = name.replace(older, newer)
    return name


def encoder_of(state: State) -> State:
    """The encoder of a masked autoencoder, of ours, the original or transformers, under plain names; else as it is.

    Ours has its parts under `encoder.`; the original's decoder has names of its own, `decoder_*` and `mask_token`. The
    latter alone makes no autoencoder: DINOv2's, DINOv3's, BEiT's and EVA's files have it too.
    """
    if is_transformers(state):
        state = from_transformers(state)
    ours = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    if not any(name.startswith("decoder_") for name in state) and not (ours and "mask_token" in state):
        return state
    return ours or {n: v for n, v in state.items() if n != "mask_token" and not n.startswith("decoder_")}
