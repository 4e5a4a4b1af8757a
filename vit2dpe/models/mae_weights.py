"""MAE checkpoints of others: the original's flat names, transformers' split names, and timm's for the encoder alone.

The original keeps encoder and decoder in one flat list (`cls_token`, `blocks.i`, `decoder_blocks.i`) with two frozen
sin-cos tables, `pos_embed` and `decoder_pos_embed`, (1, 1 + N, D). `MAE.load_state_dict` takes it as it is, with the
{"model": ...} of the file around it, and so it takes transformers' names; `ViT.load_state_dict` takes the encoder of
either. A table goes into a learned encoding; where the encoding is a formula it must equal the formula's table, and is
left out. The files published as "pretrain" hold the encoder alone: those go into `mae.encoder`.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

from ..encodings import LearnedTable, PositionEncoding
from ..errors import CheckpointError
from .mae_names import State, from_transformers, is_transformers
from .unwrap import rewrite, unwrapped
from .weights import check_formula, is_formula

_FLAT = re.compile(r"(cls_token|reg_token|pos_embed|patch_embed\.|blocks\.|norm\.)")


def from_original(state_dict: State, prefix: str, decoder_position: PositionEncoding, grid: tuple[int, ...]) -> None:
    """Bring other people's files and names of a masked autoencoder to ours, in place.

    Args:
        prefix: of the model's names in `state_dict`.
        decoder_position, grid: the model's, which decide where a stored table of the decoder goes.
    """
    if not prefix:
        state = unwrapped(state_dict)
        rewrite(state_dict, from_transformers(state) if is_transformers(state) else state)
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
        for key, value in _decoder_table(table, decoder_position, grid).items():
            state_dict[prefix + key] = value


def _decoder_table(flat: Tensor, position: PositionEncoding, grid: tuple[int, ...]) -> State:
    """The parameter of our encoding for a flat table (1, prefix + N, D); nothing for a formula that agrees with it."""
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
    name = ".".join(part for part in ("decoder_position", tables[0], "pos_embed") if part)
    return {name: flat[:, rows:].unflatten(1, grid)}
