import contextlib
import gzip
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_factory import caption_json, encoded, photo, sample, write_shards, write_tar

from meru_fast.data import index
from meru_fast.data.errors import DataError
from meru_fast.data.index import DUPLICATE, EMPTY_IMAGE, NO_IMAGE, NO_TEXT, TRUNCATED, TXT, open_shards

JPEG = encoded(photo(0, 32))


def read(found, number):
    """Image and text bytes of a sample, cut out of the shard at the places the index gives."""
    place = found.locate(number)
    with open(place.shard, "rb") as file:
        data = file.read()
    image = data[place.image_offset : place.image_offset + place.image_size]
    return image, data[place.text_offset : place.text_offset + place.text_size]


def opened(path, **options):
    return open_shards(path, progress=False, **options)


def test_redcaps_layout(tmp_path):
    write_shards(tmp_path, shards=3, per_shard=5, longer=32)
    found = opened(tmp_path)
    assert len(found) == 15
    assert [found.key(i) for i in range(15)] == [f"k{i:05d}" for i in range(15)]
    for i in range(15):
        assert read(found, i) == tuple(data for _, data in sample(i, 32))
    assert not found.flags().any()
    with pytest.raises(IndexError, match="15 of 15"):
        found.locate(15)


@pytest.mark.parametrize("extension", ["jpg", "JPG", "jpeg", "Jpeg", "png", "PNG", "webp"])
def test_img2dataset_layout(tmp_path, extension):
    members = []
    for i in range(3):
        key = f"00001{i:04d}"
        record = {"caption": f"c{i}", "key": key, "status": "success"}
        members += [(f"{key}.{extension}", b"i%d" % i), (f"{key}.json", json.dumps(record).encode())]
        members += [(f"{key}.txt", b"t%d" % i)]
    found = opened(write_tar(tmp_path / "00001.tar", members))
    assert [found.key(i) for i in range(3)] == ["000010000", "000010001", "000010002"]
    assert json.loads(read(found, 2)[1])["caption"] == "c2"
    assert not found.flags().any()


def test_txt_serves_where_json_has_no_caption(tmp_path):
    members = [("a.jpg", b"i"), ("a.json", b'{"url": "u"}'), ("a.txt", b"t"), ("b.txt", b"only"), ("b.webp", b"i")]
    found = opened(write_tar(tmp_path / "x.tar", members))
    assert [read(found, i)[1] for i in range(2)] == [b"t", b"only"]
    assert found.flags().tolist() == [TXT, TXT]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(tmp_path, format):
    key = "folder/" * 30 + "ü" * 40
    found = opened(write_tar(tmp_path / "x.tar", [(f"{key}.jpg", JPEG), (f"{key}.json", b"{}")], format))
    assert found.key(0) == key
    assert read(found, 0) == (JPEG, b"{}")


def test_names(tmp_path):
    members = [
        ("./dir/a.jpg", b"1"),
        ("./dir/a.json", b"{}"),
        ("img.v1.2.jpg", b"2"),  # dots in the key
        ("img.v1.2.json", b"{}"),
        ("late.json", b"{}"),  # members of a sample need not be neighbours
        ("mask.jpg", b"4"),
        ("mask.0.png", b"5"),  # a second picture of "mask"
        ("mask.txt", b"m"),
        ("late.jpg", b"3"),
        ("._a.jpg", b"6"),  # macOS leaves such
        ("README", b"7"),
        (".jpg", b"8"),
    ]
    found = opened(write_tar(tmp_path / "x.tar", members))
    assert [found.key(i) for i in range(len(found))] == ["dir/a", "img.v1.2", "late", "mask"]
    assert [read(found, i)[0] for i in range(4)] == [b"1", b"2", b"3", b"4"]


def test_defects_of_members(tmp_path):
    members = [
        ("noimage.json", b"{}"),
        ("notext.jpg", b"i"),
        ("zero.jpg", b""),
        ("zero.json", b"{}"),
        ("twice.jpg", b"1"),
        ("twice.json", b"{}"),
        ("twice.jpg", b"2"),
        ("twice.json", b"{}"),
    ]
    found = opened(write_tar(tmp_path / "x.tar", members))
    assert found.flags().tolist() == [NO_IMAGE, NO_TEXT, EMPTY_IMAGE, 0, DUPLICATE]
    assert read(found, 3)[0] == b"1"


