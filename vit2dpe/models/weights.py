"""Names and layouts of others' checkpoints, translated on the way in.

timm's ViT keeps one flat table `pos_embed` (1, prefix + h w, D); ours is `position.pos_embed` (1, h, w, D), and the
rows of prefix tokens, which have no place, are folded into the tokens themselves: x + row is the same either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..encodings import LearnedTable
from ..errors import CheckpointError

if TYPE_CHECKING:
    from .vit import ViT


def accept_timm_names(module: ViT, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load pre-hook of ViT: rewrites timm's `pos_embed` in place where the model has a table for it."""
    flat = state_dict.get(prefix + "pos_embed")
    tables = [name for name, part in module.position.named_modules() if isinstance(part, LearnedTable)]
    if flat is None or flat.ndim != 3 or not tables:
        return
    h, w = module.train_grid
    rows = flat.shape[1] - h * w
    if rows not in (0, int(module.cls_token is not None), module.num_prefix_tokens):
        raise CheckpointError(
            f"pos_embed has {flat.shape[1]} rows, the model needs {h}x{w} = {h * w} and at most "
            f"{module.num_prefix_tokens} for its prefix; a flat table does not say which grid it was learned on, "
            "so build the model at the size of the checkpoint (img_size=...)"
        )
    del state_dict[prefix + "pos_embed"]
    owner = ".".join(part for part in ("position", tables[0], "pos_embed") if part)
    state_dict[prefix + owner] = flat[:, rows:].unflatten(1, (h, w))
    # timm adds the rows to [cls, registers] in this order.
    for name, token, start in _prefix_tokens(module):
        if start < rows:
            key = prefix + name
            if key not in state_dict:
                raise CheckpointError(
                    f"pos_embed has a row for {name}, but the checkpoint has no {key} to fold it into"
                )
            state_dict[key] = state_dict[key] + flat[:, start : start + token.shape[1]]


def _prefix_tokens(module: ViT) -> list[tuple[str, Tensor, int]]:
    found, start = [], 0
    for name in ("cls_token", "reg_token"):
        token = getattr(module, name)
        if token is not None:
            found.append((name, token, start))
            start += token.shape[1]
    return found
