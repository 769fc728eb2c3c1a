"""The shard index: where every sample of a set of TARs lies, so that any of them can be read at once.

One index serves one folder of shards. It lives beside them in `.meru_index/` (or, where that cannot be written, in
the user's cache) and holds:

- `shards.json`: for every shard its signature (size and time), its rows, its keys, a checksum of its headers, and
  what was wrong with it.
- `rows.N.bin`: 24 bytes a sample (`ROW`), memory-mapped, so that all workers of a machine share one copy.
- `keys.N.bin`: the samples' names, end to end.

Data files only grow; `shards.json` is replaced atomically after them. A scan that is killed therefore keeps what it
had saved, and a reader never sees half an index.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meru_fast.data import shards as shard_files
from meru_fast.data.errors import DataError
from meru_fast.data.pool import process_pool
from meru_fast.data.remote import cache_folder
from meru_fast.data.tar import regular_members
from meru_fast.files import whole
from meru_fast.progress import progress_bar

VERSION = 1
FOLDER = ".meru_index"
SAVE_EVERY = 5.0  # seconds of scanning that a kill may cost
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
TEXT_TYPES = ("json", "txt")
BLOCK = 512  # members of a TAR start at multiples of this
MAX_MEMBER = 2**32 - 1

# Defects seen in the headers alone; decoding finds the rest.
NO_IMAGE, NO_TEXT, DUPLICATE, TRUNCATED, EMPTY_IMAGE, TOO_LARGE = (1 << bit for bit in range(6))
TXT = 1 << 7  # the caption is a .txt member, not .json: no defect
DEFECTS = {
    TRUNCATED: "the shard ends inside this sample",
    NO_IMAGE: "no image member",
    NO_TEXT: "no caption member (.json or .txt)",
    DUPLICATE: "key occurs twice in its shard",
    EMPTY_IMAGE: "image of zero bytes",
    TOO_LARGE: "member of 4 GiB or more",
}

ROW = np.dtype(
    [
        ("image_block", "<u4"),  # offset of the image in the TAR, in blocks of 512 bytes
        ("image_size", "<u4"),
        ("text_block", "<u4"),
        ("text_size", "<u4"),
        ("key_start", "<u4"),  # within the keys of its shard
        ("key_size", "<u2"),
        ("flags", "<u2"),
    ]
)


@dataclass
class ShardEntry:
    """What the index knows of one shard (a line of shards.json)."""

    signature: list[int | str]
    first_row: int = 0
    num_rows: int = 0
    first_key: int = 0
    keys_size: int = 0
    checksum: str = ""
    fault: str = ""


@dataclass
class Scan:
    """One scanned shard: its entry, its rows and its keys."""

    entry: ShardEntry
    rows: np.ndarray
    keys: bytes


@dataclass
class _Group:
    """The members seen so far under one key."""

    key: str
    flags: int = 0
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # kind -> (offset, size)


def scan(path: str) -> Scan:
    """Read all headers of one shard.

    A shard that is empty, cut short or no TAR gives the samples before the fault, and says so in `entry.fault`.

    Raises:
        DataError: a compressed TAR, which cannot be read at random places, or a file that cannot be read at all.
    """
    try:
        return _scan(path)
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from error


def _scan(path: str) -> Scan:
    entry = ShardEntry(shard_files.signature(path))
    groups: list[_Group] = []
    by_key: dict[str, _Group] = {}
    checksum = hashlib.blake2b(digest_size=8)
    with shard_files.open_shard(path) as file:
        for name, offset, size in _members(file, path, entry):
            checksum.update(f"{name}\0{offset}\0{size}\0".encode("utf-8", "surrogateescape"))
            key, kind = _key_and_kind(name)
            if not kind:
                continue
            group = by_key.get(key)
            if group is None or kind in group.members:
                group = by_key[key] = _Group(key, DUPLICATE if group else 0)
                groups.append(group)
            group.members[kind] = (offset, size)
        rows, keys = _rows([g for g in groups if not _is_extra(g, by_key)], file, int(entry.signature[0]))
    entry.num_rows, entry.keys_size, entry.checksum = len(rows), len(keys), checksum.hexdigest()
    return Scan(entry, rows, keys)


def _members(file, path: str, entry: ShardEntry) -> Iterator[tuple[str, int, int]]:
    """Name, data offset and size of every regular member; what ends the walk early is noted in `entry.fault`."""
    size = int(entry.signature[0])
    if size == 0:
        entry.fault = "empty file"
        return
    magic = file.read(6)
    file.seek(0)
    if magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
        raise DataError(f"shard {path} is compressed, so its samples cannot be addressed: decompress it")
    try:
        for member in regular_members(file):
            yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        entry.fault = f"truncated or damaged TAR: {error}"
    if size % BLOCK and not entry.fault:
        entry.fault = "truncated TAR: ends inside a block"


def _key_and_kind(name: str) -> tuple[str, str]:
    """Key and kind ("image", "json", "txt" or "", not ours) of a member. The key may itself hold dots."""
    name = name.removeprefix("./")
    key, dot, extension = name.rpartition(".")
    extension = extension.lower()
    if not dot or not key or key.rpartition("/")[2].startswith(".") or key.endswith("/"):
        return key, ""
    return key, "image" if extension in IMAGE_TYPES else extension if extension in TEXT_TYPES else ""


def _is_extra(group: _Group, by_key: dict[str, _Group]) -> bool:
    """Whether this is a further picture of another sample, such as 0001.mask.png beside 0001.jpg."""
    return not {"json", "txt"} & group.members.keys() and group.key.rpartition(".")[0] in by_key


def _rows(groups: Sequence[_Group], file, shard_size: int) -> tuple[np.ndarray, bytes]:
    rows = np.zeros(len(groups), ROW)
    keys = bytearray()
    for row, group in zip(rows, groups, strict=True):
        text = _text_kind(group, file)
        image_offset, image_size = group.members.get("image", (0, 0))
        text_offset, text_size = group.members.get(text, (0, 0))
        key = group.key.encode("utf-8", "surrogateescape")[: 2**16 - 1]
        flags = group.flags | (TXT if text == "txt" else 0)
        flags |= NO_IMAGE if "image" not in group.members else EMPTY_IMAGE if not image_size else 0
        flags |= 0 if text else NO_TEXT
        if max(image_offset + image_size, text_offset + text_size) > shard_size:
            flags |= TRUNCATED
        if max(image_size, text_size) > MAX_MEMBER:
            flags |= TOO_LARGE
            image_size, text_size = min(image_size, MAX_MEMBER), min(text_size, MAX_MEMBER)
        row["image_block"], row["image_size"] = image_offset // BLOCK, image_size
        row["text_block"], row["text_size"] = text_offset // BLOCK, text_size
        row["key_start"], row["key_size"], row["flags"] = len(keys), len(key), flags
        keys += key
    return rows, bytes(keys)


def _text_kind(group: _Group, file) -> str:
    """The member that holds the caption: JSON (it also knows the subreddit), unless it has none and a .txt has."""
    if "json" not in group.members:
        return "txt" if "txt" in group.members else ""
    if "txt" not in group.members:
        return "json"
    offset, size = group.members["json"]
    file.seek(offset)
    try:
        has_caption = isinstance(json.loads(file.read(min(size, MAX_MEMBER))).get("caption"), str)
    except (ValueError, AttributeError, RecursionError):
        has_caption = False
    return "json" if has_caption else "txt"


class FolderIndex:
    """The index of one folder of shards, on disk. Not for direct use: see `open_shards`.

    Raises:
        DataError: a damaged index.
    """

    def __init__(self, location: Path):
        self.location = location
        self.entries: dict[str, ShardEntry] = {}
        self.generation = 0
        table = location / "shards.json"
        if table.exists():
            try:
                content = json.loads(table.read_text())
                if content["version"] == VERSION:
                    self.generation = content["generation"]
                    self.entries = {name: ShardEntry(**entry) for name, entry in content["shards"].items()}
                self._check_sizes()
            except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
                raise DataError(f"damaged index {table} ({error}): delete {location} and start again") from error

    def _check_sizes(self) -> None:
        row_end, key_end = self._end(self.entries.values())
        for file, size in ((self.rows_file, row_end * ROW.itemsize), (self.keys_file, key_end)):
            if size and file.stat().st_size < size:
                raise ValueError(f"{file.name} has {file.stat().st_size:,} of {size:,} bytes")

    @property
    def rows_file(self) -> Path:
        return self.location / f"rows.{self.generation}.bin"

    @property
    def keys_file(self) -> Path:
        return self.location / f"keys.{self.generation}.bin"

    def mapped(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and keys of all shards that count; what a killed scan left after these is not looked at."""
        row_end, key_end = self._end(self.entries.values())
        rows = np.memmap(self.rows_file, ROW, "r", shape=(row_end,)) if row_end else np.zeros(0, ROW)
        keys = np.memmap(self.keys_file, np.uint8, "r", shape=(key_end,)) if key_end else np.zeros(0, np.uint8)
        return rows, keys

    def append(self, scans: dict[str, Scan]) -> None:
        """Save freshly scanned shards, by name: data first, then the table that makes them count."""
        self.location.mkdir(parents=True, exist_ok=True)
        live = sum(entry.num_rows for name, entry in self.entries.items() if name not in scans)
        if self._end(self.entries.values())[0] > 2 * live + 4096:
            self.forget(scans.keys())
        row_end, key_end = self._end(self.entries.values())
        with _at(self.rows_file, row_end * ROW.itemsize) as rows, _at(self.keys_file, key_end) as keys:
            for name, done in scans.items():
                done.entry.first_row, done.entry.first_key = row_end, key_end
                rows.write(done.rows.tobytes())
                keys.write(done.keys)
                row_end, key_end = row_end + len(done.rows), key_end + len(done.keys)
                self.entries[name] = done.entry
        self.save()

    def save(self) -> None:
        content = {
            "version": VERSION,
            "generation": self.generation,
            "shards": {name: asdict(entry) for name, entry in sorted(self.entries.items())},
        }
        with whole(self.location / "shards.json") as new:
            new.write_text(json.dumps(content, separators=(",", ":")))

    def forget(self, names: Iterable[str]) -> None:
        """Start new data files without these shards; whoever has the old ones open keeps them."""
        old_rows, old_keys = self.rows_file, self.keys_file
        rows, keys = old_rows.read_bytes(), old_keys.read_bytes()
        kept = {name: entry for name, entry in self.entries.items() if name not in set(names)}
        self.entries, self.generation = {}, self.generation + 1
        with _at(self.rows_file, 0) as new_rows, _at(self.keys_file, 0) as new_keys:
            for name, entry in kept.items():
                first_row, first_key = new_rows.tell() // ROW.itemsize, new_keys.tell()
                end_row = entry.first_row + entry.num_rows
                new_rows.write(rows[entry.first_row * ROW.itemsize : end_row * ROW.itemsize])
                new_keys.write(keys[entry.first_key : entry.first_key + entry.keys_size])
                entry.first_row, entry.first_key = first_row, first_key
                self.entries[name] = entry
        self.save()
        old_rows.unlink()
        old_keys.unlink()

    @staticmethod
    def _end(entries: Iterable[ShardEntry]) -> tuple[int, int]:
        ends = [(entry.first_row + entry.num_rows, entry.first_key + entry.keys_size) for entry in entries]
        return max((row for row, _ in ends), default=0), max((key for _, key in ends), default=0)


