"""Ends a process that makes no progress, with the stacks of all its threads."""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

#: Exit status of a process that its watchdog killed.
EXIT_STATUS = 86


class Watchdog:
    """A thread that kills this process if :meth:`beat` is not called for `seconds`.

    A rank that waits for a hung one stands still as well, so that every rank prints where it is. The launcher sees the
    exit status and stops the rest; nothing is asked of the hung code.

    Args:
        seconds: patience; 0 starts no thread.
        stacks: file that gets the stacks too.
    """

    def __init__(self, seconds: float, stacks: Path):
        self.seconds, self.stacks = seconds, stacks
        self._last = time.monotonic()
        self._doing = "starting"
        self._paused = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def beat(self, doing: str) -> None:
        """Progress: from now on this process is `doing` something."""
        self._last, self._doing = time.monotonic(), doing

    @contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """For work of unknown length, such as an evaluation."""
        self._paused += 1
        self._doing = doing
        try:
            yield
        finally:
            self._paused -= 1
            self.beat(f"after {doing}")

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            idle = time.monotonic() - self._last
            if not self._paused and idle > self.seconds:
                self._kill(idle)

    def _kill(self, idle: float) -> None:
        message = (
            f"no progress for {idle:.0f} s while {self._doing} (train.watchdog_seconds={self.seconds:g}): "
            f"stacks of all threads follow and in {self.stacks}; this process ends with status {EXIT_STATUS}"
        )
        try:
            log.critical(message)
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
            with self.stacks.open("a", encoding="utf-8") as file:
                file.write(message + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        finally:  # also if the disk is full
            os._exit(EXIT_STATUS)