def test_truncated_empty_and_foreign_files(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [m for i in range(4) for m in sample(i, 64)]).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: whole.index(b"k00002.jpg") + 1000])  # inside the third image
    (tmp_path / "c.tar").write_bytes(whole[: whole.index(b"k00002.jpg")])  # between members, no end blocks
    (tmp_path / "d.tar").write_bytes(whole[: whole.index(b"k00002.jpg") + 100])  # inside a header
    (tmp_path / "e.tar").write_bytes(b"")
    (tmp_path / "f.tar").write_bytes(b"this is no archive" * 100)
    write_tar(tmp_path / "g.tar", [])
    found = opened(tmp_path)
    sizes = dict(zip([os.path.basename(p)[0] for p in found.paths], np.diff(found.starts).tolist(), strict=True))
    assert sizes == {"a": 4, "b": 3, "c": 2, "d": 2, "e": 0, "f": 0, "g": 0}
    assert found.flags().tolist() == [0] * 6 + [TRUNCATED | NO_TEXT] + [0] * 4
    faults = {os.path.basename(p)[0]: e.fault for p, e in zip(found.paths, found.entries, strict=True) if e.fault}
    assert faults["e"] == "empty file"
    assert faults.keys() == {"b", "d", "e", "f"}
    assert found.key(10) == "k00001"


def test_compressed_shard_is_refused_by_name(tmp_path):
    shard = write_tar(tmp_path / "a.tar", sample(0, 32))
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match=r"a\.tar is compressed.*decompress"):
        opened(tmp_path)


