"""Tables that keep the aspect of a picture: another grid gets the first rows and columns of a square.

    extent -> (L, ..., L), L its largest side; places as they are

Sources: NaFlexViT (timm, `pos_embed_ar_preserving`) and RADIO (arXiv 2412.07679), whose tables are resized to a square
of the longer side and cut. On the grid that a table over all places was learned on it is read as it is, as there.
"""

from __future__ import annotations

from ..positions import Positions


def squared(at: Positions, own: tuple[int, ...] = ()) -> Positions:
    """The same places on the square that holds their grid; a grid of the sizes `own` stays."""
    if at.extent == own:
        return at
    side = max(at.extent)
    return Positions(at.coords, (side,) * at.axes, at.prefix, at.on_grid, at.spacing)
