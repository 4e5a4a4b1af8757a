"""Configuration of `vit2dpe tune`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from ..ranges import Count, Seed
from ..spec import Settings, Size


@dataclass(frozen=True)
class TuneConfig(Settings):
    """Choose a classifier's policy at another size without labels, by its agreement with itself at its own size.

    Args:
        init: a run folder, a hub folder or a timm name, as `evaluate --model` takes it, or a file of weights. A folder
            is written to; the model of a name or a file, with the choice, goes to out.
        root: images, without labels: a folder of them, at any depth, or a file.
        size: in pixels that is wanted, 48 or 48x64 (height x width).
        limit: use only so many images, drawn by seed.
        seed: of the images that are drawn and of their halves.
        checkpoint: weights for a timm name, instead of its pretrained ones.
        untrained: take a timm name without weights, to see that everything runs.
        fit: how images are brought to one size: crop, pad or squash; default that of a run, or crop.
        unreadable: error, or skip: files that cannot be read are left out and counted.
        batch_size: images at a time.
        device: auto, cpu, cuda, cuda:1, mps.
        out: folder that tune.csv goes to; default that of the model, or runs/tune for a name.
    """

    init: str = ""
    root: str = ""
    size: Size | None = None
    limit: Count = 256
    seed: Seed = 0
    checkpoint: str | None = None
    untrained: bool = False
    fit: str | None = None
    unreadable: str = "error"
    batch_size: Count = 32
    device: str = "auto"
    out: str | None = None
