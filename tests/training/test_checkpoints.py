"""Checkpoints: complete or not there, checked before use, kept as asked, and never the end of a run."""

import hashlib
import itertools
import json
import logging
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_state, forget_after, history, run_here

from meru_fast.checkpoint import CheckpointError
from meru_fast.training import checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 8 steps with checkpoints at 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_here(folder, "train.checkpoint_period=2", "train.keep_checkpoints=0") == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step_{number:08d}"


def test_manifest_lists_every_file_and_what_made_it(finished):
    manifest = checkpoints.verify(step(finished, 8))
    assert manifest.step == 8
    assert manifest.world_size == 1
    assert set(manifest.files) == {path.name for path in step(finished, 8).iterdir()} - {"manifest.json"} - {
        "zero_to_fp32.py",
        "zero_to_torch.py",
    }
    assert {"config.yaml", "rank_00000.pt", "mp_rank_00_model_states.pt"} <= set(manifest.files)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(("rank_00000.pt", "mp_rank_00_model_states.pt"), (truncate, flip_a_bit, Path.unlink)),
        *itertools.product(("manifest.json",), (truncate, Path.unlink)),
    ],
)
def test_damage_is_found_and_the_one_before_is_taken(folder, caplog, name, damage):
    damage(step(folder, 8) / name)
    with caplog.at_level(logging.WARNING, "meru_fast"):
        assert checkpoints.find("auto", folder) == step(folder, 6)
    assert "step_00000008" in caplog.text
    with pytest.raises(CheckpointError, match="step_00000008"):
        checkpoints.find(str(step(folder, 8)), folder)


class Intruder:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["rank_00000.pt", "mp_rank_00_model_states.pt"])
def test_a_run_folder_from_elsewhere_runs_no_code(folder, tmp_path, name):
    """With a manifest that vouches for it."""
    file = step(folder, 8) / name
    torch.save(torch.load(file, weights_only=False) | {"intruder": Intruder(tmp_path / "ran")}, file)
    manifest = step(folder, 8) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="refused, its pickle names"):
        run_here(folder, "train.num_iterations=9", resume="auto")
    assert not (tmp_path / "ran").exists()


def test_a_latest_that_names_nothing_does_not_matter(folder):
    (folder / "checkpoints" / "latest").write_text("step_00000099")
    assert checkpoints.find("latest", folder) == step(folder, 8)


def test_nothing_good_is_an_error_for_latest_and_a_start_for_auto(folder):
    for path in (folder / "checkpoints").glob("step_*"):
        (path / "manifest.json").unlink()
    assert checkpoints.find("auto", folder) is None
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        checkpoints.find("latest", folder)


def test_a_fresh_start_over_a_run_is_an_error(folder):
    with pytest.raises(CheckpointError, match="--resume"):
        run_here(folder)


def test_resume_from_a_chosen_checkpoint_of_another_run(folder, tmp_path):
    assert run_here(tmp_path / "branch", resume=str(step(folder, 4))) == 0
    assert history(tmp_path / "branch") == history(folder)[4:]


def test_another_stage_is_an_error_that_says_what_to_do(folder):
    forget_after(folder, 4)
    with pytest.raises(CheckpointError, match=r"saved with zero_stage 1, this run has 2.*train\.init_from"):
        run_here(folder, "train.zero_stage=2", resume="latest")


@pytest.mark.parametrize("stage", [1, 3])
def test_another_model_is_an_error_that_names_a_parameter(finished, tmp_path, stage):
    if stage == 3:
        assert run_here(tmp_path / "there", "train.zero_stage=3", "train.num_iterations=3") == 0
    there = finished if stage == 1 else tmp_path / "there"
    with pytest.raises(CheckpointError, match=r"visual_proj\.weight, \(16, 32\) there and \(8, 32\) here"):
        run_here(tmp_path / "here", "model.embed_dim=8", f"train.zero_stage={stage}", resume=str(there))


def test_what_a_kill_left_behind_is_neither_used_nor_kept(folder):
    root = folder / "checkpoints"
    forget_after(folder, 4)
    for name in (".saving_step_00000006", ".removing_step_00000002", ".universal_step_00000002"):
        shutil.copytree(step(folder, 4), root / name)
    assert checkpoints.find("latest", folder) == step(folder, 4)
    assert run_here(folder, resume="latest") == 0
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]


def test_retention_keeps_the_newest_and_the_milestones(tmp_path):
    overrides = ("train.checkpoint_period=1", "train.keep_checkpoints=2", "train.keep_period=3")
    assert run_here(tmp_path, *overrides) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == [
        f"step_{number:08d}" for number in (3, 6, 7, 8)
    ]


def test_writing_beside_training_saves_the_same(finished, tmp_path):
    assert (
        run_here(tmp_path, "train.checkpoint_period=2", "train.keep_checkpoints=0", "train.checkpoint_async=false") == 0
    )
    for number in (2, 4, 6, 8):
        assert_same_state(finished, tmp_path, number)


def test_saving_by_minutes(tmp_path):
    assert (
        run_here(tmp_path, "train.checkpoint_period=100", "train.checkpoint_minutes=0.0001", "train.num_iterations=6")
        == 0
    )
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 3  # kept; without the minutes there would be one


@pytest.mark.parametrize("limit", [1_000_000, 20_000])
def test_a_full_disk_warns_and_the_run_goes_on(tmp_path, limit):
    """Files may not grow beyond the limit, as if the disk ended there: the system fails a write in its midst. The
    lower limit fails the scripts that DeepSpeed adds as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert run_here(tmp_path) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(history(tmp_path)) == 8
    assert "could not be saved, training goes on" in (tmp_path / "logs" / "rank0.log").read_text()
    assert not list((tmp_path / "checkpoints").glob("*step_*"))


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".removing_step_00000004").write_text("in the way")
    assert run_here(tmp_path, "train.keep_checkpoints=1") == 0
    assert "step_00000004 could not be removed, training goes on" in (tmp_path / "logs" / "rank0.log").read_text()
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000008"


def test_weights_of_a_run_load_into_a_model(finished):
    from training_runs import TINY

    from meru_fast import config
    from meru_fast.checkpoint import load_weights

    model = config.instantiate(config.load(TINY).model)
    info = load_weights(model, finished)
    assert info.iteration == 8


def test_manifest_is_readable_json(finished):
    contents = json.loads((step(finished, 8) / "manifest.json").read_text())
    assert contents["files"]["rank_00000.pt"].keys() == {"bytes", "sha256"}
