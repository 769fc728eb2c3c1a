"""One command for a machine that is at hand: check the ops, measure them, draw the results.

examples (in a checkout, `python -m benchmarks.run` is the same):
  meru-fast bench                            everything that this machine can measure
  meru-fast bench --only contrastive         files whose name contains a word
  meru-fast bench --only meru_loss -- -k 65536
  meru-fast bench --output-dir measured      then, where the checkout is: report --add measured/results.csv

Whole training steps, loaders and evaluations are commands of their own: python -m benchmarks.bench_train_step --help
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report, results

FOLDER = Path(__file__).parent


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="meru-fast bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="benchmark files to run (repeatable)"
    )
    parser.add_argument("--output-dir", type=Path, help="leave CSV, page and plots there, not in the checkout")
    parser.add_argument("--no-check", action="store_true", help="measure without testing the ops on this machine first")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    return parser.parse_args(argv)


def files(words: Sequence[str]) -> list[str]:
    """The files of the suite whose name contains one of the words; all without words."""
    found = [path for path in sorted(FOLDER.glob("bench_*.py")) if "as_test()" in path.read_text()]
    chosen = [str(path) for path in found if not words or any(word in path.stem for word in words)]
    if not chosen:
        names = ", ".join(path.stem.removeprefix("bench_") for path in found)
        raise SystemExit(f"error: no benchmark matches {' or '.join(words)}; there are {names}")
    return chosen


def places(folder: Path | None) -> tuple[Path, Path, Path]:
    """(CSV, page, plots): those of the checkout, or the same in a folder of their own."""
    if folder is None:
        return results.DEFAULT, report.PAGE, report.PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    page = folder.resolve() / report.PAGE.name
    page.write_text(report.PAGE.read_text())
    return page.with_name(results.DEFAULT.name), page, page.parent / report.PLOTS.relative_to(report.PAGE.parent)


def step(title: str, *arguments: str) -> int:
    """Run pytest as a child process; its exit status."""
    print(f"==> {title}", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    status = subprocess.run(command, cwd=FOLDER.parent).returncode
    print(f"==> {title}: {'passed' if status == 0 else f'exit status {status}'}, {time.perf_counter() - start:.0f} s")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; 0 when the ops are right and every benchmark ran. Wrong ops are not measured."""
    arguments = parse(argv)
    chosen = files(arguments.only)
    if not arguments.no_check:
        selection = ["-m", "gpu"] if torch.cuda.is_available() else []
        if step("Checking the ops on this machine", "tests/ops", *selection):
            print(
                "error: the ops are wrong on this machine, so nothing was measured (--no-check measures all the same)"
            )
            return 1
    csv, page, plots = places(arguments.output_dir)
    status = step("Measuring", *chosen, "--csv", str(csv), *arguments.pytest)
    print("==> Tables and plots")
    report.main(["--csv", str(csv), "--page", str(page), "--plots", str(plots)])
    return status


if __name__ == "__main__":
    sys.exit(main())
