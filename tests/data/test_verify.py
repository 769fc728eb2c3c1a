import csv
import os
import signal

import pytest
from shard_factory import encoded, photo, sample, write_shards, write_tar

from meru_fast.data import verify
from meru_fast.data.errors import DataError


@pytest.fixture
def shards(tmp_path):
    """300 good samples in 3 shards, with 4 bad ones and two bad shards among them."""
    write_shards(tmp_path, 3, 100, 32)
    members = sample(900, 32)
    members += [("cut.jpg", encoded(photo(1, 100))[:-400]), ("cut.json", b'{"caption": "c"}')]
    members += [("text.jpg", encoded(photo(1, 32))), ("text.json", b"{")]
    members += [("zero.jpg", b""), ("zero.json", b'{"caption": "c"}')]
    write_tar(tmp_path / "bad.tar", members)
    whole = write_tar(tmp_path / "cut.tar", sample(901, 32) + sample(902, 200))
    whole.write_bytes(whole.read_bytes()[: whole.read_bytes().index(b"k00902.jpg") + 612])
    (tmp_path / "empty.tar").write_bytes(b"")
    return tmp_path


EXPECTED = {
    ("bad.tar", "cut", "cannot be decoded"),
    ("bad.tar", "text", "invalid JSON"),
    ("bad.tar", "zero", "image of zero bytes"),
    ("cut.tar", "", "truncated or damaged TAR"),
    ("cut.tar", "k00902", "the shard ends inside this sample"),
    ("empty.tar", "", "empty file"),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_finds_every_bad_sample(shards, workers):
    found = list(verify.verify(shards, workers=workers, progress=False))
    assert {(d.shard.rpartition("/")[2], d.key, d.reason.split(":")[0]) for d in found} == EXPECTED
    assert len(found) == len(EXPECTED)


def test_command(shards, capsys):
    assert verify.main([str(shards), "--output", str(shards / "bad.csv")]) == 1
    out = capsys.readouterr().out
    assert "306 samples in 6 shards, 6 bad" in out
    assert "1 invalid JSON" in out
    assert "empty.tar\t(shard)\tempty file" in out
    with open(shards / "bad.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["shard"].rpartition("/")[2], row["key"], row["reason"].split(":")[0]) for row in rows} == EXPECTED
    assert verify.main([f"{shards}/shard_*.tar", "--quiet"]) == 0
    with pytest.raises(SystemExit) as stop:
        verify.main([str(shards / "none.tar")])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--output", "{}/empty.tar/bad.csv"], "empty.tar"), (["--workers", "-1"], "max_workers must be greater than 0")],
)
def test_bad_options_are_one_error_before_the_work(shards, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        verify.main([str(shards), *(option.format(shards) for option in options)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="no shards"):
        list(verify.verify(tmp_path))


def killed_check(chunk):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_checking_process_is_one_error(shards, monkeypatch):
    monkeypatch.setattr(verify, "_check_opened", killed_check)
    with pytest.raises(DataError, match="a worker process was killed"):
        list(verify.verify(shards, workers=2, progress=False))
