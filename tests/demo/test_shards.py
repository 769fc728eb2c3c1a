"""The demo's files: layout, split, sameness."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from meru_fast.data.index import open_shards
from meru_fast.demo import shards
from meru_fast.demo.pictures import DIGIT_NAMES


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return shards.make(tmp_path_factory.mktemp("demo") / "data", num_shards=2)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, the reader's index left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".meru_index" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_shards_have_the_layout_of_redcaps(data):
    paths = sorted((data / "train").glob("*.tar"))
    assert [path.name for path in paths] == ["shard_00000000.tar", "shard_00000001.tar"]
    for path, subreddit in zip(paths, ("handwriting", "drawnshapes"), strict=True):
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
        assert len({sample["__key__"] for sample in samples}) == 1000
        assert {sample["json"]["subreddit"] for sample in samples} == {subreddit}
        assert all(sample["json"].keys() == {"subreddit", "caption"} for sample in samples)
        assert all(sample["jpg"].size == (80, 80) for sample in samples[::100])
    assert len(open_shards([str(data / "train" / "*.tar")], progress=False)) == 2000


def test_specific_captions_are_the_most_frequent(data):
    with tarfile.open(data / "train" / "shard_00000000.tar") as tar:
        records = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    counts = [sum(record["caption"] == text for record in records) for text in ("a digit", "a handwritten number")]
    specific = 1000 - sum(counts)
    # weights 1 : 3 : 9; the bounds are five standard deviations
    assert 36 < counts[0] < 118
    assert 164 < counts[1] < 298
    assert 619 < specific < 766


def test_the_held_out_part_is_whole(data):
    assert sorted(path.name for path in (data / "digits").iterdir()) == sorted(DIGIT_NAMES)
    digits = list((data / "digits").rglob("*.png"))
    assert len(digits) == shards.HELD_OUT_DIGITS
    scenes = json.loads((data / "scenes.json").read_text())
    assert len(scenes) == shards.HELD_OUT_SCENES
    assert all(len(row["captions"]) == 1 for row in scenes)
    ladders = json.loads((data / "ladders.json").read_text())
    assert len(ladders) == len(scenes) + len(digits)
    assert [row["captions"][-1:] for row in ladders[: len(scenes)]] == [row["captions"] for row in scenes]
    for row in ladders[::50]:
        Image.open(data / row["image"]).verify()
    for path in digits:
        assert path.parent.name in DIGIT_NAMES


def test_no_held_out_digit_is_trained_on():
    training, held_out = shards.split_digits(1797, seed=0)
    assert len(held_out) == shards.HELD_OUT_DIGITS
    assert sorted([*training, *held_out]) == list(range(1797))
    # every shard takes the training positions in turn
    assert 3 * len(training) < shards.DIGIT_SHARDS * shards.SHARD_SIZE


def test_the_same_seed_writes_the_same_bytes(data, tmp_path):
    again = shards.make(tmp_path / "again", num_shards=2)
    assert contents(again) == contents(data)
    other = shards.make(tmp_path / "other", num_shards=2, seed=1)
    changed = contents(other)
    assert all(
        changed.get(name) != digest for name, digest in contents(data).items() if name.endswith((".tar", ".png"))
    )


def test_what_is_there_is_kept_and_nothing_else_is_overwritten(data, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert shards.make(data, num_shards=2) == data
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    with pytest.raises(FileExistsError, match=r"data exists and holds no demo data with .*'num_shards': 3"):
        shards.make(data, num_shards=3)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine exists"):
        shards.make(tmp_path / "mine", num_shards=2)
    with pytest.raises(ValueError, match="num_shards=1"):
        shards.make(tmp_path / "few", num_shards=1)


def test_the_script_says_what_it_made(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        shards.main(["--output-dir", str(tmp_path), "--num-shards", "2"])
    assert stop.value.code == 2
    assert "remove it or name another" in capsys.readouterr().err
