"""Fuzzing of what reads other people's files: TAR shards, captions, pictures, for training and for evaluation.

    python tests/support/fuzz_entry.py --seconds 600 --seed 0       a run with a budget
    python tests/support/fuzz_entry.py --seed 0 --only 4711         one case of it again, with its traceback

A case starts from a good file and damages it. Whatever comes out, a reader may refuse it with the one error that
callers catch (BadSampleError or DataError in training, DatasetError in evaluation) or give a well-formed result; it may
not raise anything else, hang, or answer differently the second time.
"""

import argparse
import collections
import faulthandler
import io
import json
import random
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image
from shard_factory import encoded, photo

from meru_fast.data import captions, decode
from meru_fast.data.errors import BadSampleError, DataError
from meru_fast.data.index import FolderIndex, ShardSet, scan
from meru_fast.data.samples import ShardSamples
from meru_fast.data.transforms import Window
from meru_fast.evaluation import sources
from meru_fast.evaluation.protocol import DatasetError

BLOCK = 512
HANG = 60  # seconds after which a case counts as hanging
TAR_FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
TAR_FIELDS = {"name": (0, 100), "size": (124, 136), "checksum": (148, 156), "type": (156, 157), "prefix": (345, 500)}
NASTY = (
    b"\0",
    b"\xff",
    b"\x80\0\0\0\0\0\0\0\xff\xff\xff\xff",
    b"-1",
    b"7777777",
    b"../../x.jpg",
    b"/etc/x.json",
    b"9" * 12,
)
PAX_KEYS = ("size", "path", "mtime", "uid", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major")
PAX_VALUES = ("-512", "-1", "0", "1", "512", "9" * 25, "nan", "1e400", "x", "", "../../x.jpg", "0,512,512,1")


@cache
def pictures() -> tuple[bytes, ...]:
    """Small pictures in many formats and modes."""
    picture = photo(0, 40)
    modes = [encoded(picture.convert(mode)) for mode in ("RGB", "L", "CMYK")]
    modes += [encoded(picture, progressive=True), encoded(picture, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")]
    others = [encoded(picture.convert(mode), "PNG") for mode in ("RGB", "RGBA", "P", "1", "I;16", "LA")]
    return (*modes, *others, *(encoded(picture, kind) for kind in ("WEBP", "GIF", "BMP", "TIFF")))


@cache
def records() -> tuple[bytes, ...]:
    """Captions as JSON and as text."""
    good = [{"caption": "a dog", "subreddit": "dogs"}, {"caption": "déjà vu \U0001f436", "key": "1", "sha256": "0"}]
    good += [{"captions": ["one", "two"]}, {"caption": ""}, {"caption": "x" * 3000, "subreddit": "itookapicture"}]
    return (*(json.dumps(record, ensure_ascii=False).encode() for record in good), b"a plain text\nwith two lines")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few random damages: bits, cuts, repeats, nasty strings."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0 if content:
                content[at % len(content)] ^= 1 << rng.randrange(8)
            case 1 if content:
                content[at % len(content)] = rng.randrange(256)
            case 2:
                del content[at : at + rng.randrange(1, 64)]
            case 3:
                content[at:at] = content[at : at + rng.randrange(1, 64)]
            case 4:
                piece = rng.choice(NASTY)
                content[at : at + len(piece)] = piece
            case 5 if rng.random() < 0.3:
                del content[at:]
    return bytes(content)


def shard(rng: random.Random) -> bytes:
    """A TAR of a few samples with what goes wrong in practice: odd names, doubles, links, damaged members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice(TAR_FORMATS)) as tar:
        for number in range(rng.randrange(1, 5)):
            key = rng.choice((f"{number:05d}", f"a.b/{number}", "same", "k" * 90, f"../{number}", "\udc80ü"))
            for suffix, kinds in (
                (rng.choice(("jpg", "png", "JPEG")), pictures()),
                (rng.choice(("json", "txt")), records()),
            ):
                content = rng.choice(kinds)
                headers = {rng.choice(PAX_KEYS): rng.choice(PAX_VALUES)} if rng.random() < 0.1 else {}
                add(tar, f"{key}.{suffix}", mutated(content, rng) if rng.random() < 0.3 else content, headers)
            if rng.random() < 0.3:
                add(tar, f"{key}.cls", rng.choice((b"0", b"1", b"7", b"x", b"")))
            if rng.random() < 0.1:
                link = tarfile.TarInfo(f"{key}.webp")
                link.type, link.linkname = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), "/etc/passwd"
                tar.addfile(link)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes, pax_headers: dict[str, str] | None = None) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.pax_headers = pax_headers or {}
    tar.addfile(info, io.BytesIO(content))


def damaged_shard(rng: random.Random) -> bytes:
    """A shard with random damage, or with one in a header whose checksum is right again, so that it is believed."""
    content = bytearray(shard(rng))
    if rng.random() < 0.5:
        return mutated(bytes(content), rng)
    headers = [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    for at in rng.sample(headers, min(len(headers), rng.randrange(1, 3))):
        field = rng.choice(tuple(TAR_FIELDS))
        start, stop = TAR_FIELDS[field]
        junk = rng.choice((rng.choice(NASTY), rng.randbytes(stop - start), bytes([rng.choice(b"0127LKxgSD5")])))
        junk = junk[: stop - start]
        content[at + start : at + start + len(junk)] = junk
        if field != "checksum":
            header = bytearray(content[at : at + BLOCK])
            header[148:156] = b" " * 8
            content[at + 148 : at + 156] = f"{sum(header):06o}\0 ".encode()
    return bytes(content)


def training_shard(rng: random.Random, folder: Path) -> str:
    """The index and the reader of the loader, on a damaged shard."""
    path = folder / "shard.tar"
    path.write_bytes(damaged_shard(rng))
    one, two = scan(str(path)), scan(str(path))
    assert one.entry == two.entry
    assert one.rows.tobytes() == two.rows.tobytes()
    location = folder / "index"
    for old in location.glob("*"):
        old.unlink()
    index = FolderIndex(location)
    index.append({path.name: one})
    samples = ShardSamples(ShardSet([str(path)], [index.entries[path.name]], [index]))
    outcomes = [read_sample(samples, number) for number in range(len(samples))]
    return f"{'faulty' if one.entry.fault else 'whole'} shard, {'some' if any(outcomes) else 'no'} good samples"


def read_sample(samples: ShardSamples, number: int) -> bool:
    assert isinstance(samples.name(number)[1], str)
    try:
        raw = samples.read(number)
        picture(raw.image)
    except BadSampleError:
        return False
    text = captions.compose(raw.caption, 0.9)
    assert isinstance(text, str)
    return True


def picture(data: bytes) -> None:
    image = decode.open_image(data)
    width, height = image.size
    pixels = decode.crop_and_resize(image, Window(0, 0, max(1, width // 2), max(1, height // 2)), 8)
    assert pixels.shape == (3, 8, 8)


def training_picture(rng: random.Random, folder: Path) -> str:
    try:
        picture(mutated(rng.choice(pictures()), rng))
    except BadSampleError:
        return "refused"
    return "decoded"


def training_caption(rng: random.Random, folder: Path) -> str:
    try:
        found = captions.parse(mutated(rng.choice(records()), rng), rng.random() < 0.2)
    except BadSampleError:
        return "refused"
    assert isinstance(found.text, str)
    assert found.subreddit is None or found.subreddit
    return "parsed"


def evaluation_tar(rng: random.Random, folder: Path) -> str:
    """Classification and retrieval sets from a damaged TAR."""
    path = folder / "eval.tar"
    path.write_bytes(damaged_shard(rng))
    if rng.random() < 0.5:
        found = sources.labelled_tars("fuzz", [path], ["zero", "one"])
        assert all(label in (0, 1) for label in found.samples.labels)
    else:
        found = sources.captioned_tars("fuzz", [path])
        assert all(isinstance(caption, str) for caption in found.captions)
    for number in range(len(found.samples)):
        image, _ = found.samples[number]
        assert isinstance(image, Image.Image)
    return "read"


def evaluation_manifest(rng: random.Random, folder: Path) -> str:
    rows = [{"image": "a.jpg", "caption": "a", "label": 0}, {"image": "b.jpg", "captions": ["b", "c"], "label": "dog"}]
    suffix = rng.choice((".json", ".jsonl", ".csv"))
    text = {
        ".json": json.dumps(rows),
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".csv": "image,caption,label\na.jpg,a,0\nb.jpg,b,1\n",
    }[suffix]
    path = folder / f"manifest{suffix}"
    path.write_bytes(mutated(text.encode(), rng))
    if rng.random() < 0.5:
        sources.labelled_manifest("fuzz", path)
    else:
        found = sources.captioned_manifest("fuzz", path)
        assert all(isinstance(caption, str) for caption in found.captions)
    return "read"


TARGETS: dict[str, Callable[[random.Random, Path], str]] = {
    "training shard": training_shard,
    "training picture": training_picture,
    "training caption": training_caption,
    "evaluation TAR": evaluation_tar,
    "evaluation manifest": evaluation_manifest,
}


def run_case(seed: int, number: int, folder: Path) -> str:
    """One case, the same for the same numbers: what it tried and what came of it. Raises what a reader must not."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(tuple(TARGETS))
    try:
        return f"{name}: {TARGETS[name](rng, folder)}"
    except (DataError, DatasetError):
        return f"{name}: refused"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="budget (default %(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="CASE", help="this case alone")
    args = parser.parse_args()
    outcomes: collections.Counter[str] = collections.Counter()
    findings: dict[str, tuple[int, int]] = {}
    number, stop = args.only or 0, time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < stop:
            faulthandler.dump_traceback_later(HANG, exit=True)
            try:
                outcomes[run_case(args.seed, number, Path(folder))] += 1
            except Exception as error:
                ours = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
                frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[-3:]]
                fault = f"{type(error).__name__} at {' > '.join(frames)}"
                first, count = findings.get(fault, (number, 0))
                findings[fault] = (first, count + 1)
                if args.only is not None:
                    traceback.print_exc()
            if args.only is not None:
                break
            number += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"seed {args.seed}: {number:,} cases in {args.seconds:g} s")
    for name, count in sorted(outcomes.items()):
        print(f"  {count:>9,}  {name}")
    for fault, (first, count) in findings.items():
        print(f"FINDING {count:,} times, first in case {first}: {fault}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
