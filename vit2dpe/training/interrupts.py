"""SIGTERM and Ctrl-C: after the first a training finishes its step and saves, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from types import FrameType

from ..errors import Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Interrupts:
    """A context in which signals are only noted; `received` is the number of the first, 0 before.

    While `at_once` is set, as in an evaluation, which changes nothing and may take long, a signal raises Stopped.
    """

    def __init__(self, listen: bool = True) -> None:
        self.received = 0
        self.at_once = False
        self.listen = listen and threading.current_thread() is threading.main_thread()
        self.restore = ExitStack()

    def __enter__(self) -> Interrupts:
        if self.listen:
            for number in SIGNALS:
                self.restore.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self.restore.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        if self.at_once:
            raise Stopped(128 + number)
