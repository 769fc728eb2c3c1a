"""One look for all progress bars of the package's data tools: count, rate, time left, and a note."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int, unit: str, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """A bar on stderr. Yields `advance(n=1, note="")`, to be called as work gets done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task) -> str:
            return f"{task.completed / max(task.finished_time or task.elapsed or 0, 1e-3):,.0f} {unit}/s"

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), Rate(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), disable=not enabled
    ) as bar:
        task = bar.add_task(what, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n, note=note)

        yield advance
