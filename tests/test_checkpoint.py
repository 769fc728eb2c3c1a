"""Every kind of checkpoint loads; everything else is refused with the file and the fault."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import small_models
import torch
from eval_models import noise
from torch import nn

from meru_fast import checkpoint, config
from meru_fast.checkpoint import CheckpointError
from meru_fast.evaluation import main as evaluate
from meru_fast.evaluation.retrieval import ZeroShotRetrieval
from meru_fast.models import CLIP, MERU

SUPPORT = Path(__file__).parent / "support"


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(a, b) for (name, a), (twin, b) in pairs)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A file as the published code wrote it, with optimiser, schedule and scaler, and the "root" of CLIP files."""
    model = small_models.clip(seed=3)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "iteration": 120000,
        "root": torch.arange(32.0),
    }
    file = tmp_path_factory.mktemp("published") / "clip_vit.pth"
    torch.save(content, file)
    return file


def test_published_file(published):
    model = small_models.clip()
    info = checkpoint.load_weights(model, published)
    assert same_weights(model, small_models.clip(seed=3))
    assert (info.kind, info.iteration, info.file) == ("published", 120000, published)
    assert torch.equal(info.root, torch.arange(32.0))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_bare_state_dict(tmp_path, prefix):
    torch.save({prefix + name: value for name, value in small_models.meru(3).state_dict().items()}, tmp_path / "w.pt")
    model = small_models.meru()
    assert checkpoint.load_weights(model, tmp_path / "w.pt").kind == "weights"
    assert same_weights(model, small_models.meru(3))


@pytest.mark.parametrize("what", ["", "model.safetensors"])
def test_export(tmp_path, what):
    small_models.meru(3).save_pretrained(tmp_path)
    model = small_models.meru()
    info = checkpoint.load_weights(model, tmp_path / what)
    assert same_weights(model, small_models.meru(3))
    assert (info.kind, info.file) == ("export", tmp_path / "model.safetensors")
    assert info.model.visual.depth == 2


def test_published_layout_round_trip(tmp_path, published):
    model, info = checkpoint.load_model(published)
    checkpoint.save_published(tmp_path / "again.pth", model.state_dict(), info.iteration, info.root)
    first, second = torch.load(published), torch.load(tmp_path / "again.pth")
    assert second["iteration"] == first["iteration"]
    assert torch.equal(second["root"], first["root"])
    assert list(second["model"]) == list(first["model"])
    assert all(torch.equal(a, b) for a, b in zip(first["model"].values(), second["model"].values(), strict=True))
    assert second["model"]["logit_scale"].shape == ()


@pytest.fixture(scope="module")
def deepspeed_runs(tmp_path_factory) -> Path:
    """Real runs of two processes at ZeRO 0 to 3."""
    folder = tmp_path_factory.mktemp("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, SUPPORT / "deepspeed_folders.py", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("stage", ["0", "1", "2", "3", "2_bf16"])
@pytest.mark.parametrize("what", ["", "checkpoints", "checkpoints/step_00000002"])
def test_deepspeed_folder(deepspeed_runs, stage, what):
    expected = torch.load(deepspeed_runs / f"stage{stage}.pt")
    model, info = checkpoint.load_model(deepspeed_runs / f"stage{stage}" / what)
    assert (info.kind, info.iteration) == ("deepspeed", 2)
    assert info.model.embed_dim == 8  # from the run's own config.yaml
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.view(found[name].shape)), name


@pytest.mark.parametrize("stage", ["0", "1", "2", "3", "2_bf16"])
def test_evaluate_takes_a_folder_of_every_stage(deepspeed_runs, stage, tmp_path, capsys):
    rows = []
    for number in range(12):
        noise(number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"picture number {number}"})
    scenes = {"name": "scenes", "kind": "manifest", "root": str(tmp_path / "scenes.json")}
    (tmp_path / "scenes.json").write_text(json.dumps(rows))
    run = deepspeed_runs / f"stage{stage}"
    output = tmp_path / "out"
    given = ["--config", "eval_zero_shot_retrieval", "--checkpoint-path", str(run), "--output-dir", str(output)]
    evaluate([*given, "--device", "cpu", f"evaluator.datasets=[{json.dumps(scenes)}]"])
    assert "guessed" not in capsys.readouterr().out  # a run folder says what it is
    (file,) = output.rglob("*.json")
    model = config.instantiate(config.load(run / "config.yaml").model)
    checkpoint.fit_state(model, torch.load(deepspeed_runs / f"stage{stage}.pt"), run)
    expected = ZeroShotRetrieval([scenes])(model.eval())
    found = json.loads(file.read_text())["metrics"]
    assert {f"scenes/{name}": value for name, value in found.items()} == pytest.approx(expected)


def test_averaged_weights(deepspeed_runs, tmp_path):
    step = deepspeed_runs / "stage1" / "checkpoints" / "step_00000002"
    with pytest.raises(CheckpointError, match=r"keeps no averaged weights \(train.ema_decay was 0\)"):
        checkpoint.read_checkpoint(step, ema=True)
    average = {name: value * 0.5 for name, value in torch.load(deepspeed_runs / "stage1.pt").items()}
    torch.save({"model": average, "updates": 2}, step / "ema.pt")
    state, _ = checkpoint.read_checkpoint(deepspeed_runs / "stage1", ema=True)
    assert torch.equal(state["visual_proj.weight"], average["visual_proj.weight"])
    small_models.meru().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="one set of weights"):
        checkpoint.read_checkpoint(tmp_path, ema=True)


