import json
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from shard_factory import encoded, photo

from meru_fast.data import build_loader, redcaps
from meru_fast.data.errors import DataError

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_redcaps.py"


def annotation(image_id, subreddit, caption):
    return {
        "image_id": image_id,
        "subreddit": subreddit,
        "url": "u",
        "caption": caption,
        "raw_caption": "r",
        "score": 3,
    }


@pytest.fixture
def downloaded(tmp_path):
    """As the downloader leaves it: 25 pictures of cats, 10 of which 3 are gone, and a year with none left."""
    root = tmp_path / "redcaps"
    files = {"cats_2019": ("cats", 25, 0), "foodporn_2020": ("foodporn", 10, 3), "gone_2018": ("gone", 4, 4)}
    (root / "annotations").mkdir(parents=True)
    for name, (subreddit, count, missing) in files.items():
        (root / "images" / subreddit).mkdir(parents=True)
        records = [annotation(f"{subreddit[0]}{i:05x}", subreddit, f"caption {i} ü") for i in range(count)]
        for i, record in enumerate(records[missing:]):
            (root / "images" / subreddit / f"{record['image_id']}.jpg").write_bytes(encoded(photo(i, 48)))
        content = {"info": {"version": "v1.0"}, "annotations": records}
        (root / "annotations" / f"{name}.json").write_text(json.dumps(content))
    return root


def members(shard):
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_shards(downloaded, tmp_path):
    out = tmp_path / "shards"
    results = redcaps.prepare(downloaded, out, pairs_per_shard=10, workers=2, progress=False)
    assert [(r.annotations, r.shards, r.pairs, r.missing) for r in results] == [
        ("cats_2019.json", 3, 25, 0),
        ("foodporn_2020.json", 1, 7, 3),
        ("gone_2018.json", 0, 0, 4),
    ]
    shards = sorted(path.name for path in out.glob("*.tar"))
    assert shards == [f"cats_2019_{i:08d}.tar" for i in range(3)] + ["foodporn_2020_00000000.tar"]
    first = members(out / "cats_2019_00000000.tar")
    assert list(first)[:2] == ["c00000.jpg", "c00000.json"]
    assert json.loads(first["c00000.json"]) == {"subreddit": "cats", "caption": "caption 0 ü"}
    assert first["c00003.jpg"] == (downloaded / "images/cats/c00003.jpg").read_bytes()
    assert len(members(out / "cats_2019_00000002.tar")) == 10
    loader = build_loader(out, batch_size=32, num_workers=0, image_size=16)
    assert len(set(next(iter(loader)).keys)) == 32
    loader.close()


def test_a_full_last_shard_is_followed_by_none(downloaded, tmp_path):
    redcaps.prepare(downloaded, tmp_path / "s", pairs_per_shard=5, workers=1, progress=False)
    assert len(list((tmp_path / "s").glob("cats_*.tar"))) == 5


def test_second_run_does_only_what_is_new(downloaded, tmp_path):
    out = tmp_path / "s"
    redcaps.prepare(downloaded, out, pairs_per_shard=10, workers=1, progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    with open(out / redcaps.MANIFEST, "a") as manifest:
        manifest.write('{"annotations": "cats_')  # a kill while writing
    file = downloaded / "annotations" / "cats_2019.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][:8]
    file.write_text(json.dumps(content))
    results = redcaps.prepare(downloaded, out, pairs_per_shard=10, workers=1, progress=False)
    assert results[0].pairs == 8
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sorted(after) == ["cats_2019_00000000.tar", "foodporn_2020_00000000.tar"]
    assert after["foodporn_2020_00000000.tar"] == before["foodporn_2020_00000000.tar"]
    assert len(members(out / "cats_2019_00000000.tar")) == 16


def test_command(downloaded, tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(downloaded), str(tmp_path / "s")], capture_output=True, text=True, check=True
    )
    assert "32 pairs in 2 shards" in run.stdout
    assert "7 annotations had no image" in run.stdout


