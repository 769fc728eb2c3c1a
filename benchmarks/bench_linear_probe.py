"""The linear probe's whole sweep (16 fits): our batched L-BFGS against scikit-learn, on the same features.

    python -m benchmarks.bench_linear_probe                                      10,000 x 384, 100 classes: a CPU's size
    python -m benchmarks.bench_linear_probe --samples 75750 --dim 1024 --classes 101 --solvers batched         an H200's

Features are synthetic: Gaussian classes whose spectrum falls over 1.5 decades, as that of trained encoders does, which
makes plain L-BFGS slow. Both sides sweep, refit and score as ``meru_fast.evaluation.linear_probe`` says, scikit-learn
on the CPU. Wall and CPU seconds and the load of the machine are recorded.
"""

import argparse
import csv
import datetime
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from meru_fast.evaluation.features import Labelled
from meru_fast.evaluation.linear_probe import FITS, SOLVERS, probe
from meru_fast.progress import progress_bar

RESULTS = Path(__file__).with_name("linear_probe.csv")
TEST = 4000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_linear_probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=10_000, help="training and validation samples (%(default)s)")
    parser.add_argument("--dim", type=int, default=384, help="feature size (%(default)s)")
    parser.add_argument("--classes", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--noise", type=float, default=3.0, help="overlap of the classes (%(default)s)")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS), help="(%(default)s)")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="append rows to this file (%(default)s)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val, test = parts(args.samples, args.dim, args.classes, args.noise, device)
    for solver in args.solvers:
        with progress_bar(solver, FITS, "fits") as advance:
            began, cpu_began = time.perf_counter(), time.process_time()
            scores, cost = probe(train, val, test, args.classes, solver=solver, advance=advance)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        row = row_of(args, device, solver, seconds, cpu_seconds)
        append(args.csv, row | {"cost": cost} | {name: round(value, 5) for name, value in scores.items()})
        print(f"{solver}: {seconds:.1f} s for {FITS} fits, cost {cost:g}, top-1 {100 * scores['lp_acc1']:.2f} %")
    return 0


def parts(samples: int, dim: int, classes: int, noise: float, device: torch.device) -> list[Labelled]:
    """Training (80 %), validation (20 %) and test part."""
    generator = torch.Generator().manual_seed(0)
    total = samples + TEST
    means = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (total,), generator=generator)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5 * torch.logspace(0, -1.5, dim)
    features = (means[labels] + noise * torch.randn(total, dim, generator=generator)) @ mix + 0.5
    sizes = [round(0.8 * samples), samples - round(0.8 * samples), TEST]
    pairs = zip(features.to(device).split(sizes), labels.to(device).split(sizes), strict=True)
    return [Labelled(*pair) for pair in pairs]


def row_of(args: argparse.Namespace, device: torch.device, solver: str, seconds: float, cpu_seconds: float) -> dict:
    """What was measured, and where."""
    on_gpu = device.type == "cuda" and solver != "sklearn"
    return {
        "date": datetime.date.today().isoformat(),
        "solver": solver,
        "samples": args.samples,
        "dim": args.dim,
        "classes": args.classes,
        "noise": args.noise,
        "fits": FITS,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "commit": commit(),
    }


def append(path: Path, row: dict) -> None:
    """Add a row to the CSV."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def commit() -> str:
    """The checkout's commit, empty outside one."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return found.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
