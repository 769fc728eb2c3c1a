"""Byte ranges of shards on object stores, through fsspec and a block cache that a machine's workers share.

Blocks are fetched whole, in the background, into `$MERU_FAST_CACHE/blocks` (default `~/.cache/meru_fast/blocks`).
The cache should hold two shuffle windows of this machine's ranks; a smaller one costs repeated fetches, nothing else.
"""

import contextlib
import hashlib
import os
from bisect import bisect_right, insort
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from meru_fast.data.errors import DataError

CACHE_BYTES = int(os.environ.get("MERU_FAST_BLOCK_CACHE_BYTES", 32 * 2**30))
FETCHES = 16  # at a time, per worker
EVICT_EVERY = 64  # fetches
REMEMBERED = 32768  # announced ranges, a multiple of a window's blocks


def cache_folder() -> Path:
    return Path(os.environ.get("MERU_FAST_CACHE") or Path.home() / ".cache" / "meru_fast")


class RemoteReader:
    """The interface of `shards.ShardReader` over fsspec. Belongs to one process."""

    def __init__(self, cache_bytes: int = CACHE_BYTES):
        self.cache_bytes = cache_bytes
        self.fetched = 0  # blocks that had to come over the network
        self._folder = cache_folder() / "blocks"
        self._ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)  # announced ones by path, sorted
        self._announced: deque[tuple[str, tuple[int, int]]] = deque()  # the same in order of announcement
        self._fetching: dict[Path, Future] = {}
        self._pool: ThreadPoolExecutor | None = None

    def prefetch(self, path: str, start: int, stop: int) -> None:
        """Announce a range: it is fetched in one request, unless a worker of this machine already did."""
        if (start, stop) not in self._ranges[path]:
            insort(self._ranges[path], (start, stop))
            self._announced.append((path, (start, stop)))
            if len(self._announced) > REMEMBERED:
                old_path, old_range = self._announced.popleft()
                self._ranges[old_path].remove(old_range)
        file = self._file(path, start, stop)
        if file in self._fetching or file.exists():
            return
        self._pool = self._pool or ThreadPoolExecutor(FETCHES, "meru-fast-fetch")
        self._fetching[file] = self._pool.submit(self._fetch, path, start, stop, file)
        self._fetching[file].add_done_callback(lambda _: self._fetching.pop(file, None))

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, out of the announced range around it if there is one.

        Raises:
            OSError: the object cannot be read.
            DataError: the cache cannot be written.
        """
        ranges = self._ranges.get(path, [])
        start, stop = ranges[at - 1] if (at := bisect_right(ranges, (offset, 2**63))) else (0, 0)
        if offset + size > stop:
            return _request(path, offset, offset + size)
        file = self._file(path, start, stop)
        for _ in range(2):  # the file may be evicted between the fetch and the read
            if waiting := self._fetching.get(file):
                waiting.result()
            try:
                with open(file, "rb") as block:
                    if os.fstat(block.fileno()).st_size == stop - start:
                        os.utime(block.fileno())  # the least recently used go first
                        return os.pread(block.fileno(), size, offset - start)
                file.unlink(missing_ok=True)  # cut short, as by a power cut: the cache is not synced
            except FileNotFoundError:
                pass
            self.prefetch(path, start, stop)
        return _request(path, offset, offset + size)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _file(self, path: str, start: int, stop: int) -> Path:
        return self._folder / hashlib.blake2b(f"{path}:{start}:{stop}".encode(), digest_size=16).hexdigest()

    def _fetch(self, path: str, start: int, stop: int, file: Path) -> None:
        data = _request(path, start, stop)
        new = file.with_name(f"{file.name}.{os.getpid()}.new")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            new.write_bytes(data)
            os.replace(new, file)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise DataError(
                f"the cache of remote shards {self._folder} cannot be written: {error.strerror}. Make room, lower "
                "MERU_FAST_BLOCK_CACHE_BYTES or give another place by MERU_FAST_CACHE"
            ) from error
        self.fetched += 1
        if self.fetched % EVICT_EVERY == 0:
            self._evict()

    def _evict(self) -> None:
        """Keep the cache within its size."""
        files = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another worker evicts too
                stat = entry.stat()
                files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        excess = sum(size for _, size, _ in files) - self.cache_bytes
        for _, size, name in sorted(files):
            if excess <= 0:
                break
            Path(name).unlink(missing_ok=True)
            excess -= size


def _request(path: str, start: int, stop: int) -> bytes:
    import fsspec

    fs, name = fsspec.core.url_to_fs(path)  # fsspec keeps one file system per process
    try:
        return fs.cat_file(name, start=start, end=stop)
    except OSError:
        raise
    except Exception as error:  # every fsspec back end has its own family of network errors
        raise OSError(f"{path}: {error}") from error
