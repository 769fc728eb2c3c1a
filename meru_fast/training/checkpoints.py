"""Checkpoints that a crash cannot damage.

``checkpoints/step_00000400/`` holds what DeepSpeed saves, ``rank_*.pt`` (random states, loader, optimiser groups) and
``manifest.json`` (every file with size and SHA-256). It is written below a hidden name and renamed when it is complete
and on disk; ``checkpoints/latest`` is replaced after that. So a kill at any moment leaves the previous one loadable.

The files are written by a :class:`CheckpointWriter`, a checkpoint engine as DeepSpeed defines them: from a copy, in a
thread, while training goes on.
"""

import copy
import datetime
import hashlib
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

import meru_fast
from meru_fast.checkpoint import CheckpointError, refuse_foreign_objects
from meru_fast.distributed import (
    all_gather_object,
    barrier,
    broadcast_object,
    get_rank,
    get_world_size,
    is_main_process,
)
from meru_fast.training.engine import Engine

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
SAVING, REMOVING, CONVERTING = ".saving_", ".removing_", ".universal_"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass
class Manifest:
    """What a checkpoint is, and what must be in it."""

    step: int
    world_size: int
    zero_stage: int
    precision: str
    files: dict[str, dict[str, Any]]
    meru_fast: str
    code: str
    torch: str
    deepspeed: str
    time: str
    format: int = FORMAT


def tag(step: int) -> str:
    return f"step_{step:08d}"


# --- finding and checking ----------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError if `folder` is no complete checkpoint of ours."""
    path = folder / MANIFEST
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so not a complete checkpoint") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error


def verify(folder: Path) -> Manifest:
    """The manifest, after comparing size and SHA-256 of every file with it. Raises CheckpointError naming the fault."""
    manifest = read_manifest(folder)
    if manifest.format > FORMAT:
        raise CheckpointError(f"{folder}: format {manifest.format} of a newer meru_fast ({manifest.meru_fast})")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: contents changed since they were saved (SHA-256 differs)")
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def newest_first(root: Path) -> list[Path]:
    """Folders that are named like checkpoints: what `latest` names first, then by step."""
    found = sorted((path for path in root.glob("step_*") if _STEP.fullmatch(path.name)), key=step_of, reverse=True)
    latest = root / LATEST
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    return sorted(found, key=lambda path: path.name != named)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def find(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that ``--resume`` means; None to start from the beginning. The same on every rank.

    Args:
        resume: None, "latest", "auto" (None if there is none) or the path of a checkpoint or run folder.
        output_dir: the run folder.

    Raises:
        CheckpointError: the named checkpoint is damaged; "latest" found no good one; None, but there are checkpoints,
            which a run from the start would mix with its own.
    """
    found, error = None, None
    if is_main_process():
        try:
            found = _find(resume, output_dir)
        except CheckpointError as caught:
            error = caught
    found, error = broadcast_object((found, error))
    if error is not None:
        raise error
    return found


def _find(resume: str | None, output_dir: Path) -> Path | None:
    root = output_dir / "checkpoints"
    if resume is None:
        if existing := newest_first(root):
            raise CheckpointError(
                f"{root} holds {existing[0].name} of an earlier run: go on from it with --resume (or --resume auto), "
                "or choose another --output-dir"
            )
        return None
    if resume not in ("auto", "latest"):
        path = Path(resume)
        if _STEP.fullmatch(path.name):
            verify(path)
            return path
        root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if not root.is_dir():
            raise CheckpointError(f"--resume {resume}: no such folder")
    for folder in newest_first(root):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            log.warning("skipping the damaged checkpoint %s: %s", folder.name, error)
    if resume == "auto":
        return None
    raise CheckpointError(f"--resume {resume}: no undamaged checkpoint in {root} (--resume auto would start anew)")


# --- writing -----------------------------------------------------------------------------------------------------


def make_writer(asynchronous: bool) -> Any:
    """A DeepSpeed checkpoint engine that hashes and flushes what it writes, and never raises while writing.

    A rank that failed alone would leave the others waiting in DeepSpeed's barriers. So a failure is kept in ``error``
    for all ranks to agree on afterwards.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class CheckpointWriter(CheckpointEngine):
        def __init__(self):
            super().__init__()
            self.name = "meru_fast"
            self.begin()
            self._thread: threading.Thread | None = None

        def begin(self) -> None:
            self.files: dict[str, dict[str, Any]] = {}
            self.error: str | None = None
            self._queue: list[tuple[Any, str]] = []

        @property
        def busy(self) -> bool:
            return self._thread is not None and self._thread.is_alive()

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            try:
                os.makedirs(path, exist_ok=True)
            except OSError as error:
                self.error = self.error or str(error)

        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            try:
                # Only what is written later needs a copy; it may be all that the host's memory can hold.
                self._queue.append((snapshot(state_dict) if asynchronous else state_dict, path))
                if not asynchronous:
                    self._write_queued()
            except (MemoryError, RuntimeError) as error:
                self.error = self.error or f"{path}: {error}"

        def end(self) -> None:
            """All ``save`` calls have been made: write what is queued, in a thread."""
            self._thread = threading.Thread(target=self._write_queued, name="checkpoint-writer", daemon=True)
            self._thread.start()

        def wait(self) -> None:
            if self._thread is not None:
                self._thread.join()

        def load(self, path: str, map_location: Any = None) -> Any:
            refuse_foreign_objects(path)  # a run folder may come from anywhere
            return torch.load(path, map_location=map_location, weights_only=False)

        def commit(self, info: Any) -> bool:
            return True

        def _write_queued(self) -> None:
            while self._queue:
                state, path = self._queue.pop(0)
                if self.error is None:
                    try:
                        self.files[os.path.basename(path)] = write_durably(path, state)
                    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
                        self.error = f"{path}: {error}"

    return CheckpointWriter()


def write_durably(path: str | os.PathLike, state: Any) -> dict[str, Any]:
    """Text as it is, all else through ``torch.save``, until it is on disk; returns size and SHA-256."""
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        if isinstance(state, str):
            hashing.write(state.encode())
        else:
            torch.save(state, cast(IO[bytes], hashing))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.size, "sha256": hashing.digest.hexdigest()}


