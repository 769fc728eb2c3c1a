"""Processes that make batches, each by its number, and hand them over in order.

Own processes rather than torch's DataLoader: that one passes file descriptors through a connection to the worker,
which waits for ever when the worker is stopped, and it cannot tell which worker failed at what. Here pixels and JPEGs
travel in anonymous shared memory that the workers inherit (so /dev/shm and its limits do not matter), everything else
in a pipe, and whoever waits also watches the process.
"""

import itertools
import mmap
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meru_fast.data.dataset import LocalBatch, TrainingSet
from meru_fast.data.errors import DataError
from meru_fast.tokenizer import PackedTokens

AHEAD = 2  # batches that each worker may have finished before they are asked for


@dataclass
class _Worker:
    """A worker process as its parent sees it."""

    index: int
    process: multiprocessing.Process
    pipe: Connection
    slots: list[Tensor]  # shared uint8 buffers
    beat: np.ndarray  # shared int64 (step, source, sample): what it is at


class Workers:
    """Batches `start, start + 1, ...` of a training set, made by worker processes.

    Args:
        dataset: what makes a batch.
        start: number of the first batch.
        num_workers: processes; 0 makes the batches when they are asked for.
        timeout: seconds without an awaited batch before its worker counts as stalled.
        pin: hand the batches over in pinned memory.
    """

    def __init__(self, dataset: TrainingSet, start: int, num_workers: int, timeout: float, pin: bool):
        self.dataset = dataset
        self.timeout = timeout
        self.pin = pin
        self._steps = itertools.count(start)
        if num_workers:
            dataset.warm_up()
        self._workers = [_start(dataset, index, start, num_workers) for index in range(num_workers)]
        self._ready: queue.Queue[LocalBatch | Exception] = queue.Queue(AHEAD)
        self._closing = threading.Event()
        self._receiver = threading.Thread(target=self._receive, name="meru-fast-receiver", daemon=True)
        if self._workers:
            self._receiver.start()  # after all workers are forked

    def pids(self) -> list[int]:
        """Process ids of the workers, by index."""
        return [worker.process.pid for worker in self._workers]

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        """The next batch.

        Raises:
            DataError: a worker died, stalled or failed; the message says which, and at which sample.
        """
        if not self._workers:
            batch = self.dataset[next(self._steps)]
            return batch.pin_memory() if self.pin else batch
        result = self._ready.get()
        if isinstance(result, Exception):
            self.close()
            raise result
        return result

    def close(self) -> None:
        """End all workers, also stopped ones."""
        self._closing.set()
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        if self._receiver.is_alive():
            with self._ready.mutex:
                self._ready.queue.clear()
                self._ready.not_full.notify_all()
            self._receiver.join()
        for worker in self._workers:
            worker.pipe.close()

    def _receive(self) -> None:
        """In a thread: take batches out of shared memory while the trainer is busy."""
        try:
            for step in self._steps:
                self._ready.put(self._take(self._workers[step % len(self._workers)]))
                if self._closing.is_set():
                    return
        except Exception as error:
            if not self._closing.is_set():
                self._ready.put(error)

    def _take(self, worker: _Worker) -> LocalBatch:
        """The next batch of this worker."""
        ready = wait([worker.pipe, worker.process.sentinel], self.timeout)
        if not ready:
            state = f"has delivered nothing for {self.timeout:g} s (slow or hanging storage?)"
            raise DataError(_describe(worker, self.dataset, state))
        try:
            message = worker.pipe.recv() if worker.pipe.poll() else None
        except (EOFError, OSError):
            message = None
        if message is None:
            raise DataError(_describe(worker, self.dataset, f"died ({_cause_of_death(worker.process)})"))
        if isinstance(message, Exception):
            raise message
        slot, batch = message
        batch = _unpack(batch, worker.slots[slot], self.pin)
        worker.pipe.send(slot)
        return batch


def _start(dataset: TrainingSet, index: int, start: int, num_workers: int) -> _Worker:
    context = multiprocessing.get_context("fork")
    local_batch = dataset.batch_size // dataset.world_size
    slots = [_shared(local_batch * 3 * dataset.image_size**2) for _ in range(AHEAD)]
    beat = _shared(24).numpy().view(np.int64)
    ours, theirs = context.Pipe()
    first = start + (index - start) % num_workers  # worker i makes the batches i, i + num_workers, ...
    steps = itertools.count(first, num_workers)
    process = context.Process(
        target=_work,
        args=(dataset, steps, theirs, slots, beat, os.getpid()),
        name=f"meru-fast-loader-{index}",
        daemon=True,
    )
    process.start()
    theirs.close()
    return _Worker(index, process, ours, slots, beat)


def _shared(size: int) -> Tensor:
    """uint8 [size] that a forked process shares."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def _work(
    dataset: TrainingSet,
    steps: Iterator[int],
    pipe: Connection,
    slots: list[Tensor],
    beat: np.ndarray,
    parent: int,
) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)

    def on_sample(step: int, source: int, sample: int) -> None:
        beat[:] = step, source, sample

    dataset.on_sample = on_sample
    for part in dataset.mixture:
        part.samples.reopen()
    free = list(range(len(slots)))
    for step in steps:
        try:
            batch = dataset[step]
        except Exception as error:
            pipe.send(error if isinstance(error, DataError) else DataError(traceback.format_exc()))
            return
        while not free or pipe.poll():
            while not pipe.poll(5):
                if os.getppid() != parent:
                    return  # the trainer was killed
            free.append(pipe.recv())
        slot = free.pop()
        pipe.send((slot, _pack(batch, slots[slot])))


def _pack(batch: LocalBatch, slot: Tensor) -> LocalBatch:
    """Put pixels and JPEGs into shared memory; what is left of the batch is small. JPEGs that do not fit stay in it."""
    pixels = batch.images.numel()
    slot[:pixels] = batch.images.view(-1)
    encoded = batch.encoded
    if encoded and pixels + len(encoded.data) <= len(slot):
        slot[pixels : pixels + len(encoded.data)] = encoded.data
        encoded = replace(encoded, data=None)
    tokens: Any = [tokens.numpy() for tokens in (batch.tokens.ids, batch.tokens.cu_seqlens)]
    return replace(batch, images=tuple(batch.images.shape), tokens=tokens, encoded=encoded)


def _unpack(batch: LocalBatch, slot: Tensor, pin: bool) -> LocalBatch:
    """Undo `_pack`, with memory of its own: the slot is used again."""
    shape: Any = batch.images
    pixels = int(np.prod(shape))
    encoded = batch.encoded
    if encoded and encoded.data is None:
        encoded = replace(encoded, data=slot[pixels : pixels + sum(encoded.sizes)].clone())
    images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
    images.view(-1).copy_(slot[:pixels])
    ids, starts = (torch.from_numpy(part) for part in batch.tokens)
    tokens = PackedTokens(ids, starts)
    return replace(batch, images=images, tokens=tokens.pin_memory() if pin else tokens, encoded=encoded)


def _describe(worker: _Worker, dataset: TrainingSet, state: str) -> str:
    step, source, sample = worker.beat.tolist()
    shard, key = dataset.mixture[source].samples.name(sample)
    return (
        f"loader worker {worker.index} (pid {worker.process.pid}) {state}; "
        f"it was at step {step}, sample {key} of {shard}"
    )


def _cause_of_death(process: multiprocessing.Process) -> str:
    process.join(5)
    code = process.exitcode
    if code is None or code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps the system ran out of memory" if name == "SIGKILL" else name
