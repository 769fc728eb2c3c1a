"""What a run leaves in its folder, and the switches of the loop."""

import csv
import math
import sys

import gradient_worker
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import TINY, history, metrics, run_here

from meru_fast import cli, config
from meru_fast.checkpoint import load_weights
from meru_fast.config import ConfigError
from meru_fast.training import deepspeed_config, launch
from meru_fast.training.loop import prepare_process
from meru_fast.training.settings import TrainSettings

EVALUATION = TINY.with_name("tiny_eval.py")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    assert run_here(folder) == 0
    return folder


def test_run_folder(plain):
    rows = metrics(plain)
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    first, last = rows[0], rows[-1]
    assert float(first["lr"]) == 0.0
    assert float(last["loss"]) < float(first["loss"])
    assert float(first["loss"]) == pytest.approx(
        float(first["contrastive_loss"]) + 0.2 * float(first["entailment_loss"]), rel=1e-6
    )
    for name in (
        "curv",
        "logit_scale",
        "grad_norm",
        "img_per_s",
        "data_wait",
        "text_radius",
        "cone_violation",
        "epoch",
    ):
        assert math.isfinite(float(last[name])), name
    environment = (plain / "environment.txt").read_text()
    assert f"torch     {torch.__version__.split('+')[0]}" in environment
    assert "train_micro_batch_size_per_gpu: 12" in environment
    assert config.load(plain / "config.yaml") == config.load(TINY)
    log = (plain / "logs" / "rank0.log").read_text()
    assert "333 batches of 12 per epoch" in log
    assert "8/8" in log
    assert "ETA" in log


