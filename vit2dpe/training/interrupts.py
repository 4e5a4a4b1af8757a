"""SIGTERM and Ctrl-C: the first asks the training to finish its step and save, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from types import FrameType

from ..errors import Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Interrupts:
    """A context in which signals are only noted; `asked` is the number of the first, 0 before.

    While `at_once` is set, as in an evaluation, which changes nothing and may take long, a signal raises Stopped.
    """

    def __init__(self, listen: bool = True) -> None:
        self.asked = 0
        self.at_once = False
        self.listen = listen and threading.current_thread() is threading.main_thread()
        self.restore = ExitStack()

    def __enter__(self) -> Interrupts:
        if self.listen:
            for number in SIGNALS:
                self.restore.callback(signal.signal, number, signal.signal(number, self._ask))
        return self

    def __exit__(self, *_: object) -> None:
        self.restore.close()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = number
        if self.at_once:
            raise Stopped(128 + number)
