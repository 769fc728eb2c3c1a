"""What worker processes do when something stops them at the worst moment."""

import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from meru_fast.data import build_loader, workers
from meru_fast.data.dataset import Encoded, LocalBatch
from meru_fast.data.errors import DataError
from meru_fast.tokenizer import PackedTokens

PATIENCE = 120.0  # seconds, on a machine that has other things to do


def loader(**options):
    return build_loader("synthetic", batch_size=4, image_size=8, num_samples=1000, **options)


def gone(pid):
    """Whether a process has ended; nobody may have asked for its exit status."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_worker_that_stops_in_mid_message_is_reported(monkeypatch):
    def stop(dataset, steps, pipe, inherited, slots, beat, parent):
        os.write(pipe.fileno(), struct.pack("!i", 1000) + b"the first bytes of a thousand")
        os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(workers, "_work", stop)
    monkeypatch.setattr(workers, "JOIN_SECONDS", 1.0)
    with pytest.raises(DataError, match=r"loader worker 0 \(pid \d+\) has been silent for 10 s in mid-batch"):
        next(iter(loader(num_workers=1, timeout=10)))


def test_jpegs_that_exceed_the_slot_need_no_worker_to_be_received():
    data = torch.randint(256, (5000,), dtype=torch.uint8)
    batch = LocalBatch(
        step=0,
        images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        tokens=PackedTokens.from_list([torch.tensor([1, 2])]),
        keys=["a"],
        origins=[(0, 0)],
        defects=[],
        encoded=Encoded(data, [5000], [(0, 0, 8, 8)], [0]),
    )
    slot = torch.empty(192, dtype=torch.uint8)
    parcel = workers._pack(batch, 0, slot)
    assert len(ForkingPickler.dumps(parcel)) > 5000  # the bytes themselves, and no descriptor to fetch them with
    assert torch.equal(workers._unpack(parcel, slot, pin=False).encoded.data, data)


def test_workers_that_wait_to_send_end_with_a_killed_trainer():
    script = """
        import os, signal, time
        import numpy as np
        from meru_fast.data import build_loader, workers

        pack = workers._pack
        workers._pack = lambda *batch: pack(*batch)._replace(jpegs=np.zeros(1 << 24, np.uint8))
        loader = build_loader("synthetic", batch_size=4, image_size=8, num_workers=3)
        next(iter(loader))
        time.sleep(2)  # nobody takes batches: the workers fill the pipes and wait
        print(*loader._workers.pids(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    until = time.monotonic() + PATIENCE
    while not all(map(gone, pids)):
        assert time.monotonic() < until, "workers outlive their trainer"
        time.sleep(0.1)


def test_closing_in_the_receiver_does_not_block():
    running = loader(num_workers=1)
    next(iter(running))
    made = running._workers
    taken = made._take
    closed = threading.Event()

    def take(worker):  # as the garbage collector would, at any allocation
        batch = taken(worker)
        with made._ready.mutex:
            made.close()
        closed.set()
        return batch

    made._take = take
    while not closed.is_set():
        try:
            made._ready.get(timeout=0.1)
        except Exception:
            continue
    made._receiver.join(PATIENCE)
    assert not made._receiver.is_alive()
    running.close()
