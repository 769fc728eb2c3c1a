import os
import resource
import signal
import subprocess
import sys

import pytest

from meru_fast.files import whole


def test_a_file_appears_whole_and_takes_the_place_of_the_old_one(tmp_path):
    file = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with whole(file) as partial:
            partial.write_text(text)
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    assert os.listdir(file.parent) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    """Files may not grow beyond 1 MB, as if the disk ended there: the system fails a write in its midst."""
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"), whole(file) as partial:
            partial.write_bytes(bytes(2_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    code = f"""
import os, signal
from pathlib import Path
from meru_fast.files import whole
with whole(Path({str(tmp_path)!r}) / "a.bin") as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == -signal.SIGKILL
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_content_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order that survives a power cut: the file's blocks, the name, the folder."""
    done = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(type(tmp_path), "replace", lambda old, new: (done.append("renamed"), replace(old, new))[1])
    with whole(tmp_path / "a") as partial:
        partial.write_text("x")
    assert done == [str(partial), "renamed", str(tmp_path)]
