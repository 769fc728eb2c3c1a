"""Configs: loading from anywhere, overriding, saving, instantiating; published values."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torchvision.transforms import InterpolationMode

from meru_fast import config
from meru_fast.config import ConfigError, LazyCall

PUBLISHED = [f"train_{model}_vit_{size}" for model in ("meru", "clip") for size in "sbl"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.py").write_text(
        "from meru_fast.config import LazyCall\n"
        "model = LazyCall('torch.nn.Linear')(in_features=3, out_features=4)\n"
        "train = dict(steps=100, rate=0.5, name='x', amp=True, pair=(1, 2), none=None, half='${train.rate}')\n"
    )
    (tmp_path / "sub" / "other.py").write_text("values = {'width': 7}\n")
    (tmp_path / "sub" / "top.py").write_text(
        "from ..base import model, train\nfrom .other import values as _values\nmodel.out_features = _values['width']\n"
    )
    return tmp_path


def test_relative_imports_from_any_directory(folder, monkeypatch):
    monkeypatch.chdir("/")
    before = dict(sys.modules), list(sys.path), list(sys.meta_path), __import__
    loaded = config.load(folder / "sub" / "top.py")
    assert sorted(loaded) == ["model", "train"]
    assert loaded.model.out_features == 7
    added = [name for name in sys.modules if name not in before[0]]
    assert not any("config" in name or name in ("base", "top", "other") for name in added)
    assert (list(sys.path), list(sys.meta_path), __import__) == before[1:]
    assert not list(folder.rglob("__pycache__"))


def test_every_load_is_fresh(folder):
    config.load(folder / "base.py").train.steps = 1
    assert config.load(folder / "base.py").train.steps == 100
    (folder / "base.py").write_text("train = {'steps': 200}\n")  # same second, same size class: no stale bytecode
    assert config.load(folder / "base.py").train.steps == 200


def test_a_config_may_build_on_a_packaged_one(folder):
    (folder / "mine.py").write_text(
        "from meru_fast.configs.train_meru_vit_s import dataset, model, optim, train\nmodel.embed_dim = 8\n"
    )
    assert config.load(folder / "mine.py").model.embed_dim == 8
    assert config.load("train_meru_vit_s").model.embed_dim == 512


def test_yaml_is_the_same_config(folder, tmp_path):
    loaded = config.load(folder / "sub" / "top.py", ["train.steps=5"])
    config.save(loaded, tmp_path / "run" / "config.yaml")
    again = config.load(tmp_path / "run" / "config.yaml")
    assert again == loaded
    assert config.instantiate(again.train) == config.instantiate(loaded.train)
    assert OmegaConf.to_container(again.train)["pair"] == [1, 2]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name, tmp_path):
    loaded = config.load(f"configs/{name}.py")
    arch = {"s": "vit_small_mocov3_patch16_224", "b": "vit_base_patch16_224", "l": "vit_large_patch16_224"}[name[-1]]
    assert loaded.model.visual.arch == arch
    assert loaded.model.textual.arch == "L12_W512"
    assert loaded.model.embed_dim == 512
    assert (loaded.train.total_batch_size, loaded.train.num_iterations, loaded.train.num_workers) == (2048, 120_000, 4)
    optimizer, schedule = loaded.optim.optimizer, loaded.optim.lr_scheduler
    assert (optimizer.lr, list(optimizer.betas), optimizer.weight_decay) == (5e-4, [0.9, 0.98], 0.2)
    assert optimizer.gain_bias_decay == 0.0
    assert (schedule.warmup_steps, schedule.total_steps) == (4000, 120_000)
    if "meru" in name:
        assert (loaded.model.curv_init, loaded.model.learn_curv, loaded.model.entail_weight) == (1.0, True, 0.2)
        assert list(optimizer.exclude_params) == ["logit_scale", "curv", "visual_alpha", "textual_alpha"]
    config.save(loaded, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == loaded


def test_the_saved_config_builds_the_same_optimizer_and_schedule(tmp_path):
    config.save(
        config.load("train_clip_vit_s", ["train.num_iterations=9", "optim.lr_scheduler.warmup_steps=2"]),
        tmp_path / "c.yaml",
    )
    loaded = config.load(tmp_path / "c.yaml")
    optimizer = config.instantiate(loaded.optim.optimizer, model=torch.nn.Linear(2, 2))
    schedule = config.instantiate(loaded.optim.lr_scheduler, optimizer=optimizer)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    assert schedule.total_steps == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", r"unknown config key 'train.step'; did you mean train.steps\?"),
        ("modle.in_features=3", r"did you mean model.in_features\?|did you mean model\?"),
        ("train.steps.x=3", "unknown config key"),
        ("train.steps=many", "expected int, as in train.steps=100"),
        ("train.steps=1.5", "expected int"),
        ("train.amp=1", "expected bool"),
        ("train.rate=true", "expected float"),
        ("train=3", "is a group of keys"),
        ("steps", "expected key=value"),
        ("train.name={a: 1", "not valid YAML"),
    ],
)
def test_wrong_overrides(folder, override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(folder / "base.py", [override])


def test_right_overrides(folder):
    given = [
        "train.steps=1e3",
        "train.rate=1",
        "train.name=12",
        "train.amp=false",
        "train.none=[1, a]",
        "train.pair.1=5",
    ]
    train = config.load(folder / "base.py", [*given, "+train.new.key=x", "train.half=2"]).train
    assert (train.steps, train.rate, train.name, train.amp) == (1000, 1.0, "12", False)
    assert isinstance(train.steps, int)
    assert isinstance(train.rate, float)
    assert (list(train.none), list(train.pair), train.new.key, train.half) == ([1, "a"], [1, 5], "x", 2.0)


def test_overrides_do_not_touch_the_config_given(folder):
    loaded = config.load(folder / "base.py")
    config.apply_overrides(loaded, ["train.steps=1"])
    assert loaded.train.steps == 100


def test_files_that_cannot_be_loaded(folder):
    with pytest.raises(ConfigError, match=r"no config file 'train_meru_vit_x'.*did you mean train_meru_vit_"):
        config.load("train_meru_vit_x")
    (folder / "broken.py").write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(ConfigError, match=r"broken.py: line 2: ZeroDivisionError"):
        config.load(folder / "broken.py")
    (folder / "empty.py").write_text("LIMIT = {}\n")
    with pytest.raises(ConfigError, match="holds no config"):
        config.load(folder / "empty.py")
    (folder / "evil.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match=r"evil.yaml: not valid YAML"):
        config.load(folder / "evil.yaml")
    (folder / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        config.load(folder / "list.yaml")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"a config is a \.py or \.yaml file"):
        config.load(folder / "config.json")


def test_lazy_call_records_plain_values():
    node = LazyCall(torch.nn.Linear)(a=InterpolationMode.BICUBIC, b=(1, (2, 3)), c=Path("x/y"), d={"e": None})
    assert OmegaConf.to_container(node) == {
        "_target_": "torch.nn.modules.linear.Linear",
        "a": "bicubic",
        "b": [1, [2, 3]],
        "c": "x/y",
        "d": {"e": None},
    }
    with pytest.raises(ConfigError, match="cannot be imported by name"):
        LazyCall(lambda: None)
    with pytest.raises(ConfigError, match="cannot be written to YAML"):
        LazyCall(torch.nn.Linear)(activation=torch.nn.functional.gelu)


def test_instantiate_is_recursive():
    node = LazyCall("torch.nn.Sequential")()
    layer = config.instantiate(LazyCall("torch.nn.Linear")(in_features=2, out_features=3), out_features=4)
    assert layer.out_features == 4
    assert isinstance(config.instantiate({"a": [node, 1]})["a"][0], torch.nn.Sequential)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "torch.nn.Linera"}, r"torch.nn has no 'Linera'; did you mean Linear\?"),
        ({"_target_": "no_such_module.x"}, "no module named 'no_such_module'"),
        ({"_target_": "torch.pi"}, "is not callable"),
        ({"_target_": "linear"}, "must be a dotted name"),
        ({"_target_": "torch.nn.Linear", "in_feature": 1, "out_features": 1}, r"did you mean in_features\?"),
        (OmegaConf.create({"_target_": "torch.nn.Linear", "in_features": "${nowhere}"}), "nowhere"),
    ],
)
def test_wrong_targets(node, message):
    with pytest.raises(ConfigError, match=message):
        config.instantiate(node)


def test_loading_a_config_is_light():
    """A launcher reads the config before it starts the processes: no torch needed for that."""
    code = (
        "import sys; from meru_fast import config; config.load('train_meru_vit_l'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.sep)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "meru_fast.config.load",
        "meru_fast.cli.main",
        "meru_fast.training.launch.subprocess.Popen",
        "meru_fast.data.loader.os.system",
    ],
)
def test_yaml_runs_no_foreign_code(tmp_path, monkeypatch, target):
    file = tmp_path / "config.yaml"
    file.write_text(f"model:\n  towers:\n  - {{_target_: {target}, command: touch {tmp_path}/ran}}\n")
    with pytest.raises(ConfigError, match=f"config.yaml: refused, its _target_ '{target}'.*MERU_FAST_TRUST="):
        config.load(file)
    monkeypatch.setenv("MERU_FAST_TRUST", f"mine,{target.partition('.')[0]}")
    assert config.load(file).model.towers[0]["_target_"] == target
    assert not (tmp_path / "ran").exists()


def test_yaml_makes_no_objects(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"model: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(file)
    assert not (tmp_path / "ran").exists()


KEYS = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
VALUES = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text(max_size=20)
TREES = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=4))
def test_any_config_survives_its_yaml(tree):
    """Texts that YAML could take for numbers, dates or booleans included."""
    with tempfile.TemporaryDirectory() as folder:
        call = LazyCall("torch.nn.Linear")(**dict.fromkeys(tree))
        recorded = OmegaConf.create({"train": call, "x": _quoted(tree)})
        config.save(recorded, Path(folder) / "config.yaml")
        assert config.load(Path(folder) / "config.yaml") == recorded


def _quoted(tree):
    """Dollar signs would be OmegaConf's interpolations."""
    if isinstance(tree, dict):
        return {key: _quoted(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_quoted(value) for value in tree]
    return tree.replace("$", "S") if isinstance(tree, str) else tree


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_override_is_applied_or_refused(text):
    base = OmegaConf.create({"train": {"steps": 5, "name": "a"}})
    for override in (text, f"train.steps={text}", f"train.name={text}", f"+train.new={text}"):
        try:
            changed = config.apply_overrides(base, [override])
        except ConfigError as error:
            assert str(error)  # noqa: PT017
        else:
            assert isinstance(changed.train.steps, int | None)
    assert base == {"train": {"steps": 5, "name": "a"}}
