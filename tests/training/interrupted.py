"""Trainings that are stopped, saved or killed after a given number of updates."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

from vit2dpe.training.engine import Trainer


class Killed(Exception):
    """As if the process had ended here."""


@contextmanager
def after_updates(actions: Mapping[int, Callable[[Trainer], object]]) -> Iterator[None]:
    """Within, `actions[n](trainer)` is called once the n-th update of a training is done and reported."""
    report = Trainer._report

    def report_and_act(trainer: Trainer, epoch: int) -> None:
        report(trainer, epoch)
        if action := actions.get(trainer.state.step):
            action(trainer)

    with mock.patch.object(Trainer, "_report", report_and_act):
        yield


def die(trainer: Trainer) -> None:
    raise Killed
