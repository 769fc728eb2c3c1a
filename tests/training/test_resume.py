"""Resuming: n steps at once are bit-equal to k steps, a crash, and n - k steps."""

import shutil
from pathlib import Path

import pytest
from training_runs import TINY, assert_same_state, forget_after, history

from meru_fast import config
from meru_fast.training import launch, train


def run_here(output_dir: Path, *overrides: str, resume: str | None = None) -> int:
    """The whole trainer in this process."""
    with launch.process_environment(launch.Place.alone()):
        return train(config.load(TINY, overrides), str(output_dir), resume=resume)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_exact(tmp_path, stage):
    overrides = (f"train.zero_stage={stage}", "train.ema_decay=0.9")
    assert run_here(tmp_path / "straight", *overrides) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    forget_after(tmp_path / "resumed", 4)
    assert run_here(tmp_path / "resumed", *overrides, resume="latest") == 0
    assert history(tmp_path / "resumed") == history(tmp_path / "straight")
    assert_same_state(tmp_path / "straight", tmp_path / "resumed", 8)
