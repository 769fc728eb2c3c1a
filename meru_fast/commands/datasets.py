"""``meru-fast datasets``: the evaluation datasets, whether they are there, and how to get them."""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from meru_fast.evaluation import catalog
from meru_fast.evaluation.protocol import DatasetError

WIDTH = 100


def main(argv: Sequence[str] | None = None) -> int:
    """List the datasets, or download some. Returns 1 if a download failed."""
    parser = argparse.ArgumentParser(
        prog="meru-fast datasets",
        description="The datasets of the evaluation: whether and where they are, how to get them, terms.",
        epilog="examples:\n"
        "  meru-fast datasets                                all that is known about all of them\n"
        "  meru-fast datasets cifar10 food101                about two\n"
        "  meru-fast datasets --brief                        a line each\n"
        "  meru-fast datasets --download cifar10             fetch one (goes on where it stopped)\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="datasets to show or download (default: show all)")
    parser.add_argument("--data-dir", default="datasets/eval", help="where they lie, each in its folder (%(default)s)")
    parser.add_argument("--brief", action="store_true", help="a line each")
    parser.add_argument("--download", action="store_true", help="fetch the named datasets")
    parser.add_argument("--json", action="store_true", help="for machines")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in catalog.ENTRIES]
    if unknown:
        parser.error(f"unknown dataset {unknown[0]!r}; known: {', '.join(catalog.ENTRIES)}")
    if args.download:
        if not args.names:
            parser.error("--download needs the names of datasets")
        return _download(args.names, args.data_dir)
    chosen = [found for found in catalog.list_datasets(args.data_dir) if not args.names or found.name in args.names]
    if args.json:
        print(json.dumps([asdict(status) for status in chosen], indent=2, default=str))
    else:
        for status in chosen:
            (_print_line if args.brief else _print_details)(status)
        present = sum(status.state == "present" for status in chosen)
        print(f"{present} of {len(chosen)} present in {args.data_dir}")
    return 0


def _download(names: Sequence[str], data_dir: str) -> int:
    failed = 0
    for name in names:
        try:
            status = catalog.download_dataset(name, data_dir)
        except DatasetError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
        else:
            print(f"{name}: {status.state} in {status.root}")
    return failed


def _print_line(status: catalog.Status) -> None:
    split = "as published" if status.provenance == catalog.AS_PUBLISHED else "differs"
    print(f"{status.name:<12} {status.state:<11} {status.task:<15} split {split:<13} {status.root}")


def _print_details(status: catalog.Status) -> None:
    missing = [str(path.relative_to(status.root)) for path in status.missing]
    print(f"{status.name}: {status.title}, {status.task}")
    for title, text in (
        ("state", status.state if status.state == "missing" else f"{status.state}, {status.layout} layout"),
        ("looked for", f"{status.root}: {_some(missing)}" if missing else str(status.root)),
        ("split", status.provenance),
        ("licence", status.licence),
        ("how to get it", status.how),
    ):
        lines = textwrap.wrap(text, WIDTH - 17, break_on_hyphens=False, break_long_words=False)
        print(f"  {title:<15}" + f"\n{'':17}".join(lines))


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
