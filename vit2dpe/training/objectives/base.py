"""The protocol of all objectives, and the one way to run them: check, data, model, task, fit, result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from torch import nn

from ...models.spec import ModelSpec
from ...spec import Plain
from ..log import Row
from ..session import Trainable, TrainSession, train_session
from ..task import Task

C = TypeVar("C", bound=Trainable)


class Prepared(NamedTuple):
    """What there is to train, once the data are read.

    Args:
        spec: the model.
        task: batches, loss and evaluation.
        data: name of the data.
        digest: sha256 of the data.
        amount: of model and data, printed behind the number of parameters.
        title: of summary.md.
        next_command: what to try after this run.
        results: lines to print, from the rows of `fit`; also writes what the objective leaves in the run folder.
        facts: more for env.json.
    """

    spec: ModelSpec
    task: Task
    data: str
    digest: str
    amount: str
    title: str
    next_command: str
    results: Callable[[list[Row]], list[str]]
    facts: Mapping[str, Plain] = {}


class Objective(ABC, Generic[C]):
    """One thing that can be trained: a subclass for images, masked images, and text.

    Args:
        config: settings; `check` fills in presets and refuses what cannot work.

    Raises:
        ConfigError: for what can be refused before data are read.
    """

    def __init__(self, config: C) -> None:
        self.config = self.check(config)

    @abstractmethod
    def check(self, config: C) -> C:
        """The settings with every preset filled in, after refusing all that can be refused before data are read."""

    @abstractmethod
    def prepare(self, session: TrainSession) -> Prepared:
        """Read the data; name model, task and results."""

    def initialize(self, model: nn.Module) -> None:
        """First weights, before those of `--init`; by default those that the constructor drew."""

    def adapt(self, model: nn.Module) -> None:
        """Changes to the built model that its state_dict does not show."""


def run(objective: Objective[C], command: str) -> Path:
    """Train and leave a run folder: config.yaml, env.json, metrics.csv, last/, best/, summary.md.

    Args:
        objective: what is trained.
        command: what was typed, for the record.

    Returns:
        the run folder.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is trained, for what cannot work.
        TrainingError: for what went wrong on the way.
        Stopped: after a signal, when everything is saved.
    """
    config = objective.config
    with train_session(config, command) as session:
        prepared = objective.prepare(session)
        model = session.build_model(prepared.spec, objective.initialize)
        objective.adapt(model)
        facts = session.record(prepared.data, prepared.digest, prepared.facts)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        session.say(
            f"{type(model).__name__} of {millions:.2f} M parameters{prepared.amount}; on {facts['hardware']}; "
            f"into {session.folder}"
        )
        rows = session.fit(model, prepared.task, prepared.spec, stop_after=2 if config.smoke else None)
        if session.world.first:
            results = prepared.results(rows)
            session.finish(prepared.title, rows, facts, results, prepared.next_command)
    return session.folder
