"""Processes for long work on many files."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from meru_fast.data.errors import DataError


@contextmanager
def process_pool(workers: int | None, prepare: Callable | None = None, *args: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with this one, however it ends; what is not begun when the block ends is dropped.

    Args:
        workers: processes; default one per core.
        prepare: called with `args` in each of them first.

    Raises:
        DataError: one of them was killed.
    """
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(prepare, *args)) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for want of memory: start again, with fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(prepare: Callable | None, *args: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare:
        prepare(*args)


def _end_with_parent() -> None:
    """Else a worker of a killed process waits for its next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
