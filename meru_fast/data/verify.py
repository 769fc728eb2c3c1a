"""`meru-fast verify`: find every bad sample of a set of shards ahead of time."""

import argparse
import csv
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path

from meru_fast.data import decode
from meru_fast.data.dataset import Defect
from meru_fast.data.errors import BadSampleError, DataError
from meru_fast.data.index import ShardSet, open_shards
from meru_fast.data.pool import process_pool
from meru_fast.data.samples import ShardSamples
from meru_fast.data.transforms import Window
from meru_fast.files import whole
from meru_fast.progress import progress_bar

CHUNK = 256  # samples that a process checks at a time


def verify(shards, *, workers: int | None = None, progress: bool = True) -> Iterator[Defect]:
    """Read, parse and decode every sample exactly as training does; yield the bad ones, in order.

    A fault of a whole shard (truncated, empty, no TAR) comes as a defect without a key.

    Args:
        shards: as in `open_shards`, or an opened set.
        workers: processes; default one per core, 0 checks in this one.
        progress: draw a progress bar on stderr.

    Raises:
        DataError: as `open_shards`, or a checking process was killed.
    """
    found = shards if isinstance(shards, ShardSet) else open_shards(shards, workers=workers, progress=progress)
    for path, entry in zip(found.paths, found.entries, strict=True):
        if entry.fault:
            yield Defect(path, "", entry.fault)
    chunks = [range(start, min(start + CHUNK, len(found))) for start in range(0, len(found), CHUNK)]
    bad = 0
    with progress_bar("checking samples", len(found), "samples", progress) as advance:
        for chunk, defects in zip(chunks, _check_all(found, chunks, workers), strict=True):
            bad += len(defects)
            advance(len(chunk), f"{bad:,} bad")
            yield from defects


def _check_all(found: ShardSet, chunks: list[range], workers: int | None) -> Iterator[list[Defect]]:
    if workers == 0 or len(chunks) == 1:
        yield from map(_check, repeat(ShardSamples(found)), chunks)
        return
    with process_pool(workers, _open, found) as pool:
        queue = iter(chunks)
        running = [pool.submit(_check_opened, chunk) for chunk in islice(queue, 64)]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(_check_opened, chunk) for chunk in islice(queue, 1)]


_opened: ShardSamples  # in a checking process: the samples, sent once and not with every chunk


def _open(found: ShardSet) -> None:
    global _opened
    _opened = ShardSamples(found)


def _check_opened(chunk: range) -> list[Defect]:
    return _check(_opened, chunk)


def _check(samples: ShardSamples, chunk: range) -> list[Defect]:
    defects = []
    for sample in chunk:
        try:
            image = decode.open_image(samples.read(sample).image)
            decode.crop_and_resize(image, Window(0, 0, 1, 1), 1)
        except BadSampleError as error:
            defects.append(Defect(*samples.name(sample), str(error)))
    return defects


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit status 0: all good; 1: bad samples; 2: no usable shards."""
    parser = argparse.ArgumentParser(
        prog="meru-fast verify",
        description="Read, parse and decode every sample of the shards as training would, and list the bad ones.\n"
        "Training replaces bad samples by itself; this tells how many there are before it starts.",
        epilog="examples:\n"
        "  meru-fast verify datasets/redcaps                         status 0: all good, 1: bad samples, 2: no shards\n"
        "  meru-fast verify 'datasets/redcaps/*.tar' --quiet --output bad.csv\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", help="folders, files, globs, brace ranges, or a::b; local or s3://...")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--output", type=Path, metavar="CSV", help="also write shard, key and reason of each to a file")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the summary")
    args = parser.parse_args(argv)
    reasons: Counter[str] = Counter()
    try:
        if args.output:  # that there is no place for the list is to be known now, not after hours
            args.output.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.output.parent).close()
        found = open_shards(args.shards, workers=args.workers, progress=not args.quiet)
        defects = []
        for defect in verify(found, workers=args.workers, progress=not args.quiet):
            defects.append(defect)
            reasons[defect.reason.split(":")[0]] += 1
    except (DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not args.quiet:
        for defect in defects:
            print(f"{defect.shard}\t{defect.key or '(shard)'}\t{defect.reason}")
    if args.output:
        with whole(args.output) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows([Defect._fields, *defects])
    print(f"{len(found):,} samples in {len(found.paths):,} shards, {len(defects):,} bad")
    for reason, count in reasons.most_common():
        print(f"  {count:,} {reason}")
    return 1 if defects else 0
