"""The DeepSpeed JSON: filled, passed through, and refused where it contradicts itself or the config."""

import json
from pathlib import Path

import pytest

from meru_fast.config import ConfigError
from meru_fast.training import deepspeed_config
from meru_fast.training.settings import TrainSettings

PACKAGED = sorted((Path(deepspeed_config._packaged_folder())).glob("*.json"))


def resolve(given: dict, world_size: int = 2, on_gpu: bool = True, **settings) -> dict:
    values = {"total_batch_size": 64} | settings
    return deepspeed_config.resolve(given, TrainSettings(**values), world_size, on_gpu)


def test_without_json_everything_comes_from_the_config():
    config = resolve({}, accumulation_steps=4, gradient_clipping=0.5, zero_stage=2)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 2
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def test_a_cpu_trains_in_fp32():
    assert deepspeed_config.precision(resolve({}, on_gpu=False)) == "fp32"
    auto = {"torch_autocast": {"enabled": "auto"}}
    assert deepspeed_config.precision(resolve(auto, on_gpu=False)) == "fp32"


@pytest.mark.parametrize("given", [{}, {"fp16": {"loss_scale_window": 50}}, {"torch_autocast": {"enabled": "auto"}}])
def test_float16_is_deepspeeds_own_mode(given):
    config = resolve(given, amp_dtype="float16")
    assert deepspeed_config.precision(config) == "fp16"
    assert config["fp16"] == {"enabled": True} | given.get("fp16", {})
    assert deepspeed_config.precision(resolve(given, amp_dtype="float16", on_gpu=False)) == "fp32"


def test_unknown_keys_reach_deepspeed_untouched():
    given = {"comms_logger": {"enabled": True}, "zero_optimization": {"stage": 3, "sub_group_size": 7}}
    config = resolve(given)
    assert config["comms_logger"] == {"enabled": True}
    assert config["zero_optimization"] == {"stage": 3, "sub_group_size": 7}


def test_auto_that_only_deepspeed_can_fill_is_left_to_it():
    config = resolve({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    assert "reduce_bucket_size" not in config["zero_optimization"]


def test_optimizer_and_scheduler_blocks_are_filled_from_the_config():
    given = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": 0.05}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}},
    }
    optim = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.2, "warmup_steps": 10}
    config = deepspeed_config.resolve(given, TrainSettings(total_batch_size=64), 2, True, optim)
    assert config["optimizer"]["params"] == {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.05}
    assert config["scheduler"]["params"] == {"warmup_num_steps": 10, "warmup_max_lr": 1e-3}


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"train_batch_size": 32}, {}, "train_batch_size=32"),
        ({}, {"total_batch_size": 63}, "62 would be"),
        ({"train_micro_batch_size_per_gpu": 5}, {}, "5 x gradient_accumulation_steps=1 x 2 processes is 10"),
        ({"gradient_accumulation_steps": 2}, {"accumulation_steps": 4}, "gradient_accumulation_steps=2"),
        ({"gradient_clipping": 1.0}, {"gradient_clipping": 0.5}, "gradient_clipping=1.0"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, "choose one"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, {}, "trains wrongly"),
        ({"bf16": {"enabled": True}}, {"amp": False}, "train.amp=false"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, {}, "stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "needs stage 3, not 2"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage=4"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, {}, "float16 discards every step"),
        ({"torch_autocast": {"enabled": True}}, {"amp_dtype": "float16"}, "float16 discards every step"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, {}, r"bf16\.check_grad_overflow=false"),
        ({"zero_optimization": {"compute_grad_norm": False}}, {}, r"zero_optimization\.compute_grad_norm=false"),
        ({"checkpoint": {"load_universal": True}}, {}, "load_universal"),
        ({"managed_gradient_accumulation": False}, {}, "managed_gradient_accumulation"),
        ({"zero_optimization": 2}, {}, "zero_optimization=2 should be an object"),
        ({"zero_optimization": {"stage": "two"}}, {}, r"zero_optimization\.stage='two' should be a whole number"),
        ({"gradient_accumulation_steps": 0}, {}, "gradient_accumulation_steps=0 should be"),
        ({"train_batch_size": "64"}, {}, "train_batch_size='64' should be"),
    ],
)
def test_contradictions_are_errors(given, settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve(given, **settings)


def test_fp16_on_a_cpu_is_an_error():
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        resolve({"fp16": {"enabled": True}}, on_gpu=False)


def test_all_contradictions_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        resolve({"train_batch_size": 32, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}})
    assert "train_batch_size=32" in str(caught.value)
    assert "trains wrongly" in str(caught.value)


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_packaged_configs_resolve(path, on_gpu):
    config = resolve(deepspeed_config.read(path), on_gpu=on_gpu)
    assert '"auto"' not in json.dumps(config)
    assert deepspeed_config.read(path.name) == json.loads(path.read_text())


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json.*one_gpu\.json"):
        deepspeed_config.read(tmp_path / "nowhere.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json: not valid JSON"):
        deepspeed_config.read(broken)
