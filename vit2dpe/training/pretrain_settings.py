"""What a masked pretraining and a probe are told. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..data.settings import DataConfig, ViewConfig
from ..spec import Settings
from .settings import PRESETS, ModelConfig, OptimConfig, RunConfig, smoked


@dataclass(frozen=True)
class DecoderConfig(Settings):
    """Who paints the hidden patches.

    Args:
        position: the decoder's encoding, a word.
        width: channels of a token.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP over width.
    """

    position: str = "sincos"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None


@dataclass(frozen=True)
class PretrainConfig(Settings):
    """Pretrain an encoder of images without labels: hide patches, paint them (MAE, SimMIM).

    Settings left at null take the preset of the data.

    Args:
        model: the encoder.
        decoder: who paints the hidden patches; of mae.
        data: images; labels are not looked at.
        augment: what happens to training images.
        optim: how weights are updated.
        run: where and how it runs.
        objective: mae (the encoder sees visible patches only; a ViT) or simmim (it sees a token in place of hidden
            ones; a ViT or a Swin).
        mask_ratio: the part that is hidden; default 0.75 for mae, 0.6 for simmim.
        mask_unit: pixels, side, that simmim hides together.
        norm_pix: predict each patch normalised by its own mean and variance; of mae, and its default.
        pictures: how many test images are drawn: original, masked, reconstruction, pasted.
        resume: go on from run.out/last, if it is there.
        init: start from these weights, a run folder or a file.
        smoke: two steps on the CPU, to see that everything runs.
    """

    model: ModelConfig = ModelConfig()  # noqa: RUF009 - frozen, like the four below
    decoder: DecoderConfig = DecoderConfig()
    data: DataConfig = DataConfig()
    augment: ViewConfig = ViewConfig()  # noqa: RUF009
    optim: OptimConfig = OptimConfig(  # noqa: RUF009
        lr=1.5e-3, betas=(0.9, 0.95), clip_grad=0.0, epochs=100, warmup_epochs=5, batch_size=128
    )
    run: RunConfig = RunConfig(out="runs/pretrain")  # noqa: RUF009
    objective: str = "mae"
    mask_ratio: float | None = None
    mask_unit: int = 8
    norm_pix: bool | None = None
    pictures: int = 8
    resume: bool = False
    init: str | None = None
    smoke: bool = False


DECODERS: dict[str, dict[str, Any]] = {  # what is chosen where a setting of the decoder is null, by the data
    "digits": dict(width=32, depth=1, heads=4, mlp_ratio=2.0),
    "": dict(width=96, depth=4, heads=3, mlp_ratio=4.0),
}


def resolve(config: PretrainConfig) -> PretrainConfig:
    """Every setting that is None filled from the preset of the data; `smoke` applied."""
    decoder = DECODERS.get(config.data.name, DECODERS[""])
    for part, values in (PRESETS.get(config.data.name, PRESETS[""]) | dict(decoder=decoder)).items():
        if part == "model" and config.model.name is not None:
            values = dict(position="rope", pool="avg") if config.objective == "mae" else {}
        if part == "augment" and config.augment.crop is not None:
            values = dict(values, shift=0)
        old = getattr(config, part)
        new = {name: value for name, value in values.items() if getattr(old, name) is None}
        config = replace(config, **{part: replace(old, **new)})
    mae = config.objective == "mae"
    if config.mask_ratio is None:
        config = replace(config, mask_ratio=0.75 if mae else 0.6)
    if config.norm_pix is None:
        config = replace(config, norm_pix=mae)
    return smoked(config) if config.smoke else config
