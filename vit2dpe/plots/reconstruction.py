"""Pictures of masked autoencoders' reconstructions: original | masked | reconstruction | pasted, a row an image.

With `norm_pix` a model predicts each patch up to its mean and variance, and the picture takes both from the hidden
patch itself. It then shows more than the model predicts; its titles say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.masked import MaskedModel
from ..modes import evaluating
from .figures import new_figure, save_figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

LEAK = "uses the target's patch mean and variance"
GREY = 0.5


def draw(
    model: MaskedModel,
    images: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    mask_ratio: float = 0.75,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Figure:
    """A figure with four pictures an image.

    Args:
        model: a MAE or a SimMIM; it paints in evaluation mode and is left as it was.
        images: (B, C, H, W), normalised as the model wants them, on any device.
        mean, std: that they were normalised with, a value a channel.
        mask_ratio: the part that is hidden.
        noise, generator: of the masks, as for the model.

    Raises:
        ConfigError: without matplotlib.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        noise = None if noise is None else noise.to(device)
        shown = model.reconstruct(images.to(device), mask_ratio, noise, generator)
    original, painted, pasted = (_pixels(x, mean, std) for x in (shown.original, shown.painted, shown.pasted))
    masked = torch.where(shown.hidden.cpu(), GREY, original)
    note = "\n" + fill(LEAK, 26) if model.norm_pix else ""
    titles = ("original", f"masked ({mask_ratio:.0%})", f"reconstruction{note}", f"pasted{note}")
    rows, (height, width) = len(images), images.shape[-2:]
    wide, tall = 2.2, 2.2 * height / width
    figure = new_figure(4 * wide, rows * tall + 0.5, "constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for row, pictures in enumerate(zip(original, masked, painted, pasted, strict=True)):
        for col, picture in enumerate(pictures):
            ax = axes[row][col]
            ax.imshow(_shown(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
            if row == 0:
                ax.set_title(titles[col], fontsize=8)
    return figure


def save(
    path: str | Path,
    model: MaskedModel,
    images: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    mask_ratio: float = 0.75,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Path:
    """Draw into a file; its suffix selects the format; arguments as for `draw`."""
    return save_figure(draw(model, images, mean, std, mask_ratio, noise, generator), path)


def _pixels(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Back to [0, 1], on the CPU."""
    factor, offset = (torch.as_tensor(values).float().cpu().view(1, -1, 1, 1) for values in (std, mean))
    return (images.float().cpu() * factor + offset).clamp(0, 1)


def _shown(picture: Tensor) -> np.ndarray:
    """(C, H, W) as matplotlib takes it: colour for three channels, else their mean in grey."""
    return (picture.movedim(0, -1) if len(picture) == 3 else picture.mean(dim=0)).numpy()
