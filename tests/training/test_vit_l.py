"""The full published ViT-L config on a CPU: it builds, steps and saves, in the memory that the dry run says."""

import shutil

import pytest
import torch
from training_runs import metrics, run

from meru_fast import config
from meru_fast.checkpoint import load_weights
from meru_fast.training import report
from meru_fast.training.checkpoints import verify

PARAMETERS = 367_254_020

# GB that may come on top of the model states: interpreter, torch, DeepSpeed, activations at batch 2. ZeRO 3 adds its
# communication buckets (2 GB each), and offloading a second home of gradients: on a CPU both sides are the same memory.
BESIDE, BESIDE_OFFLOADED = 3.5, 7.0


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("stage", "ds_config", "beside"),
    [(1, [], BESIDE), (3, ["--deepspeed_config", "cpu_offload.json"], BESIDE_OFFLOADED)],
)
def test_vit_l_trains_at_batch_2(tmp_path, stage, ds_config, beside):
    overrides = (
        "dataset.shards=synthetic",
        "train.total_batch_size=2",
        "train.num_iterations=2",
        "train.num_workers=0",
    )
    more = ("optim.lr_scheduler.warmup_steps=1", "train.log_period=1", "train.checkpoint_async=false")
    output = run(tmp_path, *overrides, *more, *ds_config, config_file="train_meru_vit_l", timeout=1400, threads=2)
    assert "MERU with 367.3 M parameters" in output
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2"]

    estimate = sum(report.state_bytes(PARAMETERS, PARAMETERS, stage, 1, "fp32").values()) / 1e9
    measured = max(float(row["memory_gb"]) for row in rows)
    print(f"stage {stage}: estimate {estimate:.2f} GB of model states, {measured:.2f} GB resident")
    assert estimate < measured < estimate + beside

    step = tmp_path / "checkpoints" / "step_00000002"
    verify(step)
    with torch.device("meta"):
        model = config.instantiate(config.load("train_meru_vit_l").model)
    model.to_empty(device="cpu")
    load_weights(model, step)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    shutil.rmtree(tmp_path)
