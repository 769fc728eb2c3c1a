"""Export of any checkpoint, back and forth, with a model card that says what the run knew."""

from pathlib import Path

import pytest
import small_models
import torch
from omegaconf import OmegaConf

from meru_fast import checkpoint, config
from meru_fast.models import CLIP, MERU
from meru_fast.models.export import export


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, saved at step 20 with ZeRO 0 (one file of weights)."""
    model = small_models.meru(3)
    step = tmp_path / "run" / "checkpoints" / "step_00000020"
    step.mkdir(parents=True)
    torch.save({"module": model.state_dict()}, step / "mp_rank_00_model_states.pt")
    (step.parent / "latest").write_text(step.name)
    recorded = OmegaConf.merge(
        config.load("train_meru_vit_s"), {"model": model.hub_config(), "dataset": {"shards": "s.tar"}}
    )
    config.save(recorded, tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "metrics.csv").write_text("step,loss,image_radius\n10,3.5,0.9\n20,2.25,1.1\n30,1.5,1.2\n")
    return tmp_path / "run"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_run_to_hub_folder(run, tmp_path):
    info = export(run, tmp_path / "out" / "meru_small")
    assert (info.kind, info.iteration) == ("deepspeed", 20)
    folder = tmp_path / "out" / "meru_small"
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert same(MERU.from_pretrained(folder), small_models.meru(3))
    assert checkpoint.read_checkpoint(folder)[1].iteration == 20
    text = (folder / "README.md").read_text()
    for part in (
        "library_name: meru_fast",
        "# meru_small",
        "| steps | 20 |",
        "| dataset.shards | s.tar |",
        "| train.total_batch_size | 2048 |",
        "| training loss | 2.25 |",
        "| curv | 1 |",
        "vit_tiny_patch16_224",
        "Not measured yet",
        "arXiv:2304.09172",
    ):
        assert part in text, part


def test_the_code_of_the_card_runs(run, tmp_path):
    export(run, tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```")[1].removeprefix("python")
    names: dict = {}
    exec(code.replace("PATH OR HUB ID", str(tmp_path / "out")), names)
    assert names["scores"].shape == (1, 1)


def test_to_the_published_layout_and_back(run, tmp_path):
    export(run, tmp_path / "meru.pth")
    content = torch.load(tmp_path / "meru.pth")
    assert content["iteration"] == 20
    assert content["model"]["curv"].shape == ()
    info = export(tmp_path / "meru.pth", tmp_path / "back", config.load(run / "config.yaml").model)
    assert info.kind == "published"
    assert same(MERU.from_pretrained(tmp_path / "back"), small_models.meru(3))
    assert "Not recorded." in (tmp_path / "back" / "README.md").read_text()


def test_the_root_of_published_clip_files_is_kept(tmp_path):
    model = small_models.clip()
    checkpoint.save_published(tmp_path / "clip.pth", model.state_dict(), 7, torch.arange(32.0))
    export(tmp_path / "clip.pth", tmp_path / "clip")
    assert torch.equal(checkpoint.read_checkpoint(tmp_path / "clip")[1].root, torch.arange(32.0))
    assert same(CLIP.from_pretrained(tmp_path / "clip"), model)
    export(tmp_path / "clip", tmp_path / "again.pth")
    assert torch.equal(torch.load(tmp_path / "again.pth")["root"], torch.arange(32.0))


def test_save_pretrained_writes_a_card(tmp_path):
    small_models.clip().save_pretrained(tmp_path)
    assert "# CLIP" in (tmp_path / "README.md").read_text()
