"""Tables that keep the aspect of a picture: another grid gets the first rows and columns of a square.

    extent -> (L, ..., L), L its largest side; places as they are

Sources: NaFlexViT (timm, `pos_embed_ar_preserving`) and RADIO (arXiv 2412.07679), whose tables are resized to a square
of the longer side and cut. On the grid that a table over all places was learned on it is read as it is, as there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ..positions import Positions


def squared(at: Positions, own: tuple[int, ...] = ()) -> Positions:
    """The same places on the square that holds their grid; a grid of the sizes `own` stays."""
    if isinstance(at.extent, Tensor):
        side = at.extent.amax(-1, keepdim=True).expand_as(at.extent)  # (B, d)
        if own:
            kept = reduce(torch.logical_and, (at.extent[:, axis] == size for axis, size in enumerate(own)))
            side = torch.where(kept[:, None], at.extent, side)
        return replace(at, extent=side, box=(max(at.box),) * at.axes if at.box else ())
    if at.extent == own:
        return at
    return replace(at, extent=(max(at.extent),) * at.axes)
