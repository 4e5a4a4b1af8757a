"""Settings of exchanging a trained model's encoding; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..data.settings import DataConfig, ViewConfig, count_files
from ..ranges import Positive
from ..spec import Plain, Settings, Sizes, Words
from .settings import MANY, OptimConfig, RunConfig, photos_preset

UPDATES = 200  # of few photos; of many images one epoch is more


@dataclass(frozen=True)
class SwapConfig(Settings):
    """Exchange the encoding of a trained model, and recover it from images without labels.

    The old model at its own size teaches; the same weights with the other encoding learn at several sizes.

    Args:
        init: the trained model: a name of timm (its weights), a run folder, or a file.
        to: the other encoding: a word such as rope, or a sum. Of terms that the model has already the weights stay.
        data: the images; labels are not used for learning, and one folder of images, or any tree of them, is enough.
        augment: random views of the images, the same for both models.
        optim: optimizer and schedule.
        run: where and how it runs.
        sizes: comma-separated sizes that the new model learns at, of which each step draws one; a size may stand there
            more than once; default the model's own for five steps of six, twice its sides for the others.
        measure: comma-separated sizes to measure at; default 1, 1.5, 2, 3 and 4 times the sides of the model's own.
        policies: comma-separated resolution policies to measure under; "all" that a model can take, or "default".
        temperature: of both models' answers in the loss.
        resume: go on from run.out/last, if it is there.
        smoke: two steps on the CPU, to see that everything runs.
    """

    init: str | None = None
    to: str = ""
    data: DataConfig = DataConfig()
    augment: ViewConfig = ViewConfig()  # noqa: RUF009
    optim: OptimConfig = OptimConfig(lr=1e-3, position_lr=10, epochs=1)  # noqa: RUF009
    run: RunConfig = RunConfig(out="runs/swap")  # noqa: RUF009
    sizes: Sizes | None = None
    measure: Sizes | None = None
    policies: Words = ("all",)
    temperature: Positive = 1.0
    resume: bool = False
    smoke: bool = False

    @classmethod
    def preset(cls, given: Mapping[str, Plain]) -> Mapping[str, Plain]:
        """Of photos that are named by their folder alone: small batches, and epochs for some hundred updates. Of many
        images 1,000 are measured on: at four times the side that takes as long as the exchange."""
        preset: dict[str, Plain] = {"data.limit_test": 1000} | photos_preset(given)
        images = count_files(str(given["data.root"])) * 4 // 5 if "optim.batch_size" in preset else 0
        if not 0 < images <= MANY:
            return preset
        batch = int(str(given.get("optim.batch_size") or preset["optim.batch_size"]))
        return preset | {"optim.epochs": math.ceil(UPDATES * batch / images)}
