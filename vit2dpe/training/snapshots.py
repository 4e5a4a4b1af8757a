"""Checkpoints of a training: weights, the optimizer's state, progress. A resumed training gives the same bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..data.identity import FILES, same_data
from ..errors import CheckpointError
from ..models.spec import ModelSpec
from ..spec import Plain
from .checkpoint import read_meta, read_tensors, write_checkpoint
from .distributed import World, shard_like
from .optimizer import load_optimizer, optimizer_state
from .writer import HostCopies, Writer

Tree: TypeAlias = "Plain | Tensor | Sequence[Tree] | Mapping[str, Tree]"


@dataclass
class TrainingState:
    """Progress of a training: what its checkpoint holds beside tensors."""

    epoch: int = 0  # epochs that are finished and evaluated
    step: int = 0  # updates
    count: int = 0  # items of this epoch so far, and sums over them
    sums: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    best: float | None = None
    best_epoch: int = 0
    bad: int = 0  # losses in a row that were not finite
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the first process; 0 in what older versions wrote
    shift: int = 0  # `step` less the place in the schedule: not 0 where a part before had other steps
    batch_size: int = 0  # that `step` was counted with, and steps of an epoch; 0 in what older versions wrote
    steps_per_epoch: int = 0

    @property
    def place(self) -> int:
        """Updates of the present size that the epochs so far, and the part of this one, are worth."""
        return self.step - self.shift

    def count_in(self, steps_per_epoch: int, batch_size: int) -> None:
        """Go on with other steps: `place` is where as many samples have been seen, rounded down within an epoch.

        Finished epochs stay finished, and `step` goes on counting updates. Where the same batches are cut into more or
        fewer steps an epoch, those of this epoch that were trained are not trained again.

        Raises:
            CheckpointError: if an older version wrote the state, and does not say how many steps an epoch had.
        """
        within = self.place - self.epoch * (self.steps_per_epoch or steps_per_epoch)
        known = self.steps_per_epoch > 0 or self.batch_size in (0, batch_size)
        if not known or not 0 <= within <= (self.steps_per_epoch or steps_per_epoch):
            raise CheckpointError(
                f"the run stopped at step {self.step}, in epoch {self.epoch + 1}, with optim.batch_size "
                f"{self.batch_size or 'unknown'}; how many steps an epoch had was not written then, and here it has "
                f"{steps_per_epoch} of {batch_size} samples: resume with the batch size and steps of before, or start "
                "another run from its weights with --init"
            )
        if self.batch_size not in (0, batch_size):
            whole = within == self.steps_per_epoch
            within = steps_per_epoch if whole else within * self.batch_size // batch_size
        self.shift = self.step - self.epoch * steps_per_epoch - min(within, steps_per_epoch)
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch


@dataclass(frozen=True)
class Snapshots:
    """Writes `last/` and `best/` of a run, and restores a training from `last/`.

    Args:
        folder: of the run.
        spec: how to build the model again; None: nothing is written.
        model: the weights that are trained.
        averaged: their running average, or None.
        optimizer, scaler: what resuming needs beside them.
        world: this process among how many.
        writer: of the files, on the first process; a context that the training is run in.
    """

    folder: Path
    spec: ModelSpec | None
    model: nn.Module
    averaged: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    world: World
    writer: Writer = field(default_factory=Writer)

    def save(self, names: Sequence[str], state: TrainingState, about: Mapping[str, Plain]) -> None:
        """Write `folder/name` for each name, beside the training that goes on: what is written is what is there now.

        Their `model` are the weights that are evaluated: the averaged ones, if they are kept.

        Args:
            names: last, which a training can go on from, and best.
            state: its progress.
            about: further metadata.

        Raises:
            TrainingError: if the save before could not be written.
        """
        if self.spec is None:
            return
        copies = HostCopies()
        model = _tensors(self.model if self.averaged is None else self.averaged, copies)
        files = {name: {"model": model} for name in names}
        progress: dict[str, Plain] = {}
        if "last" in names:
            if self.averaged is not None:
                files["last"]["raw"] = _tensors(self.model, copies)
            moments = files["last"]["optimizer"] = {}
            progress = asdict(state)
            progress["optimizer"] = flatten(optimizer_state(self.model, self.optimizer, copies), moments)
            progress["scaler"] = self.scaler.state_dict()
        if self.world.first:
            copies.seal(next(self.model.parameters()).device)
            grid = getattr(self.model, "train_grid", None)
            self.writer.start(lambda: self._write(copies, files, grid, progress, dict(about)))
        self.world.wait()  # a slow disk is no reason to lose the others

    def _write(
        self,
        copies: HostCopies,
        files: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
        grid: Sequence[int] | None,
        progress: Plain,
        about: Mapping[str, Plain],
    ) -> None:
        if self.spec is None:
            return
        copies.wait()
        for name, tensors in files.items():
            write_checkpoint(
                self.folder / name,
                self.spec,
                tensors,
                grid=grid,
                weights="trained" if self.averaged is None else "averaged",
                state=progress if name == "last" else {},
                **about,
            )

    def finish(self) -> None:
        """Wait until all is written, on every rank.

        Raises:
            TrainingError: if it could not be.
        """
        self.writer.wait()
        self.world.wait()

    def load(self, about: Mapping[str, Plain]) -> TrainingState:
        """Restore weights and optimizer from `last`, on any number of processes.

        Args:
            about: of the task; its record of the data is compared, where it has one.

        Raises:
            CheckpointError: if it is of another model, of other data, or holds no state of a training.
        """
        folder = self.folder / "last"
        meta = read_meta(folder)
        arguments = None if self.spec is None else json.loads(json.dumps(self.spec.arguments))  # tuples as lists
        if self.spec is not None and (meta["model"], meta["arguments"]) != (self.spec.kind, arguments):
            raise CheckpointError(
                f"{folder} is a run of another model, {meta['model']} {meta['arguments']}; this one is "
                f"{self.spec.kind} {self.spec.arguments}: give another --run.out, or "
                f"--init {folder} to start from its weights"
            )
        if not same_data(meta, about):
            raise CheckpointError(
                f"{folder} was trained on other data ({meta.get('digest')}, here {about.get('digest')})"
                + (
                    "; an older version wrote it, and what it had in memory is compared with --data.cache memory"
                    if FILES in about and FILES not in meta
                    else ""
                )
            )
        if "state" not in meta or "optimizer" not in meta["files"]:
            raise CheckpointError(f"{folder} holds a model but no state of its training: --init takes its weights")
        if (self.averaged is not None) != ("raw" in meta["files"]):
            raise CheckpointError(
                f"{folder} was trained {'with' if self.averaged is None else 'without'} --optim.ema; resume likewise"
            )
        tensors = read_tensors(folder, meta, "model")
        if self.averaged is not None:
            _load(self.averaged, tensors)
            tensors = read_tensors(folder, meta, "raw")
        _load(self.model, tensors)
        state = dict(meta["state"])
        moments = unflatten(state.pop("optimizer"), read_tensors(folder, meta, "optimizer"))
        load_optimizer(self.model, self.optimizer, moments)
        self.scaler.load_state_dict(state.pop("scaler"))
        if "batch_size" not in state:  # an older version's: its settings say it
            optim = meta.get("optim")
            state["batch_size"] = optim.get("batch_size", 0) if isinstance(optim, dict) else 0
        return TrainingState(**state)


def flatten(tree: Tree, tensors: dict[str, Tensor], name: str = "") -> Plain:
    """Nested dicts, lists and numbers as JSON; tensors are moved to `tensors` under names that the JSON refers to."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"items": [[key, flatten(value, tensors, f"{name}/{key}")] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [flatten(value, tensors, f"{name}/{i}") for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise CheckpointError(f"the state of the training holds {name} of type {type(tree).__name__}: it cannot be saved")


def unflatten(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "items" in node:
        return {key: unflatten(value, tensors) for key, value in node["items"]}
    return [unflatten(value, tensors) for value in node["list"]]


def _tensors(model: nn.Module, copies: HostCopies) -> dict[str, Tensor]:
    return {name: copies(value) for name, value in model.state_dict().items()}


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    other = sorted(name for name in own.keys() ^ tensors.keys() if not name.endswith("_extra_state"))
    if other:
        raise CheckpointError(f"the checkpoint has other parameters: {other[:5]}")
    # In the model's order, the same on every rank: distributing a tensor is a collective.
    model.load_state_dict({name: shard_like(tensors[name], own[name]) for name in own if name in tensors})