@contextlib.contextmanager
def _at(path: Path, offset: int):
    """The file, open for writing at `offset`: what a killed scan left after that is dropped. On disk when closed."""
    with open(path, "r+b" if path.exists() else "w+b") as file:
        file.truncate(offset)
        file.seek(offset)
        yield file
        file.flush()
        os.fsync(file.fileno())


def beside(folder: str) -> Path | None:
    """The place of an index beside its shards, which a remote folder does not have."""
    return None if shard_files.is_remote(folder) else Path(folder) / FOLDER


def writable(folder: str) -> Path:
    """Where an index of this folder can be written: beside the shards, or else in the user's cache."""
    place = beside(folder)
    if place and os.access(place if place.exists() else folder, os.W_OK):
        return place
    name = folder if place is None else os.path.abspath(folder)
    return cache_folder() / "index" / hashlib.blake2b(name.encode(), digest_size=12).hexdigest()


@contextlib.contextmanager
def _locked(location: Path):
    """One process at a time scans a folder; the others wait and find the work done."""
    location.mkdir(parents=True, exist_ok=True)
    with open(location / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # which forked processes do not inherit, so that it ends with this one
        yield


class Location(NamedTuple):
    """Where one sample lies."""

    shard: str
    image_offset: int
    image_size: int
    text_offset: int
    text_size: int
    flags: int


class ShardSet:
    """All samples of a set of shards, by number. Cheap to send to another process: it maps the index there again.

    Attributes:
        paths: the shards, in order.
        entries: what the index knows of each.
        starts: int64 [shards + 1], the number of the first sample of each shard, and the total.
    """

    def __init__(self, paths: list[str], entries: list[ShardEntry], folders: list[FolderIndex]):
        self.paths = paths
        self.entries = entries
        self._folders = folders
        self.starts = np.concatenate([[0], np.cumsum([entry.num_rows for entry in entries])]).astype(np.int64)
        _ = self._maps  # now: forked workers share them, and a later re-index cannot take the files away

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}

    @cached_property
    def _maps(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        unique = {id(folder): folder for folder in self._folders}
        return {key: folder.mapped() for key, folder in unique.items()}

    def shard_of(self, sample: int) -> int:
        """Position in `paths` of the shard that holds this sample."""
        return int(np.searchsorted(self.starts, sample, "right")) - 1

    def locate(self, sample: int) -> Location:
        """Where a sample lies.

        Raises:
            IndexError: no such sample.
        """
        shard = self.shard_of(sample)
        row = self._row(shard, sample)
        return Location(
            self.paths[shard],
            int(row["image_block"]) * BLOCK,
            int(row["image_size"]),
            int(row["text_block"]) * BLOCK,
            int(row["text_size"]),
            int(row["flags"]),
        )

    def key(self, sample: int) -> str:
        """The sample's name in its shard."""
        shard = self.shard_of(sample)
        row = self._row(shard, sample)
        start = self.entries[shard].first_key + int(row["key_start"])
        keys = self._maps[id(self._folders[shard])][1]
        return bytes(keys[start : start + int(row["key_size"])]).decode("utf-8", "replace")

    def extent(self, first: int, stop: int) -> tuple[str, int, int]:
        """Shard and byte range that hold the samples [first, stop), which lie in one shard."""
        shard = self.shard_of(first)
        rows = self._rows(shard)[first - self.starts[shard] : stop - self.starts[shard]]
        blocks = np.concatenate([rows["image_block"], rows["text_block"]])
        sizes = np.concatenate([rows["image_size"], rows["text_size"]])
        present = sizes > 0
        if not present.any():
            return self.paths[shard], 0, 0
        starts = blocks[present].astype(np.int64) * BLOCK
        return self.paths[shard], int(starts.min()), int((starts + sizes[present]).max())

    def flags(self) -> np.ndarray:
        """Header defects of all samples, uint16 [samples]."""
        return np.concatenate([np.zeros(0, np.uint16), *(self._rows(i)["flags"] for i in range(len(self.paths)))])

    @cached_property
    def fingerprint(self) -> int:
        """63 bits that change when a shard or its place in the order does; where the shards lie does not matter."""
        parts = (
            f"{shard_files.split_folder(p)[1]}:{e.checksum}" for p, e in zip(self.paths, self.entries, strict=True)
        )
        digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def _rows(self, shard: int) -> np.ndarray:
        entry = self.entries[shard]
        return self._maps[id(self._folders[shard])][0][entry.first_row : entry.first_row + entry.num_rows]

    def _row(self, shard: int, sample: int) -> np.ndarray:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return self._rows(shard)[sample - int(self.starts[shard])]


def open_shards(shards, *, workers: int | None = None, progress: bool = True, prune: bool = False) -> ShardSet:
    """Index what is new or changed among the shards, and open them all.

    Args:
        shards: folder, file, glob, brace range, `::`-joined or list of these; local or fsspec (`s3://...`).
        workers: scanning processes; default one per core.
        progress: draw a progress bar on stderr while scanning.
        prune: forget indexed shards that are gone, instead of refusing to start without them.

    Raises:
        DataError: no shards, a shard that vanished since it was indexed, one that is compressed or cannot be read, a
            damaged index, or no place to write one.
    """
    found, globs = _find(shards)
    by_folder: dict[str, list[str]] = {}
    for path in found:
        by_folder.setdefault(shard_files.split_folder(path)[0], []).append(path)
    folders = {}
    for folder in {**by_folder, **{shard_files.split_folder(p)[0]: None for p in globs}}:
        paths = by_folder.get(folder, [])
        index = _load(folder, paths)
        gone = _vanished(index, folder, paths, globs)
        if gone and not prune:
            more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
            raise DataError(
                f"shard {folder}/{gone[0]}{more} was indexed and is gone. Put it back, or forget it with "
                f"`meru-fast index --prune {folder}`"
            )
        if gone or _stale(index, paths):
            index = _update(folder, paths, gone, workers, progress)
        folders[folder] = index
    if not found:
        raise DataError(f"no shards match {' '.join(shard_files.patterns(shards))!r}")
    entries = [folders[shard_files.split_folder(p)[0]].entries[shard_files.split_folder(p)[1]] for p in found]
    return ShardSet(found, entries, [folders[shard_files.split_folder(p)[0]] for p in found])


def _find(shards) -> tuple[list[str], list[str]]:
    """All shards, each once, in sorted order, and the globs among what was asked for."""
    found: set[str] = set()
    globs: list[str] = []
    for pattern in shard_files.patterns(shards):
        paths, answered = shard_files.expand(pattern)
        found.update(paths)
        globs += [answered] if answered else []
    return sorted(found), globs


def _load(folder: str, paths: list[str]) -> FolderIndex:
    """The index of a folder; one beside the shards serves even where it cannot be written, as long as it is right."""
    place = writable(folder)
    if (shipped := beside(folder)) not in (None, place) and shipped.exists():
        index = FolderIndex(shipped)
        if not _stale(index, paths):
            return index
    return FolderIndex(place)


def _vanished(index: FolderIndex, folder: str, paths: list[str], globs: list[str]) -> list[str]:
    """Indexed shards that a glob asks for and that are not there any more."""
    missing = index.entries.keys() - {shard_files.split_folder(path)[1] for path in paths}
    return sorted(name for name in missing if any(fnmatch(f"{folder}/{name}", pattern) for pattern in globs))


def _stale(index: FolderIndex, paths: list[str]) -> list[str]:
    """Shards the index does not know as they are now."""
    known = {name: entry.signature for name, entry in index.entries.items()}
    return [path for path in paths if known.get(shard_files.split_folder(path)[1]) != shard_files.signature(path)]


def _update(folder: str, paths: list[str], gone: list[str], workers: int | None, progress: bool) -> FolderIndex:
    location = writable(folder)
    try:
        return _update_at(location, paths, gone, workers, progress)
    except OSError as error:
        raise DataError(
            f"the index {location} cannot be written: {error.strerror or error}. What was scanned so far is kept; "
            "make room, or give another place by MERU_FAST_CACHE, and start again"
        ) from error


def _update_at(location: Path, paths: list[str], gone: list[str], workers: int | None, progress: bool) -> FolderIndex:
    with _locked(location):
        index = FolderIndex(location)  # another process may just have done the work
        if gone:
            index.forget(gone)
        pending: dict[str, Scan] = {}
        saved = time.monotonic()
        for path, done in _scan_all(_stale(index, paths), workers, progress):
            pending[shard_files.split_folder(path)[1]] = done
            if time.monotonic() - saved > SAVE_EVERY:
                index.append(pending)
                pending, saved = {}, time.monotonic()
        if pending:
            index.append(pending)
    return index


def _scan_all(paths: list[str], workers: int | None, progress: bool) -> Iterator[tuple[str, Scan]]:
    """Scan shards, in processes if there are many; in whatever order they are done."""
    workers = min(workers or os.cpu_count() or 1, len(paths) // 8)
    samples = 0
    with progress_bar("indexing shards", len(paths), "shards", progress and bool(paths)) as advance:
        for path, done in _scan_in_processes(paths, workers) if workers > 1 else ((p, scan(p)) for p in paths):
            samples += done.entry.num_rows
            advance(note=f"{samples:,} samples")
            yield path, done


def _scan_in_processes(paths: list[str], workers: int) -> Iterator[tuple[str, Scan]]:
    todo = iter(paths)
    with process_pool(workers) as pool:
        running = {pool.submit(scan, path): path for path in islice(todo, 4 * workers)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                path = running.pop(future)
                running.update({pool.submit(scan, following): following for following in islice(todo, 1)})
                yield path, future.result()


def main(argv: Sequence[str] | None = None) -> int:
    """`meru-fast index`: scan shards ahead of time, and say what is in them."""
    parser = argparse.ArgumentParser(
        prog="meru-fast index",
        description="Index shards (TARs of RedCaps or img2dataset layout), so that training starts at once.\n\n"
        "The index is kept beside the shards in .meru_index/, or in the user's cache where that cannot be written.\n"
        "Training does the same by itself when it starts; run twice, it only looks for changes.",
        epilog="examples:\n"
        "  meru-fast index datasets/redcaps                          all .tar files of a folder\n"
        "  meru-fast index 'datasets/redcaps/*_2020_*.tar'           a glob; brace ranges {000..099} work too\n"
        "  meru-fast index --prune datasets/redcaps                  after shards were removed\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", help="folders, files, globs, brace ranges, or a::b; local or s3://...")
    parser.add_argument("--workers", type=int, help="scanning processes (default: one per core)")
    parser.add_argument("--prune", action="store_true", help="forget indexed shards that are gone")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    try:
        found = open_shards(args.shards, workers=args.workers, progress=not args.quiet, prune=args.prune)
    except DataError as error:
        sys.exit(f"error: {error}")
    flags = found.flags()
    print(f"{len(found.paths):,} shards, {len(found):,} samples")
    for flag, reason in DEFECTS.items():
        if count := int(np.count_nonzero(flags & flag)):
            print(f"  {count:,} unusable: {reason}")
    for path, entry in zip(found.paths, found.entries, strict=True):
        if entry.fault:
            print(f"  {path}: {entry.fault} ({entry.num_rows:,} samples before it)")
    return 0
