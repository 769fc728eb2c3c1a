"""``meru-fast datasets``: the evaluation datasets, whether they are there, and how to get them."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from meru_fast.evaluation import catalog
from meru_fast.evaluation.protocol import DatasetError


def main(argv: Sequence[str] | None = None) -> int:
    """List the datasets, or download some. Returns 1 if a download failed."""
    parser = argparse.ArgumentParser(
        prog="meru-fast datasets",
        description="The datasets of the evaluation: whether and where they are, how to get them, terms.",
        epilog="examples:\n"
        "  meru-fast datasets                                all of them, a line each\n"
        "  meru-fast datasets --details                      with licence, missing files and how to get them\n"
        "  meru-fast datasets cifar10 food101                more about two\n"
        "  meru-fast datasets --download cifar10             fetch one (goes on where it stopped)\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="datasets to show in detail, or to download")
    parser.add_argument("--data-dir", default="datasets/eval", help="where they lie, each in its folder (%(default)s)")
    parser.add_argument("--details", action="store_true", help="all that is known about each")
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
    elif args.names or args.details:
        for status in chosen:
            _print_details(status)
    else:
        _print_lines(chosen)
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


def _print_lines(chosen: Sequence[catalog.Status]) -> None:
    for status in chosen:
        split = "as published" if status.provenance == catalog.AS_PUBLISHED else "differs"
        print(f"{status.name:<12} {status.state:<11} {status.task:<15} split {split:<13} {status.root}")
    present = sum(status.state == "present" for status in chosen)
    print(f"{present} of {len(chosen)} present; --details tells how to get the others")


def _print_details(status: catalog.Status) -> None:
    print(f"{status.name}: {status.title}")
    for title, text in (
        ("state", f"{status.state} ({status.layout} layout)"),
        ("looked for in", status.root),
        ("missing", ", ".join(map(str, status.missing)) or "nothing"),
        ("task", status.task),
        ("split", status.provenance),
        ("licence", status.licence),
        ("homepage", status.homepage),
        ("how to get it", status.how),
    ):
        print(f"  {title:<14} {text}")
