"""Settings of `vit2dpe probe`."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import Settings


@dataclass(frozen=True)
class ProbeConfig(Settings):
    """Measure what the frozen features of a run are worth: a linear classifier and k nearest neighbours on them.

    Args:
        run: folder of the run, of `vit2dpe pretrain` or `vit2dpe train`.
        which: last or best.
        pool: avg (mean over patches), token (the class token) or both; default avg.
        k: neighbours.
        data: other data than the run's; where it is null, the run's, and what is null of the next three is too.
        root: where they lie.
        limit_train: use only so many training images, balanced over classes.
        limit_test: use only so many test images, balanced over classes.
        device: auto, cpu, cuda, cuda:1, mps.
        threads: CPU threads; default torch's own choice.
    """

    run: str | None = None
    which: str = "last"
    pool: str | None = None
    k: int = 20
    data: str | None = None
    root: str | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    device: str = "auto"
    threads: int | None = None
