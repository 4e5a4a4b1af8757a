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
from typing import Any, Protocol

from torch import Tensor

from ..encodings import LearnedTable, PositionEncoding
from ..errors import CheckpointError
from .mae_names import State, from_transformers
from .weights import check_formula, is_formula, resize_tables, rewrite, unwrapped

_FLAT = re.compile(r"(cls_token|reg_token|pos_embed|patch_embed\.|blocks\.|norm\.)")


class _Decoder(Protocol):
    """What of a masked autoencoder decides where a stored table goes."""

    decoder_position: PositionEncoding
    train_grid: tuple[int, int]


def convert_state_dict(module: _Decoder, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load pre-hook of MAE: files and names of others, and tables of another grid, brought to ours in place."""
    if not prefix:
        state = unwrapped(state_dict)
        theirs = any(name.startswith("vit.embeddings.") for name in state)
        rewrite(state_dict, from_transformers(state) if theirs else state)
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
    resize_tables(module, state_dict, prefix)  # type: ignore[arg-type]


def _place(flat: Tensor, position: PositionEncoding, grid: tuple[int, int], owner: str) -> State:
    """What a flat table (1, prefix + N, D) is in our encoding: its parameter, or nothing for a formula that agrees."""
    if is_formula(position):
        check_formula(position, grid, flat, "decoder_pos_embed")
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


# transformers ----------------------------------------------------------------------------------------------------
