"""What every training command does around `fit`: device, processes, run folder, first weights, records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from ..errors import ConfigError
from ..models.spec import ModelSpec
from ..seeding import derive_seed
from .devices import pick_device, precision, threads
from .distributed import World, local_device, process_group
from .freezing import frozen_parameters
from .initial_weights import Loaded, load_weights
from .pretrain_settings import PretrainConfig
from .run_folder import changed_settings, printable, run_folder
from .settings import TrainConfig, check_numbers
from .swap_settings import SwapConfig
from .text_settings import TextTrainConfig

Trainable = TrainConfig | PretrainConfig | TextTrainConfig | SwapConfig


class Where(TypedDict):
    """Seed of a task, where its batches go, and its process among others."""

    seed: int
    device: torch.device
    world: World


@dataclass(frozen=True)
class TrainSession:
    """A running training command.

    Args:
        config: its settings.
        command: what was typed, for the record.
        device: of this process.
        world: the processes that train together.
        folder: the run folder, locked for this command.
    """

    config: Trainable
    command: str
    device: torch.device
    world: World
    folder: Path

    @property
    def where(self) -> Where:
        """Arguments of every task."""
        return Where(seed=self.config.run.seed, device=self.device, world=self.world)

    def print(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.world.first:
            print(printable(text), flush=True)

    def build_model(
        self,
        spec: ModelSpec,
        initialize: Callable[[nn.Module], None],
        begin: Callable[[nn.Module], Loaded] | None = None,
    ) -> nn.Module:
        """The model with its first weights: drawn by the seed, then those of `--init`, unless a run is resumed.

        Args:
            initialize: draws.
            begin: loads; default `load_weights`.
        """
        torch.manual_seed(derive_seed(self.config.run.seed, "init"))
        model = spec.build()
        initialize(model)
        if self.config.init is not None and not (self.config.resume and (self.folder / "last").is_dir()):
            loaded = load_weights(model, self.config.init) if begin is None else begin(model)
            self.print(f"{self.config.init}: {loaded}")
            held = set(frozen_parameters(model, self.config.optim.freeze))
            if drawn := [name for name in loaded.left if name in held and "norm" not in name]:
                raise ConfigError(
                    f"optim.freeze {self.config.optim.freeze} would leave what was drawn anew untrained: "
                    f"{', '.join(drawn[:3])}{f' and {len(drawn) - 3} more' if len(drawn) > 3 else ''}; freeze fewer "
                    "blocks, or keep the encoding of the weights"
                )
        return model


def check_run(config: Trainable) -> None:
    """What any training can be refused for before data are read: numbers, device, precision, first weights.

    Raises:
        ConfigError: naming the setting, what it must be and what came.
    """
    check_numbers(config.optim)
    if config.optim.freeze and config.init is None:
        raise ConfigError("optim.freeze keeps weights that were trained before: --init names them")
    precision(config.run.precision, pick_device(local_device(config.run.device)))
    if config.init is not None and not isinstance(config, TrainConfig) and not Path(config.init).expanduser().exists():
        raise ConfigError(f"there is nothing at {config.init} to start from")


@contextmanager
def train_session(config: Trainable, command: str) -> Iterator[TrainSession]:
    """Join the processes, lock the run folder, and print what should be known before anything is read.

    Inside, torch has `run.threads` threads; afterwards as many as before.
    """
    device = pick_device(local_device(config.run.device))
    with (
        threads(config.run.threads),
        process_group(device, None, config.run.wait_minutes, compiled=bool(config.run.compile)) as world,
        run_folder(config.run.out, resume=config.resume, world=world) as folder,
    ):
        session = TrainSession(config, command, device, world, folder)
        if config.run.device == "auto" and device.type == "cpu":
            session.print("note: no GPU was found: training on the CPU")
        for change in changed_settings(folder, config) if config.resume and world.first else []:
            session.print(f"note: {change}")
        yield session
