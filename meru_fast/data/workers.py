"""Processes that make batches, each by its number, and hand them over in order.

Own processes rather than torch's DataLoader: that one passes file descriptors through a connection to the worker,
which waits for ever when the worker is stopped, and it cannot tell which worker failed at what. Here pixels and JPEGs
travel in anonymous shared memory that the workers inherit (so /dev/shm and its limits do not matter), everything else
in a pipe, and whoever waits also watches the process.
"""

import contextlib
import itertools
import mmap
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meru_fast.data.dataset import Encoded, LocalBatch, TrainingSet
from meru_fast.data.errors import DataError
from meru_fast.tokenizer import PackedTokens

ORPHAN_CHECK = 5.0  # seconds between looks at whether the trainer still lives, while there is nothing to do
JOIN_SECONDS = 5.0  # for a killed process to be gone; one in a read that hangs in the kernel may take for ever
AHEAD = 2  # batches that each worker may have finished before they are asked for


@dataclass
class _Worker:
    """A worker process as its parent sees it."""

    index: int
    process: BaseProcess
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
        self._due = start  # the batch that the receiver waits for
        if num_workers:
            dataset.warm_up()
        self._workers: list[_Worker] = []
        for index in range(num_workers):
            self._workers.append(_start(dataset, index, start, num_workers, [w.pipe for w in self._workers]))
        # Also at the end of the interpreter, before multiprocessing waits for its children there.
        self._kill = Finalize(self, _kill, ([worker.process for worker in self._workers],), exitpriority=10)
        self._ready: queue.Queue[LocalBatch | Exception] = queue.Queue(AHEAD)
        self._closing = threading.Event()
        self._receiver = threading.Thread(target=self._receive, name="meru-fast-receiver", daemon=True)
        if self._workers:
            self._receiver.start()  # after all workers are forked

    def pids(self) -> list[int]:
        """Process ids of the workers, by index."""
        return [worker.process.pid or 0 for worker in self._workers]

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
        result = self._awaited()
        if isinstance(result, Exception):
            self.close()
            raise result
        return result

    def _awaited(self) -> LocalBatch | Exception:
        """What the receiver hands over. It tells of stalled workers, unless it hangs itself, in half a message."""
        try:
            return self._ready.get(timeout=self.timeout + JOIN_SECONDS)
        except queue.Empty:
            worker = self._workers[self._due % len(self._workers)]
            return DataError(_describe(worker, self.dataset, f"has been silent for {self.timeout:g} s in mid-batch"))

    def close(self) -> None:
        """End all workers, also stopped ones."""
        self._closing.set()
        self._kill()
        # The garbage collector may run this in the receiver itself, perhaps while that holds the queue's lock; and the
        # interpreter's end freezes the receiver, so that Python 3.13 would wait for it for ever.
        if self._receiver.is_alive() and threading.current_thread() is not self._receiver and not sys.is_finalizing():
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
                self._due = step
                self._hand_over(self._take(self._workers[step % len(self._workers)]))
                if self._closing.is_set():
                    return
        except Exception as error:
            self._hand_over(error)

    def _hand_over(self, result: LocalBatch | Exception) -> None:
        """Wait for room in the queue, as long as anybody wants what is in it."""
        while not self._closing.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(result, timeout=1)
                return

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
        batch = _unpack(message, worker.slots[message.slot], self.pin)
        with contextlib.suppress(ConnectionError):  # a worker that died since is found out when its next batch is due
            worker.pipe.send(message.slot)
        return batch


