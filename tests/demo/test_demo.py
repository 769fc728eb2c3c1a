"""The demo as a user runs it: interrupted, taken up again, run twice; and, behind --slow, whole."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meru_fast import demo

RESULTS = {
    "digits/acc1": 0.95,
    "scenes/image_retrieval_recall@5": 0.5,
    "scenes/text_retrieval_recall@5": 0.5,
    "scenes": 400,
    "caption_radius": 0.6,
    "image_radius": 1.4,
}


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "meru_fast.cli", "demo", "--output-dir", str(folder), *overrides]


def logged_steps(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["step"]]


@pytest.mark.timeout(1500)  # starts the demo three times
def test_an_interrupted_demo_goes_on_and_an_untrained_model_is_refused(tmp_path):
    folder = tmp_path / "demo"
    overrides = ("train.num_iterations=24", "train.log_period=1", "train.checkpoint_period=4")
    overrides += ("optim.lr_scheduler.warmup_steps=2",)
    first = subprocess.Popen(
        command(folder, *overrides),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
    )
    deadline = time.monotonic() + 400
    while len(logged_steps(folder)) < 10 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.1)
    assert first.poll() is None, first.communicate()
    os.killpg(first.pid, signal.SIGINT)  # as the terminal does on Ctrl-C: to every process
    errors = first.communicate(timeout=120)[1]
    assert first.returncode == 130, errors
    assert "The same command goes on from here" in errors
    assert "Traceback" not in errors.splitlines()[-1]
    reached = max(logged_steps(folder))
    assert 10 <= reached < 24
    made = (folder / "data" / "train" / "shard_00000000.tar").stat().st_mtime_ns

    second = subprocess.run(command(folder, *overrides), capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert second.returncode == 1, second.stderr
    assert second.stderr.splitlines()[-1].startswith("error: the model did not learn: zero-shot accuracy on digits is")
    assert "resumed from" in second.stderr
    assert sorted(set(logged_steps(folder))) == list(range(1, 25))
    assert (folder / "data" / "train" / "shard_00000000.tar").stat().st_mtime_ns == made
    assert "What a small MERU learned" in (folder / "report.html").read_text()

    third = subprocess.run(command(folder, *overrides), capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert third.returncode == 1
    assert "24 steps are trained already" in third.stdout
    assert "evaluated already" in third.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demo_learns(tmp_path):
    done = subprocess.run(command(tmp_path / "demo"), capture_output=True, text=True, timeout=2900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["digits/acc1"] >= 0.85
    assert results["scenes/image_retrieval_recall@5"] >= 5 * 5 / 400
    assert results["caption_radius"] < results["image_radius"]
    assert "zero-shot accuracy" in done.stdout


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"digits/acc1": 0.84}, "84.0%, expected at least 85%"),
        ({"digits/acc1": float("nan")}, "expected at least 85%"),
        ({"scenes/image_retrieval_recall@5": 0.06}, "6.0%, expected at least 6.2%"),
        ({"caption_radius": 1.4}, "not nearer to the root"),
    ],
)
def test_what_was_not_learned_is_named(change, fault):
    assert demo._faults(RESULTS) == []
    faults = demo._faults(RESULTS | change)
    assert len(faults) == 1
    assert fault in faults[0]


def test_bad_overrides_and_foreign_folders_are_one_line(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*data exists and holds no demo data"):
        demo.main(["--output-dir", str(tmp_path)])
