"""Resuming: n steps at once are bit-equal to k steps, a crash, and n - k steps."""

import shutil

import pytest
from training_runs import assert_same_state, forget_after, history, run_here


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_exact(tmp_path, stage):
    overrides = (f"train.zero_stage={stage}", "train.ema_decay=0.9")
    assert run_here(tmp_path / "straight", *overrides) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    forget_after(tmp_path / "resumed", 4)
    assert run_here(tmp_path / "resumed", *overrides, resume="latest") == 0
    assert history(tmp_path / "resumed") == history(tmp_path / "straight")
    assert_same_state(tmp_path / "straight", tmp_path / "resumed", 8)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_with_deepspeeds_optimizer_and_our_schedule(tmp_path, stage):
    """It loads groups of its own; a schedule that went on changing the former ones would leave the rate as it is."""
    given = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    assert run_here(tmp_path / "straight", ds_config=given) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    forget_after(tmp_path / "resumed", 4)
    assert run_here(tmp_path / "resumed", ds_config=given, resume="latest") == 0
    assert history(tmp_path / "resumed") == history(tmp_path / "straight")
    assert_same_state(tmp_path / "straight", tmp_path / "resumed", 8)


def test_the_saved_config_trains_the_same(tmp_path):
    assert run_here(tmp_path / "one") == 0
    assert run_here(tmp_path / "two", config_file=tmp_path / "one" / "config.yaml") == 0
    assert history(tmp_path / "one") == history(tmp_path / "two")
