"""One progress line, with rate and remaining time, for everything in this package that takes long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from meru_fast.distributed import is_main_process


class RateColumn(ProgressColumn):
    """Units a second."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self.unit}/s")


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show progress on the main process while the block runs; yields a function that advances it by a count."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    visible = console.is_terminal and is_main_process()
    with Progress(*columns, console=console, transient=True, disable=not visible) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.update(task, advance=count)