def test_ways_to_name_shards(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    write_shards(one, 3, 2, 32)
    write_shards(two, 1, 2, 32, first=6)
    monkeypatch.chdir(tmp_path)
    everything = [f"k{i:05d}" for i in range(8)]
    for spec in [
        [one, two],
        f"{one}::{two}",
        "{one,two}/*.tar",
        ["one/shard_{00000..00002}.tar", "two"],
        f"file://{one}/*.tar::two/shard_00000.tar",
        [["one/*"], ("two", "one/shard_00001.tar")],  # listed twice, used once
    ]:
        found = opened(spec)
        assert [found.key(i) for i in range(len(found))] == everything, spec
    with pytest.raises(DataError, match=r"no such shard: nowhere/x\.tar"):
        opened("nowhere/x.tar")
    with pytest.raises(DataError, match=r"no shards match 'nowhere/\*.tar'"):
        opened("nowhere/*.tar")
    with pytest.raises(DataError, match="simplecache"):
        opened("one::simplecache")


def test_remote_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("MERU_FAST_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "s", 2, 3, 32)
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/s/", "/bucket/s/", recursive=True)
    for spec in ["memory://bucket/s", "memory://bucket/s/*.tar", "memory://bucket/s/shard_{00000..00001}.tar"]:
        found = opened(spec)
        assert [found.key(i) for i in range(len(found))] == [f"k{i:05d}" for i in range(6)]
    assert found.paths[0].startswith("memory://")
    fs.rm("/bucket/s/shard_00001.tar")
    with pytest.raises(DataError, match=r"shard_00001\.tar was indexed and is gone"):
        opened("memory://bucket/s")


def table(folder):
    return json.loads((folder / ".meru_index" / "shards.json").read_text())["shards"]


def test_second_start_scans_nothing(tmp_path):
    write_shards(tmp_path, 2, 3, 32)
    first = opened(tmp_path)
    before = (tmp_path / ".meru_index" / "shards.json").stat().st_mtime_ns
    again = opened(tmp_path)
    assert (tmp_path / ".meru_index" / "shards.json").stat().st_mtime_ns == before
    assert again.fingerprint == first.fingerprint


def test_changed_shard_is_indexed_again(tmp_path):
    shards = write_shards(tmp_path, 3, 3, 32)
    old = opened(tmp_path)
    write_tar(shards[1], [m for i in (70, 71) for m in sample(i, 32)])
    new = opened(tmp_path)
    assert [new.key(i) for i in range(len(new))] == [f"k{i:05d}" for i in (0, 1, 2, 70, 71, 6, 7, 8)]
    assert read(new, 3) == tuple(data for _, data in sample(70, 32))
    assert new.fingerprint != old.fingerprint
    assert old.key(3) == "k00003"  # whoever has the old one open is not disturbed


def test_rows_of_changed_shards_do_not_pile_up(tmp_path):
    members = [(f"{i}.{kind}", b"{}") for i in range(3000) for kind in ("jpg", "json")]
    for change in range(5):
        write_tar(tmp_path / "a.tar", [*members, (f"{change}x.jpg", b"1"), (f"{change}x.json", b"{}")])
        write_tar(tmp_path / "b.tar", [("k.jpg", b"1"), ("k.json", b"{}")]) if not change else None
        found = opened(tmp_path)
        assert found.key(3000) == f"{change}x"
        assert found.key(3001) == "k"
    rows = [file for file in (tmp_path / ".meru_index").iterdir() if file.name.startswith("rows")]
    assert len(rows) == 1
    assert rows[0].stat().st_size <= 24 * (3 * 3002 + 4096)


def test_vanished_shard_is_named(tmp_path):
    write_shards(tmp_path, 3, 2, 32)
    opened(tmp_path)
    (tmp_path / "shard_00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard_00001\.tar was indexed and is gone.*--prune"):
        opened(f"{tmp_path}/*.tar")
    assert len(opened(tmp_path / "shard_00002.tar")) == 2  # nobody asked for the missing one
    assert len(opened(tmp_path, prune=True)) == 4
    assert len(opened(tmp_path)) == 4


def test_pruning_does_not_disturb_who_has_the_index_open(tmp_path):
    write_shards(tmp_path, 3, 40, 32)
    old = opened(tmp_path)
    (tmp_path / "shard_00002.tar").unlink()
    write_tar(tmp_path / "other.tar", sample(900, 32))
    new = opened(tmp_path, prune=True)
    assert [new.key(i) for i in range(len(new))] == ["k00900", *(f"k{i:05d}" for i in range(80))]
    assert [old.key(i) for i in range(120)] == [f"k{i:05d}" for i in range(120)]
    assert (tmp_path / ".meru_index" / "rows.1.bin").stat().st_size == 81 * 24


def test_many_processes_index_as_one(tmp_path):
    write_shards(tmp_path / "a", 20, 2, 32)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, many = opened(tmp_path / "a", workers=1), opened(tmp_path / "b", workers=2)
    assert one.fingerprint == many.fingerprint
    assert [one.key(i) for i in range(40)] == [many.key(i) for i in range(40)]
    assert [read(one, i) for i in range(40)] == [read(many, i) for i in range(40)]


def test_two_starts_at_once(tmp_path):
    """As ranks do: one scans, the others wait and use its work."""
    write_shards(tmp_path, 4, 3, 32)
    code = "import sys; from meru_fast.data.index import open_shards as o; print(o(sys.argv[1]).fingerprint)"
    starts = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    fingerprints = {start.communicate(timeout=300)[0].strip() for start in starts}
    assert fingerprints == {str(opened(tmp_path).fingerprint)}


def test_killed_scan_goes_on_where_it_was(tmp_path):
    """A real SIGKILL in the middle: what was saved stays, the rest is scanned, the result is the same."""
    write_shards(tmp_path / "whole", 12, 3, 32)
    shutil.copytree(tmp_path / "whole", tmp_path / "s")
    expected = opened(tmp_path / "whole")
    slow = f"""
import time
from pathlib import Path
from meru_fast.data import index
scan, index.SAVE_EVERY = index.scan, 0.0
index.scan = lambda path: (time.sleep(0.1), scan(path))[1]
index.open_shards({str(tmp_path / "s")!r}, workers=1, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", slow])
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (tmp_path / "s/.meru_index/shards.json").exists() and len(table(tmp_path / "s")) >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = table(tmp_path / "s")
    assert 3 <= len(saved) < 12
    with open(tmp_path / "s/.meru_index/rows.0.bin", "ab") as rows:
        rows.write(b"half a row")  # as if killed while writing
    found = opened(tmp_path / "s")
    assert found.fingerprint == expected.fingerprint
    assert [found.key(i) for i in range(36)] == [expected.key(i) for i in range(36)]
    assert all(table(tmp_path / "s")[name] == entry for name, entry in saved.items())


@pytest.fixture
def public_path():
    """A folder that other users may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def index_as_nobody(folder: Path, cache: Path, tmp_path: Path) -> str:
    """Index a folder as a user who may not write there (root may do anything); the number of samples, or the error."""
    write_shards(tmp_path / "other", 1, 1, 32)
    code = f"""
import os
from meru_fast.data.index import open_shards
open_shards({str(tmp_path / "other")!r}, progress=False)  # everything is imported before the user changes
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
from meru_fast.data.errors import DataError
try:
    print(len(open_shards({str(folder)!r}, progress=False)))
except DataError as error:
    print(error)
"""
    environment = {**os.environ, "MERU_FAST_CACHE": str(cache)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr
    return run.stdout.strip()


def test_read_only_folder_is_indexed_in_the_cache(public_path, tmp_path):
    shards, cache = public_path / "s", public_path / "cache"
    write_shards(shards, 2, 2, 32)
    shards.chmod(0o555)
    cache.mkdir()
    cache.chmod(0o777)
    assert index_as_nobody(shards, cache, tmp_path) == "4"
    assert not (shards / ".meru_index").exists()
    assert len(list((cache / "index").iterdir())) == 1
    shards.chmod(0o755)


def test_index_shipped_with_read_only_shards_is_used(public_path, tmp_path):
    shards, cache = public_path / "s", public_path / "cache"
    write_shards(shards, 2, 2, 32)
    opened(shards)
    for folder in (shards, shards / ".meru_index"):
        folder.chmod(0o555)
    assert index_as_nobody(shards, cache, tmp_path) == "4"
    assert not cache.exists()
    for folder in (shards, shards / ".meru_index"):
        folder.chmod(0o755)


def test_shards_and_places_without_permission(public_path, tmp_path):
    shards, cache = public_path / "s", public_path / "cache"
    write_shards(shards, 2, 2, 32)
    cache.mkdir(mode=0o755)
    found = index_as_nobody(shards, cache, tmp_path)  # neither place can be written
    assert re.fullmatch(rf"the index {cache}/index/\w+ cannot be written: Permission denied.*MERU_FAST_CACHE.*", found)
    cache.chmod(0o777)
    (shards / "shard_00001.tar").chmod(0o600)
    found = index_as_nobody(shards, cache, tmp_path)
    assert found == f"shard {shards}/shard_00001.tar cannot be read: Permission denied"


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": 1}', '{"version": 1, "generation": 0, "shards": {"a": 1}}'])
def test_damaged_index_is_named(tmp_path, damage):
    write_shards(tmp_path, 1, 1, 32)
    opened(tmp_path)
    (tmp_path / ".meru_index" / "shards.json").write_text(damage)
    with pytest.raises(DataError, match=r"damaged index .*shards\.json.*delete"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["rows.0.bin", "keys.0.bin"])
def test_an_index_that_lost_data_is_damaged(tmp_path, name):
    write_shards(tmp_path, 2, 2, 32)
    opened(tmp_path)
    file = tmp_path / ".meru_index" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"damaged index .*{name} has \d+ of \d+ bytes.*delete"):
        opened(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=rf"damaged index .*{name}.*delete"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / ".meru_index")
    assert len(opened(tmp_path)) == 4


def test_a_full_disk_is_one_error_and_keeps_the_index(tmp_path):
    members = [(f"{i}.{kind}", b"{}") for i in range(3000) for kind in ("jpg", "json")]
    write_shards(tmp_path, 1, 3, 32)
    assert len(opened(tmp_path)) == 3
    write_tar(tmp_path / "large.tar", members)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as if the disk ended there
    try:
        with pytest.raises(DataError, match=r"the index .*\.meru_index cannot be written: File too large"):
            opened(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(table(tmp_path)) == 1
    assert len(opened(f"{tmp_path}/shard_*.tar")) == 3
    assert len(opened(tmp_path)) == 3003


def test_killed_with_its_processes_the_next_scan_need_not_wait(tmp_path):
    """The lock and the processes of a killed scan go with it."""
    write_shards(tmp_path, 24, 1, 32)
    code = f"""
import time
from meru_fast.data import index
def slow(path):
    time.sleep(1)
    return index._scan(path)
index.scan = slow
index.open_shards({str(tmp_path)!r}, workers=2, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 300
    while len(session(process.pid)) < 3:  # itself and two workers
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert len(opened(tmp_path, workers=2)) == 24
    while session(process.pid):
        assert time.monotonic() < deadline, "workers outlive the scan"
        time.sleep(0.05)


def session(leader):
    """Processes of a session that are alive."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                alive.append(stat.parent.name)
    return alive


def killed_scan(path):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_scanning_process_is_one_error(tmp_path, monkeypatch):
    write_shards(tmp_path, 16, 1, 32)
    with monkeypatch.context() as patch:
        patch.setattr(index, "scan", killed_scan)
        with pytest.raises(DataError, match="a worker process was killed"):
            opened(tmp_path, workers=2)
    assert len(opened(tmp_path)) == 16


def test_a_folder_in_place_of_a_shard(tmp_path):
    shards = write_shards(tmp_path, 2, 2, 32)
    opened(tmp_path)
    shards[1].unlink()
    shards[1].mkdir()
    with pytest.raises(DataError, match=r"shard_00001\.tar was indexed and is gone"):
        opened(tmp_path)
    with pytest.raises(DataError, match=r"no shards match .*shard_00001\.tar"):
        opened(shards[1])


def test_sending_an_open_set_to_a_process_is_cheap(tmp_path):
    members = [(f"{i}.{kind}", b"{}") for i in range(5000) for kind in ("jpg", "json")]
    write_tar(tmp_path / "a.tar", members)
    found = opened(tmp_path)
    sent = pickle.dumps(found)
    assert len(sent) < 2000
    assert pickle.loads(sent).key(4999) == "4999"


def test_command(tmp_path, capsys):
    write_shards(tmp_path, 2, 2, 32)
    write_tar(tmp_path / "x.tar", [("a.jpg", b""), ("a.json", b"{}")])
    (tmp_path / "y.tar").write_bytes(b"")
    assert index.main([str(tmp_path), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "4 shards, 5 samples" in out
    assert "1 unusable: image of zero bytes" in out
    assert "y.tar: empty file" in out
    with pytest.raises(SystemExit, match=r"error: no such shard: .*nothing\.tar"):
        index.main([str(tmp_path / "nothing.tar")])


def test_caption_json_is_kept_as_it_is(tmp_path):
    found = opened(write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.json", caption_json(3))]))
    assert read(found, 0) == (JPEG, caption_json(3))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z0-9_\-]{1,40}(/[a-zä][a-zä.]{0,60}[a-z])?", fullmatch=True),
            st.sampled_from(["jpg", "PNG", "webp"]),
            st.sampled_from(["json", "txt"]),
            st.binary(min_size=1, max_size=600),
        ),
        max_size=8,
        unique_by=lambda sample: sample[0],
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_any_shard_gives_back_its_samples(samples, format):
    """Names of any shape and length, members of any size, all TAR formats."""
    with tempfile.TemporaryDirectory() as folder:
        members = [
            member
            for key, image, text, data in samples
            for member in ((f"{key}.{image}", data), (f"{key}.{text}", data[::-1]))
        ]
        found = opened(write_tar(Path(folder) / "x.tar", members, format))
        assert [found.key(number) for number in range(len(found))] == [key for key, *_ in samples]
        for number, (*_, data) in enumerate(samples):
            assert read(found, number) == (data, data[::-1])