def test_tensorboard_holds_the_same_numbers(plain):
    events = EventAccumulator(str(plain / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(int(row["step"]), pytest.approx(float(row["loss"]))) for row in metrics(plain)]


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_does_not_change_the_training(plain, tmp_path, stage):
    overrides = ("train.eval_period=3", f"train.eval_config={EVALUATION}", f"train.zero_stage={stage}")
    assert run_here(tmp_path, *overrides) == 0
    with (tmp_path / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6"]
    assert rows[0]["separation"] != rows[1]["separation"]
    # The norm is summed in another order by another stage; all else is the same to the last bit.
    assert [row[:-1] for row in history(tmp_path)] == [row[:-1] for row in history(plain)]


def test_zero_shot_on_own_pictures_while_training(plain, tmp_path):
    for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / "colours" / label).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (20, 20), colour).save(tmp_path / "colours" / label / f"{index}.png")
    own = f"{{name: colours, kind: folder, root: {tmp_path / 'colours'}, prompts: ['a {{}} picture']}}"
    overrides = ("train.eval_period=8", "train.eval_config=eval_zero_shot_classification")
    assert run_here(tmp_path / "run", *overrides, f'train.eval_overrides=["evaluator.datasets=[{own}]"]') == 0
    with (tmp_path / "run" / "evaluation.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    scores = [float(value) for name, value in row.items() if name.startswith("colours/")]
    assert scores
    assert all(0 <= score <= 1 for score in scores)
    assert history(tmp_path / "run") == history(plain)


def test_a_failing_evaluation_does_not_end_the_run(plain, tmp_path):
    overrides = ("train.eval_period=4", "train.eval_config=eval_zero_shot_classification")
    assert run_here(tmp_path, *overrides, f"train.eval_overrides=['evaluator.data_dir={tmp_path}/none']") == 0
    assert history(tmp_path) == history(plain)
    assert "the evaluation at step 4 failed, training goes on" in (tmp_path / "logs" / "rank0.log").read_text()


def test_accumulation_trains_the_same(plain, tmp_path):
    assert run_here(tmp_path, "train.accumulation_steps=3") == 0
    for one, other in zip(metrics(tmp_path), metrics(plain), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=2e-5)
        assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_clipping_bounds_the_step_not_the_logged_norm(tmp_path, stage):
    overrides = (f"train.zero_stage={stage}", "train.gradient_clipping=1e-3", "train.num_iterations=3")
    assert run_here(tmp_path, *overrides) == 0
    assert all(float(row["grad_norm"]) > 1 for row in metrics(tmp_path))
    clipped, _ = weights(tmp_path, 3)
    unclipped_folder = tmp_path / "unclipped"
    assert run_here(unclipped_folder, *overrides[::2]) == 0
    unclipped, _ = weights(unclipped_folder, 3)
    # Adam's step hardly depends on the gradient's size, but its eps does now: the two runs must differ.
    assert not torch.equal(clipped["visual_proj.weight"], unclipped["visual_proj.weight"])


def weights(folder, step, ema=False):
    model = config.instantiate(config.load(TINY).model)
    info = load_weights(model, folder / "checkpoints" / f"step_{step:08d}", ema=ema)
    return model.state_dict(), info


def test_frozen_parameters_stay_and_the_rest_learns(tmp_path):
    assert run_here(tmp_path, "train.freeze=['visual.*', 'curv']", "train.checkpoint_period=1") == 0
    before, _ = weights(tmp_path, 6)
    after, _ = weights(tmp_path, 8)
    for name in before:
        frozen = name.startswith("visual.") or name in ("curv", "pixel_mean", "pixel_std", "textual.attn_mask")
        assert torch.equal(before[name], after[name]) == frozen, name


def test_a_freeze_pattern_without_match_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no parameter matches 'vision"):
        run_here(tmp_path, "train.freeze=['vision.*']")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_average_of_the_weights(tmp_path, stage):
    overrides = (f"train.zero_stage={stage}", "train.ema_decay=0.5", "train.checkpoint_period=1")
    assert run_here(tmp_path, *overrides, "train.keep_checkpoints=0", "train.num_iterations=4") == 0
    expected, _ = weights(tmp_path, 1)  # rate 0: equal to the initial weights
    for step in range(1, 5):
        now, _ = weights(tmp_path, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    average, _ = weights(tmp_path, 4, ema=True)
    for name in expected:
        torch.testing.assert_close(average[name].float(), expected[name].float(), rtol=1e-5, atol=1e-6)


def test_start_from_weights(plain, tmp_path):
    assert run_here(tmp_path, f"train.init_from={plain}", "train.num_iterations=3") == 0
    assert float(metrics(tmp_path)[0]["loss"]) < float(metrics(plain)[0]["loss"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_scalars_stay_within_their_bounds_on_every_copy(stage):
    """A rate that throws the scalars far beyond their bounds: the copies that ZeRO updates end on them as well."""
    with launch.process_environment(launch.Place.alone()):
        prepare_process(TrainSettings(), on_gpu=False)
        engine = gradient_worker.engine(stage, accumulation=1, lr=50.0)
        for _ in range(2):
            assert engine.step(*gradient_worker.batch()).applied
        found = engine.full_parameters()
        on_bound = engine.scalars_at_bound()
        engine.close()
    assert "curv" in on_bound
    assert abs(float(found["curv"])) == pytest.approx(math.log(10))
    assert float(found["visual_alpha"]) <= 0
    assert float(found["logit_scale"]) <= math.log(100) + 1e-6


def test_a_missing_wandb_is_reported_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python notes that a package cannot be imported
    with pytest.raises(ConfigError, match=r"train\.wandb=meru: the wandb package is not installed"):
        run_here(tmp_path / "run", "train.wandb=meru")
    assert not (tmp_path / "run").exists()


def test_deepspeeds_own_optimizer_and_schedule(tmp_path):
    given = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": "auto"}},
    }
    assert run_here(tmp_path, ds_config=given) == 0
    assert float(metrics(tmp_path)[-1]["lr"]) == pytest.approx(3e-3)


@pytest.mark.parametrize("name", ["one_gpu.json", "eight_gpus.json", "multi_node.json", "cpu_offload.json"])
def test_packaged_deepspeed_configs_train(tmp_path, name):
    assert run_here(tmp_path, "train.num_iterations=3", ds_config=deepspeed_config.read(name)) == 0
    assert len(metrics(tmp_path)) == 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_trains(tmp_path, stage):
    given = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    assert run_here(tmp_path, ds_config=given) == 0
    rows = metrics(tmp_path)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_activation_checkpointing_of_both_towers_changes_nothing(plain, tmp_path):
    overrides = ("model.visual.grad_checkpointing=true", "model.textual.grad_checkpointing=true")
    assert run_here(tmp_path, "+" + overrides[0], overrides[1]) == 0
    for one, other in zip(metrics(tmp_path), metrics(plain), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)


@pytest.mark.slow
def test_compiled_image_tower_trains_the_same(plain, tmp_path):
    assert run_here(tmp_path, "train.compile=true") == 0
    for one, other in zip(metrics(tmp_path), metrics(plain), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3)


def test_dry_run_builds_nothing(tmp_path, capsys):
    arguments = ["--config", str(TINY), "--output-dir", str(tmp_path / "none"), "--dry-run"]
    assert launch.main([*arguments, "train.accumulation_steps=2"]) == 0
    output = capsys.readouterr().out
    assert "gradient_accumulation_steps: 2" in output
    assert "4,000 pairs, 333 batches of 12 per epoch; 8 steps are 0.02 epochs" in output
    assert "stage   weights gradients optimizer" in output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.total_batchsize=3"], "did you mean train.total_batch_size?"),
        (["train.keep_checkpoints=-2"], "train.keep_checkpoints=-2: must not be negative"),
        (["--output-dir", str(TINY)], "tiny_meru.py: cannot be written to"),
        (["train.nonfinite=ignore"], "choose one of raise, skip, rollback"),
        (["--resume"], "no undamaged checkpoint"),
        (["train.num_iterations=2"], "warmup_steps=2 must be at least 0 and less than total_steps=2"),
        (["dataset.shards=/no/such/*.tar"], "/no/such/*.tar"),
        (["--deepspeed_config", "no.json"], "no DeepSpeed config 'no.json'"),
        (["--num-machines", "2"], "tcp://HOST:PORT"),
        (["--num-gpus", "2", "train.seeds=1"], "did you mean train.seed?"),
        (["--dry-run", "dataset.shards=/no/such/*.tar"], "/no/such/*.tar"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        launch.main(["--config", str(TINY), "--output-dir", str(tmp_path / "none"), *arguments])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_debug_shows_where_an_error_came_from(tmp_path, capsys):
    arguments = ["train", "--config", str(TINY), "--output-dir", str(tmp_path), "train.zero_stage=7"]
    assert cli.main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["--debug", *arguments]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "ConfigError: train.zero_stage=7" in shown
