"""Settings of masked pretraining; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from ..data.settings import DataConfig, ViewConfig
from ..ranges import Count, Depth, Part, Positive, Range
from ..spec import Plain, Settings, changed, filled
from .settings import ModelConfig, OptimConfig, RunConfig, image_preset, image_smoke, photos_preset


@dataclass(frozen=True)
class DecoderConfig(Settings):
    """MAE decoder.

    Args:
        position: spec of the decoder's encoding.
        width: channels of a token.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP over width.
    """

    position: str = "sincos"
    width: Count | None = None
    depth: Depth | None = None
    heads: Count | None = None
    mlp_ratio: Positive | None = None


@dataclass(frozen=True)
class PretrainConfig(Settings):
    """Pretrain an encoder of images without labels: hide patches and predict them (MAE, SimMIM).

    Settings left at null take the preset of the data.

    Args:
        model: the encoder.
        decoder: predicts the hidden patches; mae only.
        data: the images; labels are not used, and one folder of images, or any tree of them, is enough.
        augment: random views of training images.
        optim: optimizer and schedule.
        run: where and how it runs.
        objective: mae (the encoder gets the visible patches alone; a ViT) or simmim (it gets a mask token in place of
            hidden ones; a ViT or a Swin).
        mask_ratio: share of patches that is hidden; default 0.75 for mae, 0.6 for simmim.
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
        lr=1.5e-3, betas=(0.9, 0.95), clip_grad=0.0, epochs=100, batch_size=128
    )
    run: RunConfig = RunConfig(out="runs/pretrain")  # noqa: RUF009
    objective: str = "mae"
    mask_ratio: Part | None = None
    mask_unit: Count = 8
    norm_pix: bool | None = None
    pictures: Annotated[int, Range(0, 1000)] = 8
    resume: bool = False
    init: str | None = None
    smoke: bool = False

    @classmethod
    def preset(cls, given: Mapping[str, Plain]) -> Mapping[str, Plain]:
        """Of photos that are named by their folder alone."""
        return photos_preset(given)


DECODERS: Mapping[str, Mapping[str, Plain]] = {  # presets of the decoder, by the data
    "digits": {"decoder.width": 32, "decoder.depth": 1, "decoder.heads": 4, "decoder.mlp_ratio": 2.0},
    "": {"decoder.width": 96, "decoder.depth": 4, "decoder.heads": 3, "decoder.mlp_ratio": 4.0},
}


def resolve(config: PretrainConfig) -> PretrainConfig:
    """Every setting that is None filled from the presets of data and objective; `smoke` applied."""
    mae = config.objective == "mae"
    named = {"model.position": "rope", "model.pool": "avg"} if mae else {}
    preset = image_preset(config.data, config.model, config.augment, named)
    preset |= dict(DECODERS.get(config.data.source, DECODERS[""])) | {
        "mask_ratio": 0.75 if mae else 0.6,
        "norm_pix": mae,
    }
    config = filled(config, preset | {"optim.warmup_epochs": config.optim.warmup})
    return changed(config, image_smoke(config.data, config.optim)) if config.smoke else config
