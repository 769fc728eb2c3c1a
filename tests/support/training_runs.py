"""Small training runs, in this process or as real processes, and what they left behind."""

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from meru_fast import config
from meru_fast.training import launch, train

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "training" / "tiny_meru.py"
FAULTY = ROOT / "tests" / "training" / "faulty_meru.py"


def run_here(output_dir: Path, *overrides: str, resume: str | None = None, config_file: Path = TINY, **options) -> int:
    """The whole trainer in this process."""
    with launch.process_environment(launch.Place.alone()):
        return train(config.load(config_file, overrides), str(output_dir), resume=resume, **options)


def command(output_dir: Path, *arguments: str, processes: int = 1, config_file: Path | str = TINY) -> list[str]:
    """The training command of a user, for the tiny config."""
    several = ["--num-gpus", str(processes)] if processes > 1 else []
    return [
        *(sys.executable, "-m", "meru_fast.training", "--config", str(config_file), "--output-dir", str(output_dir)),
        *several,
        *arguments,
    ]


def environment(**extra: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), ours.get("PYTHONPATH")]))
    return ours | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths} | extra


def run(
    output_dir: Path,
    *arguments: str,
    processes: int = 1,
    status: int = 0,
    timeout: float = 240,
    config_file: Path | str = TINY,
    threads: int = 1,
    **variables: str,
) -> str:
    """Run to the end, check the exit status, return everything it printed."""
    running = start(output_dir, *arguments, processes=processes, config_file=config_file, threads=threads, **variables)
    try:
        output = running.communicate(timeout=timeout)[0]
    finally:
        kill_all(running)  # ranks that hang must not outlive the test
    assert running.returncode == status, output[-4000:]
    return output


def metrics(output_dir: Path) -> list[dict[str, str]]:
    with (output_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


#: Columns of metrics.csv that do not depend on the machine's mood.
DETERMINISTIC = ("step", "loss", "contrastive_loss", "entailment_loss", "curv", "logit_scale", "lr", "grad_norm")


def history(output_dir: Path) -> list[tuple[str, ...]]:
    """The deterministic part of metrics.csv, as written: equal means bit-equal."""
    return [tuple(row[name] for name in DETERMINISTIC) for row in metrics(output_dir)]


def states(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of every file of a checkpoint, by file and place in it."""
    found: dict[str, torch.Tensor] = {}
    folder = output_dir / "checkpoints" / f"step_{step:08d}"
    for file in sorted(folder.glob("*.pt")):
        _collect(torch.load(file, map_location="cpu", weights_only=False), file.name, found)
    assert found, f"no tensors in {folder}"
    return found


def _collect(value: object, place: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[place] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{place}/{key}", found)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _collect(item, f"{place}/{index}", found)


def assert_same_state(one: Path, other: Path, step: int) -> None:
    """Bit-equal weights, moments, schedules and random states."""
    left, right = states(one, step), states(other, step)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different[:10]


def forget_after(output_dir: Path, step: int) -> None:
    """Make the run folder look as if the run had crashed right after its checkpoint of `step`."""
    for folder in (output_dir / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (output_dir / "checkpoints" / "latest").write_text(f"step_{step:08d}")


def start(
    output_dir: Path,
    *arguments: str,
    processes: int = 1,
    config_file: Path | str = TINY,
    threads: int = 1,
    **variables: str,
) -> subprocess.Popen:
    """A run in the background, in a process group of its own, with these environment `variables`."""
    return subprocess.Popen(
        command(output_dir, *arguments, processes=processes, config_file=config_file),
        env=environment(OMP_NUM_THREADS=str(threads), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(running: subprocess.Popen, output_dir: Path, step: int, timeout: float = 200) -> None:
    """Until metrics.csv holds `step`. Fails if the run ends before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (output_dir / "metrics.csv").is_file() and any(int(row["step"]) >= step for row in metrics(output_dir)):
            return
        if running.poll() is not None:
            raise AssertionError(
                f"ended with {running.returncode} before step {step}:\n{running.stdout.read()[-4000:]}"
            )
        time.sleep(0.02)
    kill_all(running)
    raise AssertionError(f"step {step} not reached in {timeout} s")


def kill_all(running: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all ranks at once, as when a machine dies."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait(timeout=120)
