"""The resolution study: train on images of one size, measure at others, by `vit2dpe.resolution.sweep`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.datasets import Images, load_fitted
from ..models.spec import ModelSpec
from ..resolution.apply import policies_of
from ..resolution.sweep import MODES, sweep, table_size_of
from ..spec import Plain, Size
from ..training.by_class import rows_of, write_classes
from ..training.devices import pick_device
from ..training.initial_weights import load_weights
from ..training.objectives.images import as_weights
from ..training.settings import drop_last
from ..training.task import Task
from ..training.tasks.classification import ImageTask, evaluation_batches
from ..training.varied import augmented, vary
from .answers import Right
from .from_weights import at_hand
from .plan import Plan, Trial
from .rows import Row
from .tables import AT_HAND, FIT, MAJORITY, START
from .trials import Measure, build, digest_of, policies_for, train

KEPT_BYTES = 2**30  # of test images on a GPU


@dataclass(frozen=True, kw_only=True)
class OverSizes(Measure):
    """Top-1 accuracy over image sizes."""

    data: Images

    @classmethod
    def load(cls, plan: Plan) -> OverSizes:
        """Read the images and print what is noteworthy about them."""
        config = plan.config
        data, fitted = load_fitted(config.data, 0, lambda _: (plan.train_size, *plan.sizes))
        for note in data.notes:
            print(f"note: {note}")
        if plan.start is not None:
            data = as_weights(plan.start, data, print)
        counts = f"{len(data.train)} training and {len(data.test)} test images, {len(data.classes)} classes"
        print(f"{counts}; results in {config.run.out}")
        majority = round(100 * float(data.test.labels.bincount().max()) / len(data.test), 2)
        facts: dict[str, Plain] = {"images": data.used, MAJORITY: majority}
        if plan.start is not None:
            facts[START] = str(plan.start)
            print(f"from {plan.start}")
        elif found := at_hand(Path(config.run.out), config.data.root):
            facts[AT_HAND] = found
        if fitted is not None:
            facts[FIT] = config.data.fit
        return cls(
            plan=plan,
            data=data,
            source=(config.data.source, data.digest),
            files=data.digest_of_files,
            classes=len(data.classes),
            channels=len(data.mean),
            facts=facts,
            about=data.about | dict(train_size=list(plan.train_size)),
            unreadable=data.unreadable,
        )

    def task(self, seed: int) -> Task:
        config = self.plan.config
        return ImageTask(
            self.data,
            self.plan.train_size,
            config.optim.batch_size,
            seed=seed,
            device=pick_device(config.run.device),
            augment=config.augment,
            workers=config.data.workers,
            balanced=config.data.balanced,
            drop_last=drop_last(config.optim, config.run),
        )

    def write_classes(self, path: Path, rows: Sequence[Row], answers: Sequence[Right]) -> None:
        labels, count = self.data.test.labels, len(self.data.classes)
        names = ("policy", "temperature", "mode", "seed", "height", "width")
        found = []
        for row, right in zip(rows, answers, strict=True):
            if right is not None:
                counts = torch.stack([part.bincount(minlength=count) for part in (labels, labels[right])])
                what = {"encoding": row.label} | {name: getattr(row, name) for name in names}
                found.append((what, rows_of(counts, self.data.classes)))
        write_classes(path, found)

    def varied(self, trial: Trial, spec: ModelSpec) -> OverSizes:
        config = self.plan.config
        augment = augmented(config.augment, trial.training, self.plan.train_size, spec)
        return replace(self, plan=replace(self.plan, config=replace(config, augment=augment)))

    def as_trained(self, about: Mapping[str, object]) -> OverSizes:
        return replace(self, data=self.data.as_recorded(about))

    def digest(self) -> str:
        plan, config = self.plan, self.plan.config
        measured = (plan.train_size, plan.sizes, config.modes, config.policies, config.temperatures)
        return digest_of((*measured, config.finetune) if config.finetune else measured)

    def rows(self, model: nn.Module, trial: Trial, folder: Path) -> list[tuple[Row, Right]]:
        plan = self.plan
        policies, rows = policies_for(plan, model), list[tuple[Row, Right]]()
        if trial.training == "subtable":  # what such a model does by itself, up to the size of its table
            high, wide = table_size_of(model)
            within = [(height, width) for height, width in plan.sizes if height <= high and width <= wide]
            rows = self._sweep(model, trial, within, ["subtable"])
            policies = [policy for policy in policies if policy not in ("default", "subtable")]
        rows += self._sweep(model, trial, plan.sizes, policies) if policies else []
        if plan.config.finetune:
            for size in plan.sizes:
                rows += [] if size == plan.train_size else self._finetuned(trial, folder, size)
        return rows

    def _sweep(
        self, model: nn.Module, trial: Trial, sizes: Sequence[Size], policies: Sequence[str]
    ) -> list[tuple[Row, Right]]:
        plan = self.plan
        right: list[Tensor] = []
        measured = sweep(
            model,
            TestBatches(self.data, _batch(plan), pick_device(plan.config.run.device)),
            sizes,
            policies,
            modes=plan.config.modes,
            temperatures=plan.config.temperatures,
            train_size=plan.train_size,
            right=right,
        )
        rows = [Row(encoding=trial.encoding, seed=trial.seed, value=row["top1"], **row) for row in measured]
        return list(zip(rows, right, strict=True))

    def _finetuned(self, trial: Trial, trained: Path, size: Size) -> list[tuple[Row, Right]]:
        """The trained model after `finetune` epochs at another size, as a row of policy "finetuned".

        A tenth of the learning rate, falling from the first step. The idea is FixRes, arXiv 1906.06423; how ours
        differs: all weights are finetuned, not the last layers alone, and the augmentation stays that of training.
        """
        config = replace(self.plan.config, modes=MODES[:1], temperatures=("none",))
        at_size = replace(self, plan=replace(self.plan, config=config, train_size=size))
        model, spec = build(at_size, trial)
        load_weights(model, trained)
        vary(model, trial.training)
        optim = replace(self.plan.optim(trial), lr=config.optim.lr / 10, epochs=config.finetune, warmup_epochs=0)
        train(model, at_size.varied(trial, spec), trial.seed, optim, trained / f"finetuned-{size[0]}x{size[1]}")
        rows = at_size._sweep(model, trial, [size], policies_of(model)[:1])
        height, width = self.plan.train_size
        return [(replace(row, policy="finetuned", train_height=height, train_width=width), r) for row, r in rows]


class TestBatches:
    """Test batches at native size, iterated as often as the sweep has rows; on a GPU a GiB of them at most stays."""

    def __init__(self, data: Images, size: int, device: torch.device) -> None:
        self.data, self.size, self.device = data, size, device
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.kept:
            yield from self.kept
            return
        rows, columns = self.data.test.size
        small = 4 * len(self.data.test) * len(self.data.mean) * rows * columns <= KEPT_BYTES
        kept = []
        for batch in evaluation_batches(self.data, batch=self.size, device=self.device):
            if small and self.device.type != "cpu":
                kept.append(batch)
            yield batch
        self.kept = kept


def _batch(plan: Plan) -> int:
    """Test images at a time: fewer where a map of attention is larger than that of 576 tokens."""
    patch = plan.config.model.patch or 16
    tokens = max(height * width for height, width in plan.sizes) // patch**2
    return max(4, min(256, 256 * 576**2 // max(1, tokens) ** 2))
