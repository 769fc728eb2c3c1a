"""The append-only record of measurements: one CSV row per (op, case, variant, mode)."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

DEFAULT = Path(__file__).parent / "results.csv"

COLUMNS = [
    # what was measured
    *("date", "op", "variant", "version", "mode", "rows", "columns", "dim", "dtype", "data", "scale"),
    # what came out; empty where the op has no such figure, never zero in its place
    *("status", "p20_ms", "p50_ms", "p80_ms", "samples", "tflop_per_s", "gb_per_s"),
    *("percent_of_bf16", "percent_of_tf32", "percent_of_bandwidth", "percent_of_measured"),
    *("extra_bytes", "launches", "value_error", "gradient_error"),
    # where
    *("device", "driver", "torch", "triton", "python", "commit", "threads", "clocks"),
]
"""Rates use the op's stated work, not what a variant happens to execute. `status` is "ok", "out of memory" or
"failed: ...". `extra_bytes` is the peak over inputs and their gradients. Errors are relative RMS against fp64."""


def append(path: Path, rows: Iterable[dict]) -> None:
    """Add rows to the CSV in one write, with a header in a new file.

    Raises:
        ValueError: the file's header is not the one this version writes.
    """
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes; name another file with --csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, str]]:
    """All rows of the CSV, oldest first; an absent file has none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The newest row of each (device, op, case, variant, mode): what tables and plots show."""
    key = ("device", "op", "variant", "mode", "rows", "columns", "dim", "dtype", "data")
    return list({tuple(row[name] for name in key): row for row in rows}.values())
