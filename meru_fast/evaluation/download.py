"""Downloads that resume and are checked before they are unpacked."""

import gzip
import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from meru_fast.evaluation.protocol import DatasetError
from meru_fast.progress import progress_bar

CHUNK = 1 << 20


@dataclass(frozen=True)
class Download:
    """A file, its checksum and where it belongs.

    Attributes:
        checksum: ``"md5:..."`` or ``"sha256:..."``; "" where the source gives none.
        folder: where it is unpacked (or put, if it is no archive), relative to the dataset's folder.
        nested: an archive inside it that is unpacked too.
    """

    url: str
    checksum: str
    folder: str = "."
    nested: str = ""

    @property
    def file_name(self) -> str:
        return self.url.split("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Hosted:
    """A webdataset build on the Hugging Face hub, in the layout of CLIP_benchmark."""

    repository: str


def download(what: tuple[Download, ...] | Hosted, root: Path) -> None:
    """Fetch everything into `root`. What is already there is not fetched again; a partial file is continued.

    Raises:
        DatasetError: the source does not answer, or the content has another checksum.
    """
    root.mkdir(parents=True, exist_ok=True)
    if isinstance(what, Hosted):
        from huggingface_hub import snapshot_download

        snapshot_download(what.repository, repo_type="dataset", local_dir=root)
        return
    for item in what:
        done = root / f".{item.file_name}.done"
        if done.exists():
            continue
        archive = root / item.file_name
        if not archive.exists():
            fetch(item.url, archive)
        verify(archive, item.checksum)
        try:
            unpack(archive, root / item.folder)
            if item.nested:
                unpack(root / item.folder / item.nested, root / item.folder)
        except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise DatasetError(f"{archive}: cannot be unpacked into {root / item.folder} ({error})") from error
        done.touch()
        if is_archive(archive):
            archive.unlink()


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path` through ``<path>.part``, from which an interrupted download goes on.

    Raises:
        DatasetError: no source could be read to its end.
    """
    partial = path.with_name(path.name + ".part")
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            resumed = response.status == 206
            total = int(response.headers.get("Content-Length") or 0) + (start if resumed else 0)
            with partial.open("ab" if resumed else "wb") as file, progress_bar(path.name, total, "bytes") as advance:
                advance(start if resumed else 0)
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    advance(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing left to fetch: the part is whole, only its renaming was missed
            raise DatasetError(f"{url}: the server answered {error.code} ({error.reason})") from error
        total = start
    except OSError as error:
        raise DatasetError(f"{url}: {error}; what arrived is kept, run the command again to go on") from error
    if total and partial.stat().st_size < total:
        raise DatasetError(f"{url}: the connection ended early; run the command again to go on")
    partial.replace(path)


def verify(path: Path, checksum: str) -> None:
    """Compare a file with its checksum; a wrong file is removed. Raises DatasetError."""
    if not checksum:
        return
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != expected:
        path.unlink()
        raise DatasetError(f"{path}: {algorithm} is {found}, expected {expected}; removed, run the command again")


def is_archive(path: Path) -> bool:
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path) or path.suffix == ".gz"


def unpack(path: Path, folder: Path) -> None:
    """Unpack a ZIP, TAR or single .gz into `folder`; anything else is copied there."""
    folder.mkdir(parents=True, exist_ok=True)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    elif path.suffix == ".gz":
        with gzip.open(path) as source, (folder / path.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
    elif path.parent.resolve() != folder.resolve():
        shutil.copy2(path, folder / path.name)
