"""Runs of two real processes that are killed, asked to stop, or continued by another number of processes."""

import random
import shutil
import time
from pathlib import Path

import pytest
from training_runs import (
    assert_same_state,
    forget_after,
    history,
    kill_all,
    metrics,
    run,
    run_here,
    start,
    wait_for_step,
)

STEPS = 12
SAVES = ("train.checkpoint_period=3", f"train.num_iterations={STEPS}", "train.keep_checkpoints=0")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """Two processes, ZeRO 3 (where DeepSpeed's conversion has most to get wrong), to the end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, *SAVES, "train.zero_stage=3", processes=2)
    return folder


def test_killed_run_ends_like_the_uninterrupted_one(tmp_path, uninterrupted):
    again = (*SAVES, "train.zero_stage=3", "--resume", "auto")
    running = start(tmp_path, *again, processes=2)
    wait_for_step(running, tmp_path, 7)
    kill_all(running)
    done = len(history(tmp_path))
    run(tmp_path, *again, processes=2)
    assert done < STEPS
    assert history(tmp_path) == history(uninterrupted)
    assert_same_state(uninterrupted, tmp_path, STEPS)


def assert_close(found: Path, expected: Path, after: int) -> None:
    """Losses of the steps after `after` within 1e-5, of the same global batches."""
    left, right = metrics(found), metrics(expected)
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for one, other in zip(left[after:], right[after:], strict=True):
        for name in ("loss", "contrastive_loss", "entailment_loss", "curv", "logit_scale"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-5, rel=1e-5), (one["step"], name)


def resume_with(folder: Path, uninterrupted: Path, processes: int, *overrides: str) -> None:
    shutil.copytree(uninterrupted, folder, dirs_exist_ok=True)
    forget_after(folder, 6)
    run(folder, *SAVES, *overrides, "--resume", processes=processes)
    assert_close(folder, uninterrupted, after=6)


def test_one_process_continues_a_run_of_two(tmp_path, uninterrupted):
    resume_with(tmp_path, uninterrupted, 1, "train.zero_stage=3")


def test_three_processes_continue_a_run_of_one(tmp_path):
    """The last rank's share of the learnable scalars is nothing but padding."""
    assert run_here(tmp_path / "one", *SAVES, "train.zero_stage=2") == 0
    resume_with(tmp_path / "three", tmp_path / "one", 3, "train.zero_stage=2")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_any_number_of_processes_continues(tmp_path, stage, before, after):
    run(tmp_path / "whole", *SAVES, f"train.zero_stage={stage}", processes=before)
    resume_with(tmp_path / "continued", tmp_path / "whole", after, f"train.zero_stage={stage}")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_kill_and_resume_at_every_stage(tmp_path, stage, processes):
    command = (*SAVES, f"train.zero_stage={stage}", "train.ema_decay=0.9", "--resume", "auto")
    run(tmp_path / "whole", *command, processes=processes)
    running = start(tmp_path / "killed", *command, processes=processes)
    wait_for_step(running, tmp_path / "killed", 5)
    kill_all(running)
    run(tmp_path / "killed", *command, processes=processes)
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert_same_state(tmp_path / "whole", tmp_path / "killed", STEPS)


@pytest.mark.slow
def test_ten_random_kills_under_a_relauncher(tmp_path):
    command = ("train.num_iterations=300", "train.checkpoint_period=5", "train.zero_stage=1", "--resume", "auto")
    run(tmp_path / "whole", *command, processes=2)
    chance = random.Random(0)
    folder, kills = tmp_path / "killed", 0
    while kills < 10:
        running = start(folder, *command, processes=2)
        reached = int(metrics(folder)[-1]["step"]) if (folder / "metrics.csv").is_file() else 0
        wait_for_step(running, folder, min(reached + chance.randrange(5, 25), 290))
        time.sleep(chance.random() * 0.3)  # anywhere in a step or a save
        kill_all(running)
        kills += 1
    run(folder, *command, processes=2)
    assert history(folder) == history(tmp_path / "whole")
    assert_same_state(tmp_path / "whole", folder, 300)
