"""A `ViT` under the names of transformers 5: the way back of `vit.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...encodings.learned import LearnedTable
from ...errors import CheckpointError, ConfigError, unknown
from ...models.deit import DistilledViT
from ...models.mae_names import State
from ...models.vit import ViT

_ATTENTION = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
}
_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_PLAIN = {"": "layers"} | _ATTENTION | _MLP | {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_DINO = _ATTENTION | {"norm1": "norm1", "norm2": "norm2", "ls1": "layer_scale1", "ls2": "layer_scale2"}
_GATED = {"mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
_CLIP = {
    "": "encoder.layers",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attn.proj": "self_attn.out_proj",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
} | _MLP
_EMBED = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_TOWER = {"cls_token": "embeddings.class_embedding", "patch_embed.proj": "embeddings.patch_embedding"}
_TOWER |= {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
_POOL = {
    "attn_pool.latent": "head.probe",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}


class Spelling(NamedTuple):
    """Names of a family, ours -> theirs: of a block's parts, and under "" of the list of blocks; of what is around
    them; and, of a class with a classifier, what stands before the encoder's names, and the classifiers'."""

    block: dict[str, str]
    rest: dict[str, str]
    encoder: str
    heads: dict[str, str]


_HEAD, _TWO = {"head": "classifier"}, {"head": "cls_classifier", "head_dist": "distillation_classifier"}
_DINOS = _DINO | _MLP | {"": "encoder.layer"}
FAMILIES = {
    "vit": Spelling(_PLAIN, _EMBED, "vit.", _HEAD),
    "deit": Spelling(_PLAIN, _EMBED | {"reg_token": "embeddings.distillation_token"}, "deit.", _HEAD),
    "ijepa": Spelling(_PLAIN, _EMBED, "ijepa.", _HEAD),
    "dinov2": Spelling(_DINOS, _EMBED, "", {}),
    "dinov2_with_registers": Spelling(_DINOS, _EMBED | {"reg_token": "embeddings.register_tokens"}, "", {}),
    "clip_vision_model": Spelling(_CLIP, _TOWER, "vision_model.", {"head": "visual_projection"}),
    "siglip_vision_model": Spelling(_CLIP, _TOWER | _POOL, "vision_model.", _HEAD),
}


def to_transformers(model: ViT, family: str) -> State:
    """The weights under the names of transformers 5, for `load_state_dict(strict=False)` of a class of the family: that
    with a classifier (CLIP: a projection) where the model has one, else the encoder's. What it then lacks is a pooler
    or a mask token, which no output of ours needs.

    Rows of the table for leading tokens are zero: ours has them in the tokens.

    Args:
        model: with the encoding `learned`.
        family: a `model_type` of `FAMILIES`.

    Raises:
        ConfigError: for another encoding or family.
        CheckpointError: for a weight that the family has no place for.
    """
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    if not isinstance(model.position, LearnedTable):
        raise ConfigError(f"a {family} has a learned table, and this model {type(model.position).__name__}")
    names, state = FAMILIES[family], State()
    ours = {name: value.detach() for name, value in model.state_dict().items()}
    own_row = [token for token in model.prefix_tokens() if token != "reg_token" or family == "deit"]
    table = F.pad(ours.pop("position.pos_embed").flatten(1, -2), (0, 0, len(own_row), 0))  # (1, tokens, D)
    if "embeddings.patch_embedding" in names.rest.values():
        state["embeddings.position_embedding.weight"] = table[0]
    else:
        state["embeddings.position_embeddings"] = table
    for part in ("weight", "bias") if "attn_pool.q.weight" in ours else ():
        joined = torch.cat([ours.pop(f"attn_pool.{x}.{part}") for x in ("q", "kv")])
        state[f"head.attention.in_proj_{part}"] = joined
    heads = _TWO if isinstance(model, DistilledViT) else names.heads
    block = names.block | (_GATED if "blocks.0.mlp.fc1_g.weight" in ours else {})
    for name, value in ours.items():
        for theirs, own in _renamed(name, value, block, names.rest | heads):
            state[theirs] = own.flatten() if theirs == "embeddings.class_embedding" else own
    projection = state.get("visual_projection.bias")
    if projection is not None and not projection.any():
        del state["visual_projection.bias"]
    elif projection is not None:
        raise CheckpointError(f"a {family} has no place for head.bias")
    if not any(name.startswith("head.") for name in ours):
        return state  # the encoder alone
    outside = tuple(f"{theirs}." for theirs in heads.values())
    return {(name if name.startswith(outside) else names.encoder + name): value for name, value in state.items()}


def _renamed(name: str, value: Tensor, block: dict[str, str], rest: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """A weight of ours under its name, or its three."""
    owner, _, last = name.rpartition(".") if name.endswith((".weight", ".bias", ".gamma")) else (name, "", "")
    last = "lambda1" if last == "gamma" else last
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", owner):
        parts = zip("qkv", value.chunk(3), strict=True) if found[2] == "attn.qkv" else [(found[2], value)]
        for part, own in parts:
            if part not in block:
                raise CheckpointError(f"this family has no place for {name}")
            yield f"{block['']}.{found[1]}.{block[part]}.{last}", own
    elif owner in rest:
        yield rest[owner] + (f".{last}" if last else ""), value
    else:
        raise CheckpointError(f"this family has no place for {name}")
