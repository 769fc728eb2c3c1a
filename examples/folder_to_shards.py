"""A folder of images and a CSV with the columns `image`, `caption` and perhaps `subreddit` to training shards.

python examples/folder_to_shards.py photos photos/captions.csv shards
"""

import argparse
import csv
import io
import json
from pathlib import Path

import webdataset
from PIL import Image
from rich.progress import track


def jpeg(path: Path) -> bytes:
    """JPEG files as they are, all other pictures converted."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return path.read_bytes()
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def convert(folder: Path, table: Path, output: Path, pairs_per_shard: int) -> int:
    """Write `output`/shard_00000000.tar and so on; returns the number of pairs."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"image", "caption"} <= rows[0].keys():
        raise SystemExit(f"error: {table} needs a header with the columns image and caption, and a row")
    absent = [row["image"] for row in rows if not (folder / row["image"]).is_file()]
    if absent:
        raise SystemExit(f"error: {len(absent)} images of {table} are not in {folder}, the first is {absent[0]}")
    output.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(output / "shard_%08d.tar"), maxcount=pairs_per_shard, verbose=0) as shards:
        for number, row in enumerate(track(rows, description="Writing shards")):
            text = {"caption": row["caption"], "subreddit": row.get("subreddit") or ""}
            sample = {"__key__": f"{number:09d}", "jpg": jpeg(folder / row["image"]), "json": json.dumps(text).encode()}
            shards.write(sample)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the images are")
    parser.add_argument("table", type=Path, help="CSV; image is a path inside the folder")
    parser.add_argument("output", type=Path, help="where the shards go")
    parser.add_argument("--pairs-per-shard", type=int, default=1000, help="default: %(default)s")
    args = parser.parse_args()
    try:
        count = convert(args.folder, args.table, args.output, args.pairs_per_shard)
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{count:,} pairs in {args.output}. Check them:  meru-fast verify '{args.output}/*.tar'")
    print(f"Train on them:  ... dataset.shards='{args.output}/*.tar'")


if __name__ == "__main__":
    main()
