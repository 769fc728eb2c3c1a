"""From a folder as the RedCaps downloader leaves it to training shards.

The downloader keeps `annotations/{subreddit}_{year}.json` and `images/{subreddit}/{image_id}.jpg`. Each annotation
file becomes shards `{subreddit}_{year}_{00000000}.tar` of up to 1,000 pairs `{image_id}.jpg` + `{image_id}.json`.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from meru_fast.data.errors import DataError
from meru_fast.data.pool import process_pool
from meru_fast.files import whole
from meru_fast.progress import progress_bar

PAIRS_PER_SHARD = 1000
MANIFEST = "prepared.jsonl"


@dataclass(frozen=True)
class Prepared:
    """What came of one annotation file (a line of the manifest)."""

    annotations: str
    signature: tuple[int, int]  # size and time of the annotation file when it was read
    shards: int
    pairs: int
    missing: int  # annotations whose image was never downloaded, or is empty


def prepare(
    root: Path,
    output: Path,
    *,
    annotations: Path | None = None,
    images: Path | None = None,
    pairs_per_shard: int = PAIRS_PER_SHARD,
    workers: int | None = None,
    progress: bool = True,
) -> list[Prepared]:
    """Write the shards of all annotation files; those that an earlier run finished are not touched again.

    Args:
        root: the downloader's folder.
        output: where the shards go.
        annotations, images: where those are, if not in `root`.
        pairs_per_shard: pairs in a shard; the last of an annotation file has fewer.
        workers: processes; default one per core.
        progress: draw a progress bar on stderr.

    Raises:
        DataError: a missing folder, an annotation file that is not of RedCaps, a file that cannot be read, or no room
            for the shards. Finished shards stay, and the next run goes on from them.
        ValueError: fewer than one pair in a shard.
    """
    if pairs_per_shard < 1:
        raise ValueError(f"pairs_per_shard must be 1 or more, got {pairs_per_shard}")
    annotations, images = annotations or root / "annotations", images or root / "images"
    for folder in (annotations, images):
        if not folder.is_dir():
            raise DataError(f"no folder {folder}: expected what the RedCaps downloader leaves (annotations/, images/)")
    files = sorted(annotations.glob("*.json"))
    if not files:
        raise DataError(f"no annotation files (*.json) in {annotations}")
    with _explained(output):
        output.mkdir(parents=True, exist_ok=True)
        done = _read_manifest(output / MANIFEST)
        todo = [file for file in files if getattr(done.get(file.name), "signature", None) != _signature(file)]
        counts = Counter(pairs=sum(done[file.name].pairs for file in files if file not in todo))
        with (
            process_pool(workers) as pool,
            open(output / MANIFEST, "a") as manifest,
            progress_bar("writing shards", len(files), "files", progress) as advance,
        ):
            advance(len(files) - len(todo))
            running = [pool.submit(_prepare_file, file, images, output, pairs_per_shard) for file in todo]
            for future in as_completed(running):
                result = future.result()
                done[result.annotations] = result
                manifest.write(json.dumps(asdict(result)) + "\n")
                manifest.flush()
                counts.update(pairs=result.pairs, missing=result.missing)
                advance(note=f"{counts['pairs']:,} pairs, {counts['missing']:,} images missing")
    return [done[file.name] for file in files]


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """What the system refuses, as the one kind of error that callers expect."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or output}: {error.strerror or error}. "
            "What is finished stays; run again to go on from there"
        ) from error


def _prepare_file(file: Path, images: Path, output: Path, pairs_per_shard: int) -> Prepared:
    """Shards of one annotation file. Complete shards appear at once, under their final names."""
    import webdataset

    signature = _signature(file)
    missing = 0

    def pairs() -> Iterator[dict]:
        nonlocal missing
        for record in _records(file):
            try:
                image = (images / record["subreddit"] / f"{record['image_id']}.jpg").read_bytes()
            except FileNotFoundError:
                image = b""
            if not image:
                missing += 1
                continue
            text = {"subreddit": record["subreddit"], "caption": record["caption"]}
            yield {"__key__": record["image_id"], "jpg": image, "json": json.dumps(text).encode()}

    shards = written = 0
    stream = pairs()
    for first in stream:  # no shard is opened before there is a pair for it, so none is empty
        shard = output / f"{file.stem}_{shards:08d}.tar"
        with (
            whole(shard) as new,
            new.open("wb") as out,  # TarWriter would leave it open after a failed write
            webdataset.TarWriter(out, encoder=False, mtime=0) as tar,
        ):
            for _, pair in zip(range(pairs_per_shard), chain([first], stream), strict=False):
                tar.write(pair)
                written += 1
        shards += 1
    for stale in output.glob(f"{file.stem}_????????.tar"):  # of an earlier, longer version of this file
        if int(stale.stem[-8:]) >= shards:
            stale.unlink()
    for partial in output.glob(f".{file.stem}_????????.tar.*"):  # of a run that was killed
        partial.unlink()
    return Prepared(file.name, signature, shards, written, missing)


def _records(file: Path) -> Iterator[dict[str, str]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))["annotations"]
        for record in records:
            for name in ("image_id", "subreddit"):  # parts of a path: nothing outside the folder is read
                if record[name] in ("", ".", "..") or set(record[name]) & {"/", "\\", "\0"}:
                    raise ValueError(f"{name} {record[name]!r} is no file name")
            yield {name: record[name] for name in ("image_id", "subreddit", "caption")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a RedCaps annotation file: {type(error).__name__} {error}") from error


def _signature(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _read_manifest(path: Path) -> dict[str, Prepared]:
    done = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = Prepared(**json.loads(line))
        except (ValueError, TypeError):
            continue  # a line that a kill cut short: that file is done again
        done[record.annotations] = Prepared(**{**asdict(record), "signature": tuple(record.signature)})
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """The command behind scripts/prepare_redcaps.py."""
    parser = argparse.ArgumentParser(
        prog="prepare_redcaps.py",
        description="Pack a folder as the RedCaps downloader leaves it (annotations/{subreddit}_{year}.json and "
        "images/{subreddit}/{id}.jpg) into training shards of 1,000 pairs. Can be killed and run again; finished "
        f"annotation files are remembered in OUTPUT/{MANIFEST}. Then: meru-fast index OUTPUT.",
    )
    parser.add_argument("root", type=Path, help="the downloader's folder")
    parser.add_argument("output", type=Path, help="where the shards go, e.g. datasets/redcaps")
    parser.add_argument("--annotations", type=Path, help="annotation files, if not in ROOT/annotations")
    parser.add_argument("--images", type=Path, help="images, if not in ROOT/images")
    parser.add_argument("--pairs-per-shard", type=int, default=PAIRS_PER_SHARD, help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    args = parser.parse_args(argv)
    try:
        results = prepare(**vars(args))
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shards, pairs, missing = (sum(getattr(r, name) for r in results) for name in ("shards", "pairs", "missing"))
    print(f"{pairs:,} pairs in {shards:,} shards in {args.output}; {missing:,} annotations had no image")
    return 0
