"""Pictures of attention: from one query of an image, block by block and head by head, and the rollout.

Legend: B batch, N tokens, prefix included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..attention.maps import rollout
from ..attention.observe import attention_maps
from ..data.datasets import normalize
from ..data.decode import Unreadable, decode
from ..errors import ConfigError, DataError
from ..models import ViT
from ..models.masked import MaskedModel
from ..models.timm_api import PretrainedCfg, pair, pretrained_cfg_of
from .figures import HEADS, choose_blocks, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Channels = float | Sequence[float] | Tensor  # one value, or one a channel


def draw(model: ViT, image: Tensor, *, mean: Channels = 0.0, std: Channels = 1.0) -> Figure:
    """A figure with a row for each of up to four blocks: the mean over heads, then up to three heads.

    The query is the class token where there is one, else the patch in the centre, marked by a circle. A scale serves
    one panel, from 0 to the largest weight, which the title names; prefix keys are left out of the picture.

    Args:
        model: a `ViT`, in the mode to be drawn.
        image: (1, C, height, width), normalised as the model was trained, on any device.
        mean, std: of that normalisation, for showing the picture itself; tensors too.
    """
    like = next(model.parameters())
    grid, prefix = model.patch_embed.grid(*image.shape[-2:]), model.num_prefix_tokens
    tokens = prefix + grid[0] * grid[1]
    with torch.no_grad(), attention_maps(model) as every:
        model(image.to(like.device, like.dtype))
    maps = {name: one.cpu() for name, one in every.items() if one.shape[-2:] == (tokens, tokens)}  # (1, H, N, N)
    if not maps:
        raise ConfigError(f"no attention of this {type(model).__name__} is over all {tokens} tokens of the image")
    place = (grid[0] // 2, grid[1] // 2)
    query = 0 if model.cls_token is not None else prefix + place[0] * grid[1] + place[1]

    chosen = choose_blocks(list(maps))
    heads = min(HEADS, max(one.shape[1] for one in maps.values()))
    side = 2.1 / max(image.shape[-2:])
    high, wide = side * image.shape[-2] + 0.35, side * image.shape[-1] + 0.25
    columns, rows = max(2, heads + 1), len(chosen) + 1
    figure = new_figure(columns * wide, rows * high + 0.3, "constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    factor, offset = (torch.as_tensor(values).float().cpu().reshape(-1, 1, 1) for values in (std, mean))
    picture = (image[0].float().cpu() * factor + offset).clamp(0, 1)
    picture = picture.expand(3, -1, -1) if picture.shape[0] == 1 else picture[:3]
    axes[0][0].imshow(picture.permute(1, 2, 0).numpy())
    axes[0][0].set_title("image", fontsize=9)
    panels = [("rollout", axes[0][1], rollout(list(maps.values()))[0, query])]
    for name, row in zip(chosen, axes[1:], strict=True):
        one = maps[name][0, :, query]  # (H, N)
        panels.append((f"{name}: mean", row[0], one.mean(dim=0)))
        panels += [(f"head {i}", ax, head) for i, (ax, head) in enumerate(zip(row[1:], one, strict=False))]
    for title, ax, values in panels:
        values = values[prefix:].view(grid)
        ax.imshow(values.numpy(), vmin=0.0, cmap="viridis", extent=(0, image.shape[-1], image.shape[-2], 0))
        ax.set_title(f"{title}, to {float(values.max()):.2g}", fontsize=9)
        if model.cls_token is None:
            y, x = ((i + 0.5) * p for i, p in zip(place, model.patch_embed.patch_size, strict=True))
            ax.plot(x, y, "o", markersize=6, markerfacecolor="none", markeredgecolor="white")
    query_is = "the class token" if model.cls_token is not None else f"the patch in row {place[0]}, column {place[1]}"
    figure.suptitle(f"attention of {query_is}", fontsize=10)
    return figure


def save(model: nn.Module, file: str | Path, out: str | Path, size: tuple[int, int] | None = None) -> Path:
    """Draw a model's attention to an image file into `out`; its suffix selects the format.

    Args:
        model: a `ViT`, or a masked autoencoder, whose encoder is shown all patches; normalisation is taken from a run's
            record (`about`) or timm's (`pretrained_cfg`).
        file: the image; brought to `size`, default the model's training size.

    Raises:
        ConfigError: for any other model.
        DataError: if the file cannot be read.
    """
    cfg: PretrainedCfg = getattr(model, "about", None) or pretrained_cfg_of(model)
    vit = model.encoder if isinstance(model, MaskedModel) else model
    if not isinstance(vit, ViT):
        hint = "; vit2dpe.from_timm makes one of it" if type(model).__module__.startswith("timm.") else ""
        inside = "" if vit is model else f" around a {type(vit).__name__}"
        raise ConfigError(
            f"attention to an image is drawn of a ViT of this library, this is a {type(model).__name__}{inside}{hint}"
        )
    size = size or pair(vit.patch_embed.img_size)
    channels = vit.in_chans
    if channels not in (1, 3):
        raise ConfigError(
            f"this {type(vit).__name__} takes images of {channels} channels, a file has 3: "
            "vit2dpe.plots.attention.draw takes them as a tensor"
        )
    mean, std = (tuple(values or [0.5] * channels) for values in (cfg.get("mean"), cfg.get("std")))
    try:
        pixels, _ = decode(file, size)
    except Unreadable as error:  # its own message says how a data set does without the image
        raise DataError(f"cannot read the image {file}: {error.reason}") from None
    image = torch.from_numpy(pixels.copy()).movedim(-1, -3)[None] / 255
    image = image.mean(dim=1, keepdim=True) if channels == 1 else image
    return save_figure(draw(vit.eval(), normalize(image, mean, std), mean=mean, std=std), out, dpi=120)