class _HashingFile:
    """Hashes what passes through on its way to a file (torch writes its archives front to back)."""

    def __init__(self, file: Any):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def snapshot(state: Any) -> Any:
    """A deep copy with every tensor in host memory and in a storage of its own."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        kind: Any = type(state)
        return kind({key: snapshot(value) for key, value in state.items()})
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*map(snapshot, state))
    if isinstance(state, (list, tuple)):
        return type(state)(map(snapshot, state))
    return copy.deepcopy(state)


class Checkpoints:
    """The checkpoints of one run. All methods are called by all ranks together, in the same order."""

    def __init__(self, engine: Engine, output_dir: Path, keep: int, keep_period: int = 0, asynchronous: bool = True):
        self.engine = engine
        self.root = output_dir / "checkpoints"
        self.keep, self.keep_period = keep, keep_period
        self.asynchronous = asynchronous
        self.pending: int | None = None
        self.last_saved: int | None = None
        self.writer = make_writer(asynchronous)
        engine.save_through(self.writer)
        if is_main_process():
            self.root.mkdir(parents=True, exist_ok=True)
            for left_over in self._hidden():
                shutil.rmtree(left_over, ignore_errors=True)
        barrier()

    def save(self, step: int, state: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> None:
        """Start saving; :meth:`publish` completes it.

        Args:
            step: finished optimiser steps.
            state: this rank's share of what DeepSpeed does not know (see ``rank_state``).
            files: further files by name (text, or anything for ``torch.save``); only rank 0's are written.
        """
        self.finish()
        folder = self.root / f"{SAVING}{tag(step)}"
        self.writer.begin()
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
            self.writer.makedirs(folder)
        barrier()
        self.engine.deepspeed.save_checkpoint(self.root, tag=folder.name, save_latest=False)
        self.writer.save(
            {
                "state": dict(state),
                "param_groups": _hyper_parameters(self.engine),
                "shapes": self.engine.parameter_shapes(),
            },
            str(folder / _rank_file(get_rank())),
        )
        if is_main_process():
            for name, contents in (files or {}).items():
                self.writer.save(contents, str(folder / name))
        self.writer.end()
        self.pending = step
        if not self.asynchronous:
            self.finish()

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write of the pending checkpoint."""
        return not self.writer.busy

    def finish(self) -> None:
        """Wait for the pending checkpoint, if any, and publish it."""
        if self.pending is not None:
            self.writer.wait()
            self.publish()

    def publish(self) -> bool:
        """Make the pending checkpoint, written by all ranks, the newest. If that fails, warn and remove it."""
        assert self.pending is not None, "publish() without save()"
        step, self.pending = self.pending, None
        parts = all_gather_object((self.writer.files, self.writer.error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error]
        if is_main_process() and not errors:
            try:
                self._publish(step, {name: info for files, _ in parts for name, info in files.items()})
            except OSError as error:
                errors = [str(error)]
        errors = broadcast_object(errors)
        if errors:
            log.warning("checkpoint %s could not be saved, training goes on: %s", tag(step), "; ".join(errors))
            if is_main_process():
                shutil.rmtree(self.root / f"{SAVING}{tag(step)}", ignore_errors=True)
            return False
        self.last_saved = step
        return True

    def _publish(self, step: int, files: dict[str, dict[str, Any]]) -> None:
        saving, final = self.root / f"{SAVING}{tag(step)}", self.root / tag(step)
        import deepspeed

        manifest = Manifest(
            step=step,
            world_size=get_world_size(),
            zero_stage=self.engine.stage,
            precision=self.engine.precision,
            files=dict(sorted(files.items())),
            meru_fast=meru_fast.__version__,
            code=code_version(),
            torch=torch.__version__,
            deepspeed=deepspeed.__version__,
            time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        _write_text(saving / MANIFEST, json.dumps(asdict(manifest), indent=1))
        _sync_folder(saving)
        if final.exists():  # the same step saved again, after a rollback
            self._remove(final)
        saving.rename(final)
        _sync_folder(self.root)
        partial = self.root / f".{LATEST}"
        _write_text(partial, final.name)
        partial.replace(self.root / LATEST)
        _sync_folder(self.root)
        log.info("saved %s (%.1f MB)", final, sum(info["bytes"] for info in files.values()) / 1e6)
        self._retire()

    def _retire(self) -> None:
        folders = sorted(newest_first(self.root), key=step_of, reverse=True)
        for folder in folders[self.keep :] if self.keep else []:
            if not (self.keep_period and step_of(folder) % self.keep_period == 0):
                try:
                    self._remove(folder)
                except OSError as error:
                    log.warning("the old checkpoint %s could not be removed, training goes on: %s", folder.name, error)

    def _remove(self, folder: Path) -> None:
        doomed = self.root / f"{REMOVING}{folder.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)  # at no moment is there half a checkpoint of a valid name
        shutil.rmtree(doomed, ignore_errors=True)

    def _hidden(self) -> Iterator[Path]:
        for prefix in (SAVING, REMOVING, CONVERTING):
            yield from self.root.glob(f"{prefix}*")

    def load(self, folder: Path) -> tuple[int, dict[str, Any], bool]:
        """Bring the engine to the state of the checkpoint `folder`, saved by any number of processes.

        Returns:
            Finished steps, the ``state`` given to :meth:`save` (of this rank, or of rank 0 if the number of processes
            differs), and whether the number of processes is the same.

        Raises:
            CheckpointError: it was saved with another ZeRO stage or precision, or of another model.
        """
        manifest = read_manifest(folder)
        for name, now in (("zero_stage", self.engine.stage), ("precision", self.engine.precision)):
            if getattr(manifest, name) != now:
                raise CheckpointError(
                    f"{folder} was saved with {name} {getattr(manifest, name)}, this run has {now}: resume with the "
                    "former, or start a new run from its weights (train.init_from)"
                )
        same = manifest.world_size == get_world_size()
        rank_file = folder / _rank_file(get_rank() if same else 0)
        refuse_foreign_objects(rank_file)
        saved = torch.load(rank_file, map_location="cpu", weights_only=False)
        _check_model(folder, saved["shapes"], self.engine.parameter_shapes())
        if same or manifest.zero_stage == 0:
            self._load(folder)
        else:
            self._load_converted(folder)
        # Loading a universal checkpoint (load_hp_checkpoint_state_from_checkpoint_dir_stage3), ZeRO 3 gives all groups
        # the hyper-parameters of the first one, so that weight decay would reach gains and biases; and it gives them
        # one and the same step counter, which every group then advances.
        for moments in self.engine.optimizer_state().values():
            if isinstance(moments.get("step"), Tensor):
                moments["step"] = moments["step"].clone()
        for group, values in zip(self.engine.param_groups, saved["param_groups"], strict=True):
            group.update(values)
        self.engine.clamp_scalars()
        return manifest.step, saved["state"], same

    def _load(self, folder: Path) -> None:
        path, _ = self.engine.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed could not load it")

    def _load_converted(self, folder: Path) -> None:
        """Through DeepSpeed's universal checkpoint: every parameter and moment whole, in a file of its own."""
        converted = self.root / f"{CONVERTING}{folder.name}"
        fault = None
        if is_main_process():
            log.info("%s was saved by another number of processes: converting", folder)
            fault = convert(folder, converted)
        if fault := broadcast_object(fault):
            raise CheckpointError(f"{folder}: conversion to {get_world_size()} processes failed:\n{fault}")
        with self.engine.loading_universal():
            self._load(converted)  # a rank that fails here ends at once: the others may wait for it in DeepSpeed
        barrier()
        if is_main_process():
            shutil.rmtree(converted, ignore_errors=True)


def _check_model(folder: Path, saved: Mapping[str, Sequence[int]], ours: Mapping[str, Sequence[int]]) -> None:
    """Raises CheckpointError naming the first of the parameters that are not the same."""
    different = [name for name in {**saved, **ours} if saved.get(name) != ours.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{folder} is of another model: {len(different)} parameters differ, such as {name}, "
            f"{saved.get(name, 'absent')} there and {ours.get(name, 'absent')} here; choose another --output-dir"
        )


def convert(folder: Path, converted: Path) -> str | None:
    """DeepSpeed's own converter, in a process of its own; returns what it said if it failed."""
    shutil.rmtree(converted, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder), "--output_folder", str(converted)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=ours, check=False)
    (converted.parent / "latest_universal").unlink(missing_ok=True)
    return None if done.returncode == 0 else done.stderr[-2000:]


def rank_state() -> dict[str, Any]:
    """Random states of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rank_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def code_version() -> str:
    """Commit of the source tree, with "+" if it has changes; empty for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return commit + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _hyper_parameters(engine: Engine) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in engine.param_groups]


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
