"""``meru-fast plot``: the metrics of one or several runs, over their steps."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from meru_fast.evaluation.figures import read_log

METRICS = ("loss", "contrastive_loss", "entailment_loss", "curv", "img_per_s", "lr")
SUFFIXES = (".svg", ".png", ".pdf")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a panel for each metric and a line for each run. Raises ValueError for a run without metrics."""
    parser = argparse.ArgumentParser(
        prog="meru-fast plot",
        description="Draw columns of metrics.csv of one or several runs: a panel for each column, a line for each run.",
        epilog="examples:\n"
        "  meru-fast plot runs/s                                    the usual ones, to metrics.svg\n"
        "  meru-fast plot runs/s runs/b --metrics loss curv --output compare.png\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders (with metrics.csv)")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=f"columns (default: {' '.join(METRICS)})")
    parser.add_argument("--output", type=Path, default=Path("metrics.svg"), help="%(default)s; .png and .pdf work too")
    args = parser.parse_args(argv)
    if args.output.suffix not in SUFFIXES:
        parser.error(f"--output {args.output}: a figure ends in {', '.join(SUFFIXES)}")
    logs = {str(run): read_log(run) for run in args.runs}
    for run, log in logs.items():
        if not log:
            raise ValueError(f"{run}: has no metrics.csv with a logged step; give a run folder of `meru-fast train`")
    known = [name for name in dict.fromkeys(name for log in logs.values() for name in log) if name != "step"]
    metrics = args.metrics or [name for name in METRICS if name in known]
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise ValueError(f"no run has a metric {unknown[0]!r}; there are {', '.join(known)}")
    _draw(logs, metrics, args.output)
    print(args.output)
    return 0


def _draw(logs: dict[str, dict[str, list[float]]], metrics: Sequence[str], output: Path) -> None:
    from matplotlib.figure import Figure

    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, metric in zip(panels, metrics, strict=False):
        for run, log in logs.items():
            if metric in log:
                panel.plot(log["step"], log[metric], linewidth=1.5, label=run)
        panel.set_title(metric, loc="left", fontsize=10)
        panel.grid(color="#e6eaee")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(figure.axes)[len(metrics) :]:
        panel.set_axis_off()
    if len(logs) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
