"""Every example runs as its own docstring says, in a process of its own, in an empty folder."""

import csv
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from meru_fast import checkpoint, config
from meru_fast.data import build_loader

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder: Path, *arguments: str, status: int = 0, launcher: tuple[str, ...] = (sys.executable,)) -> str:
    script, *rest = arguments
    run = subprocess.run(
        [*launcher, str(EXAMPLES / script), *rest],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == status, run.stdout + run.stderr
    return run.stdout if status == 0 else run.stderr


def percent(output: str) -> float:
    return float(re.search(r"accuracy ([\d.]+)%", output)[1])


def test_plain_pytorch_learns_digits_and_their_hierarchy(tmp_path):
    output = run(tmp_path, "plain_pytorch.py")
    assert percent(output) > 85
    images, special, general = map(float, re.findall(r"root: ([\d.]+)", output))
    assert general < special < images
    assert len((EXAMPLES / "plain_pytorch.py").read_text().splitlines()) <= 60


def test_accelerate_computes_the_same_on_two_processes_as_on_one(tmp_path):
    alone = run(tmp_path, "accelerate_loop.py")
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    together = run(tmp_path, "accelerate_loop.py", launcher=launcher)
    assert percent(alone) > 85
    losses = [[float(loss) for loss in re.findall(r"loss ([\d.]+)", output)] for output in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_open_clip_gets_the_same_loss(tmp_path):
    output = run(tmp_path, "open_clip_loss.py")
    assert float(re.search(r"ClipLoss: ([\d.e+-]+)", output)[1]) < 1e-5
    assert percent(output) > 50


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (80, 60), colour).save(folder / f"{index}.{'png' if index else 'jpg'}")
    return folder


def test_folder_to_shards_makes_shards_that_the_loader_reads(tmp_path, photos):
    table = tmp_path / "captions.csv"
    with table.open("w", newline="") as file:
        rows = [{"image": path.name, "caption": f"a {path.stem}", "subreddit": "pics"} for path in photos.iterdir()]
        writer = csv.DictWriter(file, ["image", "caption", "subreddit"])
        writer.writeheader()
        writer.writerows(rows * 2)
    output = run(tmp_path, "folder_to_shards.py", str(photos), str(table), "shards", "--pairs-per-shard", "4")
    assert "6 pairs in shards" in output
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert [path.name for path in shards] == ["shard_00000000.tar", "shard_00000001.tar"]
    with tarfile.open(shards[0]) as shard:
        assert shard.getnames()[:2] == ["000000000.jpg", "000000000.json"]
        assert json.load(shard.extractfile("000000000.json"))["subreddit"] == "pics"
    loader = build_loader([str(path) for path in shards], batch_size=6, num_workers=0, image_size=32)
    batch = next(iter(loader))
    loader.close()
    assert sorted(batch.keys) == [f"{number:09d}" for number in range(6)]
    assert loader.report()["bad"] == 0


@pytest.mark.parametrize(
    ("table", "message"),
    [("image,text\na,b\n", "the columns image and caption"), ("image,caption\nlost.jpg,x\n", "the first is lost.jpg")],
)
def test_folder_to_shards_names_what_is_wrong(tmp_path, photos, table, message):
    (tmp_path / "captions.csv").write_text(table)
    assert message in run(tmp_path, "folder_to_shards.py", str(photos), "captions.csv", "shards", status=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model in a size for one CPU core."""
    torch.manual_seed(0)
    cfg = config.load("train_meru_vit_s", ["model.textual.arch=L1_W64", "model.embed_dim=32"])
    cfg.model.visual.arch = "vit_base_patch16_224"
    cfg.model.visual.update({"embed_dim": 64, "depth": 1, "num_heads": 1, "img_size": 32})
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    checkpoint.save_published(path, config.instantiate(cfg.model).state_dict())
    return str(path)


def test_zero_shot_names_a_label_for_every_photo(tmp_path, photos, weights):
    pictures = sorted(map(str, photos.iterdir()))
    labels = ["a red wall", "a forest", "the sky"]
    lines = run(tmp_path, "zero_shot_photos.py", weights, *pictures, "--labels", *labels).splitlines()
    assert [line.split(": ")[0] for line in lines] == pictures
    assert all(sum(label in line for label in labels) == 3 for line in lines)


def test_caption_search_finds_the_caption_itself_first(tmp_path, photos, weights):
    captions = ["a dog", "a corgi running on wet sand", "", "the moon over a lake"]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    arguments = ("caption_search.py", weights, "captions.txt")
    assert run(tmp_path, *arguments, "--text", captions[3], "-k", "2").splitlines()[0] == captions[3]
    found = run(tmp_path, *arguments, "--image", str(photos / "0.jpg"), "--cones").splitlines()
    assert found == ["no caption's cone contains it"] or set(found) <= set(captions)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_tested_and_explains_itself(path, monkeypatch, capsys):
    assert f'"{path.name}"' in Path(__file__).read_text()
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {path.name} ")
    what, *commands = path.read_text().split('"""')[1].strip().splitlines()
    assert what in text
    assert commands
    assert all(f"examples/{path.name}" in command and command in text for command in commands if command)
