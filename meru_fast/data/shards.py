"""Which shards a user means, and bytes out of them: local files and anything fsspec can open."""

import glob
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from meru_fast.data.errors import DataError

MAX_OPEN_SHARDS = 128


def is_remote(path: str) -> bool:
    """Whether fsspec, and not the local file system, opens this path."""
    return "://" in path


def split_folder(path: str) -> tuple[str, str]:
    """Folder and name of a shard; works for URLs and for Windows-free local paths alike."""
    folder, _, name = path.rpartition("/")
    return folder or ("/" if path.startswith("/") else "."), name


def patterns(shards: str | os.PathLike | Iterable) -> list[str]:
    """Flatten what users write into one list of patterns.

    A string may join several with `::` and hold brace ranges (`shard_{00000..00099}.tar`); a list may mix all forms.

    Raises:
        DataError: a string that ends in the name of a file system.
    """
    if not isinstance(shards, (str, os.PathLike)):
        return [pattern for item in shards for pattern in patterns(item)]
    from braceexpand import braceexpand

    expanded = (pattern for part in _split_joined(os.fspath(shards)) for pattern in braceexpand(part))
    return [os.path.expanduser(pattern.removeprefix("file://")) for pattern in expanded]


def _split_joined(spec: str) -> Iterator[str]:
    """Split at `::`, except where it chains fsspec file systems (`simplecache::s3://...`)."""
    chain: list[str] = []
    for part in filter(None, spec.split("::")):
        chain.append(part)
        if not _is_protocol(part):
            yield "::".join(chain)
            chain = []
    if chain:
        raise DataError(f"shards {spec!r} end in the file-system name {chain[-1]!r}, with no path after it")


def _is_protocol(part: str) -> bool:
    if not part.isalnum():
        return False
    from fsspec.registry import known_implementations

    return part in known_implementations


def expand(pattern: str) -> tuple[list[str], str]:
    """Paths of one pattern, sorted, and the glob they answer (empty for the name of one shard).

    Raises:
        DataError: nothing there.
    """
    if is_remote(pattern):
        return _expand_remote(pattern)
    if os.path.isfile(pattern):
        return [pattern], ""
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    elif not glob.has_magic(pattern):
        raise DataError(f"no such shard: {pattern}")
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)), pattern


def _expand_remote(pattern: str) -> tuple[list[str], str]:
    try:
        return _list_remote(pattern)
    except (DataError, FileNotFoundError):
        raise
    except Exception as error:  # every fsspec back end has its own family of network errors
        raise DataError(f"{pattern} cannot be listed: {error}") from error


def _list_remote(pattern: str) -> tuple[list[str], str]:
    fs, path = _file_system(pattern)
    fs.invalidate_cache()  # a listing from earlier in this process would hide shards that came, changed or went
    if not glob.has_magic(path):
        if fs.isfile(path):
            return [pattern], ""
        if not fs.isdir(path):
            raise DataError(f"no such shard: {pattern}")
        path = path.rstrip("/") + "/*.tar"
    chain = "::".join([*pattern.split("::")[:-1], ""])
    return [chain + fs.unstrip_protocol(name) for name in sorted(fs.glob(path))], chain + fs.unstrip_protocol(path)


def _file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path's name there."""
    import fsspec

    return fsspec.core.url_to_fs(path)


def signature(path: str) -> list[int | str]:
    """What changes when a shard does, read without opening it: size and modification time (or an object's etag)."""
    if not is_remote(path):
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    fs, name = _file_system(path)
    info = fs.info(name)
    marks = (info.get(mark) for mark in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created"))
    return [int(info["size"] or 0), str(next((mark for mark in marks if mark), ""))]


def open_shard(path: str):
    """A readable, seekable binary file."""
    if not is_remote(path):
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


class ShardReader:
    """Byte ranges of local shards, by positioned reads on a bounded number of open files. Belongs to one process."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, or fewer at the end of the file.

        Raises:
            OSError: the shard cannot be opened or read.
        """
        return os.pread(self._descriptor(path), size, offset)

    def prefetch(self, path: str, start: int, stop: int) -> None:
        """Tell the kernel to read this range in one go, in the background; all workers share what it caches."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor(path), start, stop - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[path]
