"""MAE checkpoints of others: the original's flat names, transformers' split names, and timm's for the encoder alone.

The original keeps encoder and decoder in one flat list (`cls_token`, `blocks.i`, `decoder_blocks.i`) with two frozen
sin-cos tables, `pos_embed` and `decoder_pos_embed`, (1, 1 + N, D). `MAE.load_state_dict` takes it as it is, with the
{"model": ...} of the file around it, and so it takes transformers' names; `ViT.load_state_dict` takes the encoder of
either. A table goes into a learned encoding; where the encoding is a formula it must be what the formula gives, and is
left out. The files published as "pretrain" hold the encoder alone: those go into `mae.encoder`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..encodings import LearnedTable, PositionEncoding
from ..errors import CheckpointError, ConfigError
from ..positions import Positions
from . import weights
from .convert import to_timm

if TYPE_CHECKING:
    from .mae import MAE

State = dict[str, Tensor]
_FLAT = re.compile(r"(cls_token|reg_token|pos_embed|patch_embed\.|blocks\.|norm\.)")


def accept_original(module: MAE, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load pre-hook of MAE: files and names of others, and tables of another grid, brought to ours in place."""
    if not prefix:
        state = weights.unwrapped(state_dict)
        theirs = any(name.startswith("vit.embeddings.") for name in state)
        weights.rewrite(state_dict, from_transformers(state) if theirs else state)
    names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    flat = [name for name in names if _FLAT.match(name)]
    if flat and not any(name.startswith("decoder_") for name in names):
        raise CheckpointError(
            "this checkpoint holds an encoder alone, as the files published as 'pretrain' do: load it into mae.encoder "
            "(the decoder is in those published as 'visualize' or 'full')"
        )
    for name in flat:
        state_dict[f"{prefix}encoder.{name}"] = state_dict.pop(prefix + name)
    table = state_dict.pop(f"{prefix}decoder_pos_embed", None)
    if table is not None:
        name = "decoder_position"
        for key, value in _place(table, module.decoder_position, module.train_grid, name).items():
            state_dict[prefix + key] = value
    weights._fit_tables(module, state_dict, prefix)  # type: ignore[arg-type]


def _place(flat: Tensor, position: PositionEncoding, grid: tuple[int, int], owner: str) -> State:
    """What a flat table (1, prefix + N, D) is in our encoding: its parameter, or nothing for a formula that agrees."""
    if weights.is_formula(position):
        weights.check_formula(position, grid, flat, "decoder_pos_embed")
        return {}
    tables = [name for name, part in position.named_modules() if isinstance(part, LearnedTable)]
    rows = flat.shape[1] - math.prod(grid)
    if not tables or rows < 0:
        raise CheckpointError(
            f"decoder_pos_embed {tuple(flat.shape)} has no place in this decoder, which has a grid of {grid}: build it "
            "with decoder_position='sincos' or 'learned', at the size of the checkpoint"
        )
    if rows and bool(flat[:, :rows].any()):
        raise CheckpointError("decoder_pos_embed moves the class token, which has no place here and no row in a table")
    name = ".".join(part for part in (owner, tables[0], "pos_embed") if part)
    return {name: flat[:, rows:].unflatten(1, grid)}


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


# transformers ----------------------------------------------------------------------------------------------------

_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_REST = {
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
_LISTS = {"vit.layers": "blocks", "decoder.decoder_layers": "decoder_blocks"}
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
        inside = f"{_LISTS[block[1]]}.{block[2]}" if block else ""
        part = block[3] if block else ""
        if name in _REST:
            found[_REST[name]] = value
        elif owner in _REST:
            found[f"{_REST[owner]}.{last}"] = value
        elif part in _BLOCK:
            found[f"{inside}.{_BLOCK[part]}.{last}"] = value
        elif part == "attention.q_proj":
            found[f"{inside}.attn.qkv.{last}"] = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        elif part not in ("attention.k_proj", "attention.v_proj"):
            raise CheckpointError(f"{name} is not a name of transformers' ViTMAEForPreTraining")
    return found


def to_transformers(state: State) -> State:
    """The original's names, as `to_original` gives them, for `ViTMAEForPreTraining` (transformers 5's spelling).

    Raises:
        CheckpointError: for a name that model has no place for.
    """
    rest, lists, parts = ({ours: theirs for theirs, ours in names.items()} for names in (_REST, _LISTS, _BLOCK))
    found: State = {}
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        block = re.fullmatch(r"((?:decoder_)?blocks)\.(\d+)\.(.+)", owner)
        inside = f"{lists[block[1]]}.{block[2]}" if block else ""
        if name in rest:
            found[rest[name]] = value
        elif owner in rest:
            found[f"{rest[owner]}.{last}"] = value
        elif block and block[3] in parts:
            found[f"{inside}.{parts[block[3]]}.{last}"] = value
        elif block and block[3] == "attn.qkv":
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{inside}.attention.{letter}_proj.{last}"] = part
        else:
            raise CheckpointError(f"transformers' ViTMAEForPreTraining has no place for {name}")
    return found


def _newer(name: str) -> str:
    for older, newer in _OLDER.items():
        name = name.replace(older, newer)
    return name
