"""Results for people (a table) and for machines (JSON in the schema of CLIP_benchmark, CSV)."""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from meru_fast.files import whole

COLUMNS = ("dataset", "model", "pretrained", "task", "language")
COST = "lp_cost"  # chosen by a linear probe, no score
COUNTS = ("tie", "lca")  # edges and concepts, no shares
SHORT = {
    "hierarchical_precision": "HP",
    "hierarchical_recall": "HR",
    "mean_per_class_recall": "macro",
    "image_retrieval_recall": "T>I",
    "text_retrieval_recall": "I>T",
}


@dataclass
class Result:
    """Scores of one checkpoint on one dataset; the first six fields are those of CLIP_benchmark's result files.

    Attributes:
        model: architecture.
        pretrained: checkpoint.
        metrics: fractions in [0, 1], and for probes the chosen cost.
        provenance: whether the split is the published one.
        checkpoint_hash: ``fingerprint`` of the weights.
        settings: what else decides the numbers (resize, image size, ...), as one line.
    """

    dataset: str
    model: str
    pretrained: str
    task: str
    metrics: dict[str, float]
    language: str = "en"
    provenance: str = ""
    checkpoint_hash: str = ""
    settings: str = ""


def result_path(folder: Path, pretrained: str, dataset: str, task: str) -> Path:
    """Where the result of a checkpoint on a dataset belongs."""
    return folder / slug(pretrained) / f"{slug(dataset)}_{task}.json"


def slug(text: str) -> str:
    """`text` as a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_") or "_"


def write_json(result: Result, path: Path) -> None:
    """Write one result; the file appears whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Result | None:
    """The result in `path`; None if there is none, or none that can be read."""
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_csv(results: Sequence[Result], path: Path) -> None:
    """One row a result, as ``clip_benchmark build`` makes it: the columns, and one column for each metric."""
    metrics = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *metrics, "provenance", "checkpoint_hash", "settings"])
        writer.writeheader()
        for result in results:
            writer.writerow({key: value for key, value in asdict(result).items() if key != "metrics"} | result.metrics)


def print_table(results: Iterable[Result], console: Console) -> None:
    """One table a task: a row for each checkpoint and dataset, scores in percent (T>I@5: recall@5 of images)."""
    results = list(results)
    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        metrics = list(dict.fromkeys(metric for result in of_task for metric in result.metrics if metric != COST))
        table = Table(title=f"{task} (%)")
        for column in ("checkpoint", "dataset"):
            table.add_column(column)
        for metric in metrics:
            table.add_column(_short(metric), justify="right")
        table.add_column("split")
        for result in of_task:
            scores = [_score(metric, result.metrics) for metric in metrics]
            table.add_row(result.pretrained, result.dataset, *scores, result.provenance.partition(",")[0])
        console.print(table)


def _score(metric: str, metrics: Mapping[str, float]) -> str:
    if metric not in metrics:
        return "-"
    return f"{metrics[metric]:.3f}" if metric in COUNTS else f"{100 * metrics[metric]:.1f}"


def _short(metric: str) -> str:
    for name, short in SHORT.items():
        metric = metric.replace(name, short)
    return metric
