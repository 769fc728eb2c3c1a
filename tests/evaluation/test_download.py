"""Downloads: resume, checksums, archives; against a server on this machine."""

import gzip
import hashlib
import io
import shutil
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import eval_miniatures
import pytest

from meru_fast.evaluation import catalog
from meru_fast.evaluation.download import Download, Hosted, download, fetch
from meru_fast.evaluation.protocol import DatasetError


class Server:
    """Serves `files`; writes down the ranges asked for; breaks off after `cut` bytes; may not know ranges."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cut: int | None = None
        self.ranges = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        content = self.files.get(request.path.split("?")[0])
        if content is None:
            request.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(content):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        request.wfile.write(content[start:][: self.cut])


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


CONTENT = bytes(range(256)) * 5000  # 1.28 MB


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server, tmp_path, ranges):
    server.files["/data.bin"] = CONTENT
    server.cut = 500_000
    with pytest.raises(DatasetError, match="run the command again to go on"):
        fetch(f"{server.url}/data.bin", tmp_path / "data.bin")
    assert not (tmp_path / "data.bin").exists()
    arrived = (tmp_path / "data.bin.part").stat().st_size
    assert 0 < arrived <= 500_000
    server.cut, server.ranges = None, ranges
    fetch(f"{server.url}/data.bin", tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked[-1] == ("/data.bin", f"bytes={arrived}-")


def test_a_part_that_is_whole_is_taken(server, tmp_path):
    server.files["/data.bin"] = CONTENT
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    fetch(f"{server.url}/data.bin", tmp_path / "data.bin")
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def archives(members: dict[str, bytes]) -> dict[str, bytes]:
    """The members as ZIP and as compressed TAR."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return {"zip": packed.getvalue(), "tgz": tarred.getvalue()}


def test_archives_are_checked_unpacked_and_not_fetched_again(server, tmp_path):
    made = archives({"inner/a.txt": b"hello"})
    nested = archives({"deep.tar.gz": archives({"folder/b.txt": b"nested"})["tgz"]})["zip"]
    server.files |= {"/x.zip": made["zip"], "/y.tgz": made["tgz"], "/n.zip": nested, "/plain.mat": b"matrix"}
    server.files["/idx.gz"] = gzip.compress(b"idx content")
    wanted = (
        Download(f"{server.url}/x.zip", f"md5:{hashlib.md5(made['zip']).hexdigest()}"),
        Download(f"{server.url}/y.tgz?download=1", f"sha256:{hashlib.sha256(made['tgz']).hexdigest()}", "sub/folder"),
        Download(f"{server.url}/n.zip", "", "n", nested="deep.tar.gz"),
        Download(f"{server.url}/plain.mat", "", "sub"),
        Download(f"{server.url}/idx.gz", "", "raw"),
    )
    download(wanted, tmp_path)
    assert (tmp_path / "inner/a.txt").read_bytes() == b"hello"
    assert (tmp_path / "sub/folder/inner/a.txt").read_bytes() == b"hello"
    assert (tmp_path / "n/folder/b.txt").read_bytes() == b"nested"
    assert (tmp_path / "sub/plain.mat").read_bytes() == b"matrix"
    assert (tmp_path / "raw/idx").read_bytes() == b"idx content"
    assert not list(tmp_path.glob("*.zip"))
    count = len(server.asked)
    download(wanted, tmp_path)
    assert len(server.asked) == count


def test_a_wrong_checksum_is_an_error_and_the_file_goes(server, tmp_path):
    server.files["/x.zip"] = archives({"a": b"b"})["zip"]
    with pytest.raises(DatasetError, match=r"x\.zip: md5 is [0-9a-f]{32}, expected 123; removed"):
        download((Download(f"{server.url}/x.zip", "md5:123"),), tmp_path)
    assert not (tmp_path / "x.zip").exists()


def test_an_archive_cannot_write_outside(server, tmp_path):
    server.files["/evil.tgz"] = archives({"../outside.txt": b"x"})["tgz"]
    with pytest.raises(DatasetError, match=r"evil\.tgz: cannot be unpacked"):
        download((Download(f"{server.url}/evil.tgz", ""),), tmp_path / "root")
    assert not (tmp_path / "outside.txt").exists()


def test_errors_of_the_source_are_named(server, tmp_path):
    with pytest.raises(DatasetError, match=r"/none\.zip: the server answered 404"):
        download((Download(f"{server.url}/none.zip", ""),), tmp_path)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(DatasetError, match=r"/x\.zip: .*run the command again"):
        download((Download(f"{server.url}/x.zip", ""),), tmp_path)


def test_catalog_download_puts_a_dataset_where_it_is_looked_for(server, tmp_path, monkeypatch):
    eval_miniatures.pets(tmp_path / "made", monkeypatch)
    for part in ("images", "annotations"):
        source = tmp_path / "made" / "oxford-iiit-pet"
        shutil.make_archive(str(tmp_path / part), "gztar", source, part)
        server.files[f"/{part}.tar.gz"] = (tmp_path / f"{part}.tar.gz").read_bytes()
    entry = catalog.ENTRIES["pets"]
    files = tuple(replace(item, url=f"{server.url}/{item.file_name}", checksum="") for item in entry.get)
    monkeypatch.setitem(catalog.ENTRIES, "pets", replace(entry, get=files))
    status = catalog.download_dataset("pets", tmp_path / "eval")
    assert status.state == "present"
    assert len(catalog.open_dataset("pets", tmp_path / "eval").samples) == 185


def test_what_cannot_be_downloaded_says_what_to_do(tmp_path):
    with pytest.raises(DatasetError, match=r"flickr30k: cannot be downloaded automatically.*form"):
        catalog.download_dataset("flickr30k", tmp_path)


def test_every_entry_says_how_to_get_it():
    assert len(catalog.ENTRIES) == 22
    for status in catalog.list_datasets("nowhere"):
        assert status.state == "missing"
        assert status.licence
        assert status.homepage.startswith("http")
        assert "--download" in status.how or catalog.ENTRIES[status.name].how
        assert status.provenance == "as published" or status.provenance.startswith("differs, because ")
        get = catalog.ENTRIES[status.name].get
        assert isinstance(get, Hosted) or all(item.url.startswith("http") for item in get)
        checksums = [] if isinstance(get, Hosted) else [item.checksum for item in get if item.checksum]
        for algorithm, _, digits in (text.partition(":") for text in checksums):
            assert len(digits) == {"md5": 32, "sha256": 64}[algorithm]
