"""What stops, spares or warns about a run that goes wrong."""

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meru_fast.distributed import get_rank, get_world_size
from meru_fast.tokenizer import PackedTokens
from meru_fast.training.engine import GUARDED, StepResult

log = logging.getLogger(__name__)

#: Exit status after SIGTERM or SIGINT, as a shell reports it: not 0, so that a relauncher starts again.
EXIT_STOPPED = 143
EXIT_NONFINITE = 3


class NonFiniteError(RuntimeError):
    """A loss, gradient or embedding that is NaN or infinite. Weights and optimiser are as before that step."""


def describe_fault(result: StepResult) -> str:
    """Which guarded values were not finite, of a discarded step."""
    bad = [name for name, fine in zip(GUARDED, result.finite.tolist(), strict=True) if not fine]
    return ", ".join(bad) if bad else f"gradient norm ({float(result.grad_norm)})"


def dump_fault(
    folder: Path,
    step: int,
    fault: str,
    result: StepResult,
    keys: Sequence[str],
    images: Tensor,
    tokens: PackedTokens,
) -> Path:
    """Write what this rank saw in a discarded step: sample ids, scalars, norms."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}_rank{get_rank()}.json"
    pixels = images.detach().float()
    contents = {
        "step": step,
        "rank": get_rank(),
        "not_finite": fault,
        "loss": float(result.loss),
        "grad_norm": float(result.grad_norm),
        "scalars": {name: float(value) for name, value in result.logging.items()},
        "keys": list(keys),
        "image_range": [float(pixels.min()), float(pixels.max())],
        "image_norms": pixels.flatten(1).norm(dim=1).tolist(),
        "caption_lengths": list(tokens.lengths),
    }
    path.write_text(json.dumps(contents, indent=1), encoding="utf-8")
    return path


class Alarms:
    """Warnings about a model that trains, but not as it should. Each is given when its condition appears."""

    def __init__(self) -> None:
        self.active: set[str] = set()

    def check(self, step: int, row: Mapping[str, float], at_bound: Mapping[str, float], min_radius: float) -> None:
        """`row` as in metrics.csv; `at_bound` as ``Engine.scalars_at_bound`` returns it."""
        found = {}
        if "curv" in at_bound:
            found["curv"] = (
                f"the curvature sits at its bound ({math.exp(at_bound['curv']):.4g}): the geometry no longer adapts. "
                "Often the entailment cones collapsed; see docs/training.md, 'The curvature falls to its bound'"
            )
        if {"text_radius", "curv"} <= row.keys():
            root = math.sqrt(row["curv"])
            # At this radius a caption's cone is the half space: the entailment loss has nothing left to ask for.
            if math.sinh(min(root * row["text_radius"], 50.0)) <= 2 * min_radius:
                found["cones"] = (
                    f"the cones collapsed: captions lie at a mean distance of {row['text_radius']:.3g} from the root, "
                    f"where every cone contains everything (min_radius={min_radius:g}, curv={row['curv']:.3g})"
                )
        for name, message in found.items():
            if name not in self.active:
                log.warning("step %d: %s", step, message)
        self.active = set(found)


class Requests:
    """What signals ask for. SIGTERM and SIGINT: save and stop. SIGUSR1: save and go on."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False

    @contextmanager
    def listening(self) -> Iterator["Requests"]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # signals only reach the main thread
            return
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGUSR1: self._save}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True

    def _save(self, number: int, frame: Any) -> None:
        self.save = True


class Agreement:
    """A few yes/no questions per step that all ranks must answer alike: yes if any rank says yes.

    On the host, over gloo, so that it costs a GPU no synchronisation.
    """

    def __init__(self) -> None:
        several = get_world_size() > 1
        self.group: Any = dist.new_group(backend="gloo") if several and dist.get_backend() != "gloo" else None

    def any(self, *answers: bool) -> list[bool]:
        if get_world_size() == 1:
            return list(answers)
        votes = torch.tensor(answers, dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(vote) for vote in votes]


def write_pid(output_dir: Path) -> None:
    """So that `kill -USR1 $(cat DIR/pid)` finds rank 0."""
    (output_dir / "pid").write_text(str(os.getpid()), encoding="utf-8")