def _start(dataset: TrainingSet, index: int, start: int, num_workers: int, others: list[Connection]) -> _Worker:
    """Fork a worker; `others` are our ends of the pipes to those before it."""
    context = multiprocessing.get_context("fork")
    local_batch = dataset.batch_size // dataset.world_size
    slots = [_shared(local_batch * 3 * dataset.image_size**2) for _ in range(AHEAD)]
    beat = _shared(24).numpy().view(np.int64)
    ours, theirs = context.Pipe()
    first = start + (index - start) % num_workers  # worker i makes the batches i, i + num_workers, ...
    steps = itertools.count(first, num_workers)
    process = context.Process(
        target=_work,
        args=(dataset, steps, theirs, [*others, ours], slots, beat, os.getpid()),
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
    inherited: list[Connection],
    slots: list[Tensor],
    beat: np.ndarray,
    parent: int,
) -> None:
    """The life of a worker. It ends when its parent kills it, or when its parent is gone."""
    for end in inherited:  # else a worker that waits to send never learns that the parent is gone
        end.close()
    # Ctrl-C and the scheduler's warning are the trainer's to handle: it still wants batches for its last steps.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)

    def on_sample(step: int, source: int, sample: int) -> None:
        beat[:] = step, source, sample

    dataset.on_sample = on_sample
    for part in dataset.mixture:
        part.samples.reopen()
    free = list(range(len(slots)))
    with contextlib.suppress(EOFError, ConnectionError):
        for step in steps:
            try:
                batch = dataset[step]
            except Exception as error:
                pipe.send(error if isinstance(error, DataError) else DataError(traceback.format_exc()))
                return
            while not free or pipe.poll():
                while not pipe.poll(ORPHAN_CHECK):
                    if os.getppid() != parent:
                        return
                free.append(pipe.recv())
            slot = free.pop()
            pipe.send(_pack(batch, slot, slots[slot]))


class _Parcel(NamedTuple):
    """A batch in the pipe; its pixels, and its JPEGs if they fit, are in a slot of shared memory."""

    slot: int
    shape: tuple[int, ...]  # of the pixels
    ids: np.ndarray
    cu_seqlens: np.ndarray
    jpegs: np.ndarray | None  # those that did not fit; a tensor would travel by file descriptor
    rest: dict[str, Any]  # the other fields of the batch


def _pack(batch: LocalBatch, number: int, slot: Tensor) -> _Parcel:
    pixels = batch.images.numel()
    slot[:pixels] = batch.images.view(-1)
    jpegs = batch.encoded.data.numpy() if batch.encoded else None
    if jpegs is not None and pixels + len(jpegs) <= len(slot):
        slot[pixels : pixels + len(jpegs)] = torch.from_numpy(jpegs)
        jpegs = None
    rest = {"step": batch.step, "keys": batch.keys, "origins": batch.origins, "defects": batch.defects}
    if batch.encoded:
        rest["encoded"] = (batch.encoded.sizes, batch.encoded.windows, batch.encoded.rows)
    ids, cu_seqlens = batch.tokens.ids.numpy(), batch.tokens.cu_seqlens.numpy()
    return _Parcel(number, tuple(batch.images.shape), ids, cu_seqlens, jpegs, rest)


def _unpack(parcel: _Parcel, slot: Tensor, pin: bool) -> LocalBatch:
    """The batch, in memory of its own: the slot is used again."""
    images = torch.empty(parcel.shape, dtype=torch.uint8, pin_memory=pin)
    pixels = images.numel()
    images.view(-1).copy_(slot[:pixels])
    rest = dict(parcel.rest)
    if "encoded" in rest:
        sizes, windows, rows = rest["encoded"]
        fitted = parcel.jpegs is None
        jpegs = slot[pixels : pixels + sum(sizes)].clone() if fitted else torch.from_numpy(parcel.jpegs)
        rest["encoded"] = Encoded(jpegs, sizes, windows, rows)
    tokens = PackedTokens(torch.from_numpy(parcel.ids), torch.from_numpy(parcel.cu_seqlens))
    return LocalBatch(images=images, tokens=tokens.pin_memory() if pin else tokens, **rest)


def _kill(processes: list[BaseProcess]) -> None:
    """A stopped process, or one in a hanging read, ignores everything else."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(JOIN_SECONDS)


def _describe(worker: _Worker, dataset: TrainingSet, state: str) -> str:
    step, source, sample = worker.beat.tolist()
    shard, key = dataset.mixture[source].samples.name(sample)
    return (
        f"loader worker {worker.index} (pid {worker.process.pid}) {state}; "
        f"it was at step {step}, sample {key} of {shard}"
    )


def _cause_of_death(process: BaseProcess) -> str:
    process.join(5)
    code = process.exitcode
    if code is None or code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps the system ran out of memory" if name == "SIGKILL" else name