def test_deepspeed_shards_with_foreign_objects_are_refused(deepspeed_runs):
    file = next((deepspeed_runs / "stage3" / "checkpoints" / "step_00000002").glob("*rank_1*optim_states.pt"))
    kept = file.read_bytes()
    torch.save({"a": Path("x")}, file)
    try:
        with pytest.raises(CheckpointError, match=rf"{file.name}: refused, its pickle names pathlib"):
            checkpoint.read_checkpoint(deepspeed_runs / "stage3")
        file.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(CheckpointError, match=rf"{file.name}: truncated"):
            checkpoint.read_checkpoint(deepspeed_runs / "stage3")
        file.unlink()
        with pytest.raises(CheckpointError, match="cannot join the shards"):
            checkpoint.read_checkpoint(deepspeed_runs / "stage3")
    finally:
        file.write_bytes(kept)


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("code from a checkpoint was run",))


def test_files_that_are_no_checkpoint(tmp_path, published):
    whole = published.read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "half.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    torch.save({"model": Dangerous()}, tmp_path / "evil.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "other.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "stale" / "checkpoints").mkdir(parents=True)
    (tmp_path / "stale" / "checkpoints" / "latest").write_text("step_00000009")
    for name, fault in {
        "half.pth": "truncated or not a PyTorch file",
        "empty.pth": "truncated or not a PyTorch file",
        "text.pth": "truncated or not a PyTorch file",
        "half.safetensors": "truncated or not a safetensors file",
        "evil.pth": r"refused, its pickle names .*fail",
        "tensor.pth": "holds a Tensor, expected a dictionary",
        "other.pth": r"neither a state dict nor a dictionary with .model. \(keys: epoch, loss\)",
        "folder": "no checkpoint here",
        "stale": "'step_00000009', which is no complete",
        "missing.pth": "no such file or folder",
    }.items():
        with pytest.raises(CheckpointError, match=fault) as caught:
            checkpoint.read_checkpoint(tmp_path / name)
        assert name in str(caught.value)


def test_no_pretrained_tower_is_fetched_to_be_overwritten(tmp_path):
    model = small_models.meru()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    node = model.hub_config()
    node["visual"] |= {"pretrained": True, "use_sincos2d_pos": False}
    assert same_weights(checkpoint.load_model(tmp_path / "w.pt", node)[0], model)


def test_another_architecture_is_named(published):
    with pytest.raises(CheckpointError, match=r"does not fit this MERU: lacks curv, .*look like CLIP"):
        checkpoint.load_weights(small_models.meru(), published)
    with pytest.raises(CheckpointError, match=r"visual_proj.weight is \[32, 64\], the model has \[16, 64\]"):
        checkpoint.load_weights(small_models.clip(embed_dim=16), published)


@pytest.mark.parametrize("name", [f"train_{model}_vit_{size}" for model in ("meru", "clip") for size in "sbl"])
def test_guess_published_architectures(name):
    node = config.load(name).model
    with torch.device("meta"):
        state = config.instantiate(config.load(name, ["model.visual.use_sincos2d_pos=false"]).model).state_dict()
    if "curv" in state:
        state["curv"] = torch.tensor(-0.5)
    guess = checkpoint.guess_model(state)
    assert guess._target_ == node._target_
    assert guess.visual.arch == node.visual.arch
    assert guess.textual.arch == node.textual.arch
    assert guess.embed_dim == node.embed_dim
    assert set(guess.visual) == {"_target_", "arch", "global_pool"}


def test_guess_other_sizes():
    torch.manual_seed(0)
    model = small_models.meru(curv_init=40.0)
    rebuilt = config.instantiate(checkpoint.guess_model(model.state_dict()))
    checkpoint.fit_state(rebuilt, model.state_dict(), "here")
    assert rebuilt.scalar("curv").item() == pytest.approx(40.0)
    with pytest.raises(CheckpointError, match="not the weights of a MERU or CLIP model"):
        checkpoint.guess_model({"weight": torch.zeros(2)})


def test_hub_conventions(tmp_path):
    model = small_models.meru(3, min_radius=0.2).eval()
    model.save_pretrained(tmp_path)
    again = MERU.from_pretrained(tmp_path)
    assert same_weights(model, again)
    assert (again.min_radius, again.entail_weight, again.training) == (0.2, 0.2, False)
    images, tokens = small_models.images(2), small_models.captions(2)
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))
    with pytest.raises(CheckpointError, match=r"holds a MERU: use MERU.from_pretrained"):
        CLIP.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json"):
        MERU.from_pretrained(tmp_path)


def test_from_the_hub_by_its_cache(tmp_path):
    """A Hub id, with the files already in the local cache as the Hub client lays them out."""
    repository, commit = tmp_path / "models--someone--meru", "0" * 40
    small_models.meru(3).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = MERU.from_pretrained("someone/meru", cache_dir=tmp_path, local_files_only=True)
    assert same_weights(found, small_models.meru(3))


def test_an_export_cannot_name_foreign_code(tmp_path):
    small_models.meru().save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())
    recorded["visual"] = {"_target_": "meru_fast.models.clip.os.system", "command": "false"}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    for read in (checkpoint.load_model, MERU.from_pretrained):
        with pytest.raises(CheckpointError, match=r"refused, it names 'meru_fast.models.clip.os.system'"):
            read(tmp_path)


def test_a_tower_without_recipe_cannot_be_exported(tmp_path):
    model = small_models.meru()
    del model.visual.recipe
    with pytest.raises(ValueError, match="the visual tower does not say how it was built"):
        MERU(model.visual, model.textual, 32).save_pretrained(tmp_path)