def test_errors_name_the_file(downloaded, tmp_path, capsys):
    (downloaded / "annotations" / "bad_2020.json").write_text('{"annotations": [{"image_id": "a"}]}')
    with pytest.raises(DataError, match=r"bad_2020\.json is not a RedCaps annotation file.*subreddit"):
        redcaps.prepare(downloaded, tmp_path / "s", workers=1, progress=False)
    assert redcaps.main([str(tmp_path), str(tmp_path / "s")]) == 1
    assert "annotations/, images/" in capsys.readouterr().err


def file_size_limit(limit):
    """Files may not grow beyond this, as if the disk ended there: the system fails a write in its midst."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_one_error_and_the_next_run_goes_on(downloaded, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "s"
    redcaps.prepare(downloaded, whole, pairs_per_shard=25, workers=1, progress=False)
    sizes = [path.stat().st_size for path in sorted(whole.glob("*.tar"))]
    assert sizes[1] < 40_000 < sizes[0]  # the shard of foodporn has room, that of cats has not
    command = [sys.executable, str(SCRIPT), str(downloaded), str(out), "--pairs-per-shard", "25", "--workers", "1"]
    # coverage could not write its own data under the limit, and would say so
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=file_size_limit(40_000), env=env)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "Exception ignored" not in full.stderr
    assert full.stderr.splitlines()[-1] == (
        f"error: {out}: File too large. What is finished stays; run again to go on from there"
    )
    assert {path.name for path in out.iterdir()} <= {redcaps.MANIFEST, "foodporn_2020_00000000.tar"}
    assert subprocess.run(command).returncode == 0
    for path in sorted(whole.glob("*.tar")):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert len(list(out.glob("*.tar"))) == 2


def test_a_killed_run_leaves_no_half_shard_and_the_next_goes_on(downloaded, tmp_path):
    out = tmp_path / "s"
    code = f"""
import os, signal
from pathlib import Path
from meru_fast.data import redcaps
import webdataset
write = webdataset.TarWriter.write
def killing(self, pair):
    if pair["__key__"] == "c0000c":  # in the second shard of cats
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, pair)
webdataset.TarWriter.write = killing
raise SystemExit(redcaps.main([{str(downloaded)!r}, {str(out)!r}, "--pairs-per-shard", "10", "--workers", "1"]))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == 1
    assert "error: a worker process was killed" in killed.stderr
    assert "Traceback" not in killed.stderr
    assert [path.name for path in out.glob("*.tar")] == ["cats_2019_00000000.tar"]
    assert list(out.glob(".cats*"))  # what it was at
    redcaps.prepare(downloaded, out, pairs_per_shard=10, workers=1, progress=False)
    assert len(members(out / "cats_2019_00000001.tar")) == 20
    assert sorted(path.name for path in out.iterdir() if not path.name.endswith(".tar")) == [redcaps.MANIFEST]


def test_bad_arguments(downloaded, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert redcaps.main([str(downloaded), str(tmp_path / "file")]) == 1
    assert f"error: {tmp_path / 'file'}: File exists" in capsys.readouterr().err
    assert redcaps.main([str(downloaded), str(tmp_path / "s"), "--pairs-per-shard", "0"]) == 1
    assert "pairs_per_shard must be 1 or more, got 0" in capsys.readouterr().err
    image = downloaded / "images" / "cats" / "c00003.jpg"
    image.unlink()
    image.mkdir()
    with pytest.raises(DataError, match=r"c00003\.jpg: Is a directory"):
        redcaps.prepare(downloaded, tmp_path / "s", workers=1, progress=False)


@pytest.mark.parametrize(
    ("image_id", "subreddit"), [("../../secret", "cats"), ("a", ".."), ("a", "/etc"), ("", "cats")]
)
def test_no_record_leads_out_of_the_folder(downloaded, tmp_path, image_id, subreddit):
    file = downloaded / "annotations" / "bad_2020.json"
    file.write_text(json.dumps({"annotations": [annotation(image_id, subreddit, "c")]}))
    with pytest.raises(DataError, match=r"bad_2020\.json is not.*is no file name"):
        redcaps.prepare(downloaded, tmp_path / "s", workers=1, progress=False)
