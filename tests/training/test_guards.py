"""Values that are not finite, hung loaders, signals to look into a run."""

import json
import shutil
import subprocess
import sys

import gradient_worker
import pytest
import torch
from training_runs import FAULTY, assert_same_state, history, metrics, run, run_here

from meru_fast.training import launch
from meru_fast.training.guards import Alarms, NonFiniteError
from meru_fast.training.loop import prepare_process
from meru_fast.training.settings import TrainSettings


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_batch_leaves_weights_and_moments_alone(stage, accumulation):
    with launch.process_environment(launch.Place.alone()):
        prepare_process(TrainSettings(), on_gpu=False)
        engine = gradient_worker.engine(stage, accumulation)
        images, tokens = gradient_worker.batch()
        assert engine.step(images, tokens).applied  # its rate is 0: the warm-up's first step
        assert engine.step(images, tokens).applied
        before = engine.full_parameters()
        bad = images.clone()
        bad[3, 0, 0, 0] = torch.nan
        result = engine.step(bad, tokens)
        assert not result.applied
        assert result.finite.tolist() == [0.0, 0.0, 1.0]
        after = engine.full_parameters()
        assert all(torch.equal(before[name], after[name]) for name in before)
        good = engine.step(images, tokens)
        assert good.applied
        assert torch.isfinite(good.loss)
        changed = engine.full_parameters()
        assert any(not torch.equal(after[name], changed[name]) for name in after)
        engine.close()


def test_raise_stops_before_the_update_with_a_dump(tmp_path):
    with pytest.raises(NonFiniteError, match="step 5: not finite: loss, image features"):
        run_here(tmp_path, config_file=FAULTY)
    dump = json.loads((tmp_path / "faults" / "step_00000005_rank0.json").read_text())
    assert len(dump["keys"]) == 12
    assert {"curv", "logit_scale"} <= dump["scalars"].keys()
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2", "3", "4"]


def test_skip_passes_over_the_batch(tmp_path):
    assert run_here(tmp_path, "train.nonfinite=skip", config_file=FAULTY) == 0
    rows = metrics(tmp_path)
    assert len(rows) == 8
    assert rows[4]["loss"] == "nan"
    assert all(float(row["loss"]) > 0 for row in rows[5:])


def test_the_budget_ends_the_skipping(tmp_path):
    arguments = ("train.nonfinite=skip", "train.nonfinite_budget=2", "dataset.at=[2,4,5]")
    with pytest.raises(NonFiniteError, match=r"train\.nonfinite_budget=2"):
        run_here(tmp_path, *arguments, config_file=FAULTY)


def test_rollback_goes_on_from_the_checkpoint_with_the_next_data(tmp_path):
    assert run_here(tmp_path, "train.nonfinite=rollback", "dataset.at=[5]", config_file=FAULTY) == 0
    text = (tmp_path / "logs" / "rank0.log").read_text()
    assert "resumed from" in text
    assert [int(row["step"]) for row in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_bad_embedding_on_one_rank_stops_both(tmp_path):
    output = run(tmp_path, "dataset.on_rank=1", processes=2, status=3, config_file=FAULTY)
    assert "not finite" in output
    assert {path.name for path in (tmp_path / "faults").iterdir()} == {
        "step_00000005_rank0.json",
        "step_00000005_rank1.json",
    }


def test_a_hung_loader_is_killed_with_its_stack(tmp_path):
    arguments = ("dataset.fault=hang", "train.watchdog_seconds=20.0")
    output = run(tmp_path, *arguments, status=86, config_file=FAULTY)
    assert "no progress for" in output
    assert "waiting for the data of step 5" in output
    assert "wait_for_a_disk_that_is_gone" in output
    assert "wait_for_a_disk_that_is_gone" in (tmp_path / "logs" / "stacks_rank0.txt").read_text()


def test_a_hung_process_ends_though_its_stacks_cannot_be_written(tmp_path):
    code = f"""
import pathlib, time
from meru_fast.training.watchdog import Watchdog
with Watchdog(0.2, pathlib.Path({str(tmp_path)!r})):  # a folder, which cannot be opened as a file
    time.sleep(200)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert finished.returncode == 86, finished.stderr
    assert 'File "<string>", line 5' in finished.stderr


@pytest.mark.slow
def test_a_hung_rank_ends_all(tmp_path):
    arguments = ("dataset.fault=hang", "dataset.on_rank=1", "train.watchdog_seconds=20.0")
    output = run(tmp_path, *arguments, processes=2, status=86, config_file=FAULTY)
    assert "wait_for_a_disk_that_is_gone" in output


def test_alarms_ring_once_while_their_condition_lasts(caplog):
    alarms = Alarms()
    collapsed = {"curv": 0.1, "text_radius": 0.5}
    for number in (10, 20):
        alarms.check(number, collapsed, {"curv": -2.302585}, min_radius=0.1)
    assert caplog.text.count("curvature sits at its bound (0.1)") == 1
    assert caplog.text.count(": the cones collapsed") == 1
    alarms.check(30, {"curv": 1.0, "text_radius": 0.7}, {}, min_radius=0.1)
    alarms.check(40, collapsed, {}, min_radius=0.1)
    assert caplog.text.count(": the cones collapsed") == 2


def test_healthy_run_rings_no_alarm(caplog):
    Alarms().check(10, {"curv": 1.0, "text_radius": 0.7, "image_radius": 1.0}, {}, min_radius=0.1)
    assert not caplog.records


def test_skipped_steps_survive_a_resume(tmp_path):
    arguments = ("train.nonfinite=skip", "dataset.at=[2,5]")
    assert run_here(tmp_path / "one", *arguments, config_file=FAULTY) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_00000008")
    assert run_here(tmp_path / "two", *arguments, config_file=FAULTY, resume="latest") == 0
    assert history(tmp_path / "one") == history(tmp_path / "two")
    assert_same_state(tmp_path / "one", tmp_path / "two", 8)
