"""Damaged TARs, found by fuzzing, end in the one error that callers catch."""

import io
import os
import tarfile

import pytest
from fuzz_entry import run_case
from shard_factory import sample, write_tar

from meru_fast.data.index import scan
from meru_fast.data.shards import ShardReader
from meru_fast.data.tar import regular_members


def with_header(members: list[tuple[str, bytes]], pax_headers: dict[str, str]) -> bytes:
    """A TAR whose second member has these extended headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = pax_headers if number == 1 else {}
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", ["-1", "-512", "-1024", "9" * 25, str(2**63 - 1024), str(2**62)])
def test_impossible_sizes_are_damage(tmp_path, size):
    """A negative one would send the standard library backwards, for ever; a huge one overflows its arithmetic."""
    content = with_header([*sample(0, 32), *sample(1, 32)], {"size": size})
    with pytest.raises(tarfile.TarError):
        list(regular_members(io.BytesIO(content)))
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    found = scan(str(path))
    assert "damaged TAR" in found.entry.fault
    assert found.entry.num_rows <= 1


def test_names_that_lead_out_of_the_folder_are_only_names(tmp_path):
    """Nothing is ever unpacked from a shard: members are byte ranges, and their names are keys."""
    path = write_tar(tmp_path / "in" / "shard.tar", [("../../x.jpg", b"\xff\xd8"), ("/etc/x.json", b"{}")])
    scan(str(path))
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["in", "shard.tar"]


def test_links_are_no_members():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("a.json")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    assert list(regular_members(io.BytesIO(buffer.getvalue()))) == []


def test_a_reader_that_is_gone_leaves_no_file_open(tmp_path):
    """Found by fuzzing: a process that opened shards again and again ran out of descriptors."""
    path = write_tar(tmp_path / "shard.tar", sample(0, 32))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert len(ShardReader().read(str(path), 0, 512)) == 512
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest puts its own filters over the library's
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused_or_read(seed, tmp_path):
    """A part of `python tests/support/fuzz_entry.py`, the same cases each time."""
    outcomes = {run_case(seed, number, tmp_path).partition(":")[0] for number in range(500)}
    assert len(outcomes) == 5
