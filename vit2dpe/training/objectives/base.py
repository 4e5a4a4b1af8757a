"""The protocol of all objectives, and the one way to run them: check, data, model, task, fit, results.

An objective is a function `prepare(config, session)` that reads the data and returns a `Prepared`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import nn

from ...models.spec import ModelSpec
from ...spec import Plain
from ..engine import fit
from ..initial_weights import Loaded
from ..log import Row
from ..run_folder import environment, write_facts, write_summary
from ..session import Trainable, TrainSession, train_session
from ..task import Batch, Task

C = TypeVar("C", bound=Trainable)


def keep(model: nn.Module) -> None:
    """Leave a model as its constructor made it."""


class Prepared(NamedTuple):
    """What there is to train, once the data are read.

    Args:
        spec: the model.
        task: batches, loss and evaluation.
        data, digest: name and sha256 of the data.
        amount: of model and data, printed behind the number of parameters.
        title: of summary.md.
        next_command: what to try after this run.
        results: lines to print, from the rows of `fit`; also writes what the objective adds to the run folder.
        together: what all processes work out together after training; lines to print behind the results.
        summary: lines for summary.md, behind the table of its epochs.
        facts: more for env.json.
        initialize: draws first weights, before those of `--init` are loaded.
        begin: loads those into the model; default `load_weights`.
        adapt: changes the model in what its state_dict does not hold.
        config: settings that were open until the data were read, for config.yaml; default those of the command.
    """

    spec: ModelSpec
    task: Task[Batch]
    data: str
    digest: str
    amount: str
    title: str
    next_command: str
    results: Callable[[list[Row]], list[str]]
    together: Callable[[], list[str]] = list
    summary: Callable[[], list[str]] = list
    facts: Mapping[str, Plain] = {}
    initialize: Callable[[nn.Module], None] = keep
    begin: Callable[[nn.Module], Loaded] | None = None
    adapt: Callable[[nn.Module], None] = keep
    config: Trainable | None = None


def run(config: C, command: str, prepare: Callable[[C, TrainSession], Prepared]) -> Path:
    """Train and leave a run folder: config.yaml, env.json, metrics.csv, last/, best/, summary.md.

    Args:
        config: settings, checked, with every preset filled in.
        command: what was typed, for the record.
        prepare: the objective.

    Returns:
        the run folder.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is trained, for what cannot work.
        TrainingError: for what went wrong on the way.
        Stopped: after a signal, when everything is saved.
    """
    with train_session(config, command) as session:
        prepared = prepare(config, session)
        session.world.wait()  # one of them may have downloaded, unpacked or decoded for all
        model = session.build_model(prepared.spec, prepared.initialize, prepared.begin)
        prepared.adapt(model)
        folder, first = session.folder, session.world.first
        facts = environment(command, session.device, prepared.data, prepared.digest) | dict(prepared.facts)
        if first:
            write_facts(folder, prepared.config or config, facts)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        session.print(
            f"{type(model).__name__} of {millions:.2f} M parameters{prepared.amount}; on {facts['hardware']}; "
            f"into {folder}"
        )
        rows = fit(
            model,
            prepared.task,
            config.optim,
            replace(config.run, device=str(session.device)),
            folder=folder,
            spec=prepared.spec,
            resume=config.resume,
            world=session.world,
            about=dict(command=command),
            stop_after=2 if config.smoke else None,
        )
        together = prepared.together()
        if first:
            *lines, last = [*prepared.results(rows), *together]
            write_summary(folder, prepared.title, rows, facts, prepared.next_command, prepared.summary())
            for line in [*lines, f"{last}; summary {folder / 'summary.md'}", f"next     {prepared.next_command}"]:
                session.print(line)
    return folder
