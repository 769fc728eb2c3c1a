"""What people see of a run: log files, the progress line, CSV, TensorBoard, Weights & Biases."""

import csv
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

#: Columns of metrics.csv that every run has; what the model logs beyond them follows.
COLUMNS = ("step", "loss", "contrastive_loss", "entailment_loss", "curv", "logit_scale", "lr", "grad_norm")
#: Columns about the machine, not the model; they come last.
SPEED = ("img_per_s", "data_wait", "step_seconds", "memory_gb", "epoch", "bad_samples")


def setup_logging(output_dir: Path, rank: int) -> logging.Handler:
    """Everything goes to logs/rank<rank>.log; rank 0 tells the terminal as well. Returns the file's handler."""
    from rich.console import Console
    from rich.logging import RichHandler

    folder = output_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = _LogFile(folder / f"rank{rank}.log", encoding="utf-8")
    file.setLevel(logging.DEBUG)
    file.setFormatter(logging.Formatter(f"%(asctime)s rank{rank} %(levelname)s %(message)s"))
    ours = logging.getLogger("meru_fast")
    ours.setLevel(logging.DEBUG)
    ours.propagate = False
    ours.handlers = [file]
    if rank == 0 and sys.stderr.isatty():
        ours.addHandler(RichHandler(logging.INFO, console=Console(stderr=True), show_path=False))
    elif rank == 0:
        plain = logging.StreamHandler(sys.stderr)
        plain.setLevel(logging.INFO)
        plain.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
        ours.addHandler(plain)
    return file


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """A full disk costs lines of the file, not a traceback on the terminal for each of them."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def close_logging() -> None:
    for handler in list(logging.getLogger("meru_fast").handlers):
        with suppress(OSError):  # what a full disk left unwritten
            handler.close()
    logging.getLogger("meru_fast").handlers = []
    logging.getLogger("meru_fast").propagate = True


class CsvLog:
    """A CSV file with one row per logged step. Rows after `resumed_at` are of the run that crashed: they go."""

    def __init__(self, path: Path, resumed_at: int = 0):
        self.path = path
        self.columns: list[str] = []
        self.cut(resumed_at)

    def cut(self, step: int) -> None:
        """Forget the rows after `step`."""
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) <= step]
                columns = list(reader.fieldnames or [])
            self._rewrite(rows, columns)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append `row`; a column that is new rewrites the file once."""
        new = [key for key in row if key not in self.columns]
        if new:
            rows = []
            if self.path.is_file():
                with self.path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            self._rewrite(rows, self.columns + new)
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        except OSError:
            os.truncate(self.path, size)  # not half a row, which the next one would continue
            raise

    def _rewrite(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        partial = self.path.with_name(f".{self.path.name}")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            if columns:
                writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)
        self.columns = columns


class Metrics:
    """Writers of the main process.

    Args:
        output_dir: run folder.
        resumed_at: finished steps of the checkpoint the run goes on from, 0 at the start.
        wandb_project: project on Weights & Biases, or None.
        config: of the run, for Weights & Biases.
    """

    def __init__(self, output_dir: Path, resumed_at: int, wandb_project: str | None = None, config: Any = None):
        self.output_dir = output_dir
        self.warned = False
        self.steps = CsvLog(output_dir / "metrics.csv", resumed_at)
        self.evaluations = CsvLog(output_dir / "evaluation.csv", resumed_at)
        self.tensorboard = self._tensorboard(resumed_at)
        self.wandb = _start_wandb(wandb_project, output_dir, config) if wandb_project else None

    def rewind(self, step: int) -> None:
        """The run went back to `step`: forget what came after."""
        self.steps.cut(step)
        self.evaluations.cut(step)
        self.tensorboard.close()
        self.tensorboard = self._tensorboard(step)

    def _tensorboard(self, resumed_at: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def log_step(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.csv; "step" is the x axis of the other writers."""
        first = [key for key in COLUMNS if key in row]
        last = [key for key in SPEED if key in row]
        middle = [key for key in row if key not in first and key not in last]
        with self._tolerant():
            self.steps.write({key: row[key] for key in (*first, *middle, *last)})
        self._others({f"train/{key}": value for key, value in row.items() if key != "step"}, row["step"])

    def log_evaluation(self, step: int, results: Mapping[str, float]) -> None:
        with self._tolerant():
            self.evaluations.write({"step": step, **results})
        self._others({f"eval/{name}": value for name, value in results.items()}, step)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A full disk costs what could not be written, and one warning; not the run."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                log.warning("metrics could not be written, training goes on: %s", error)
            self.warned = True

    def _others(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        with self._tolerant():
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        with self._tolerant():
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(project: str, output_dir: Path, config: Any) -> Any:
    import wandb
    from omegaconf import OmegaConf

    identity = output_dir / "wandb_id"  # a resumed run goes on in the same curves
    if not identity.is_file():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    settings: Any = OmegaConf.to_container(config, resolve=True)
    return wandb.init(
        project=project, id=identity.read_text(encoding="utf-8"), dir=str(output_dir), config=settings, resume="allow"
    )


class ProgressLine:
    """One line that says how far, how fast, how good; on a terminal it stays in place, else it is a log line."""

    def __init__(self, total: int, done: int):
        self.total, self.first, self.done = total, done, done
        self.started = time.monotonic()
        self.text = ""
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=total, completed=done, text="")
            self._bar.start()

    def step(self, done: int) -> None:
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def show(self, row: Mapping[str, Any]) -> None:
        """The values of a logged step."""
        self.text = describe(row)
        if self._bar is not None:
            self._bar.update(self._task, text=self.text)
            logging.getLogger("meru_fast").handlers[0].handle(
                logging.makeLogRecord(
                    {"name": __name__, "levelno": logging.INFO, "levelname": "INFO", "msg": self.text}
                )
            )
        else:
            log.info("%d/%d  %s  ETA %s", self.done, self.total, self.text, self.eta())

    def eta(self) -> str:
        finished = self.done - self.first
        if not finished:
            return "?"
        seconds = round((time.monotonic() - self.started) / finished * (self.total - self.done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(row: Mapping[str, Any]) -> str:
    """Short text of a row of metrics.csv."""
    parts = [f"loss {row['loss']:.4f}"]
    if "entailment_loss" in row:
        parts[0] += f" ({row['contrastive_loss']:.4f} + {row['entailment_loss']:.4f})"
    parts += [f"{name} {row[name]:.4g}" for name in ("curv", "logit_scale", "lr") if name in row]
    parts.append(f"{row['img_per_s']:.4g} img/s")
    parts.append(f"data wait {100 * row['data_wait']:.0f}%")
    return "  ".join(parts)
