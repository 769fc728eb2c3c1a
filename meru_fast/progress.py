"""One look for all progress bars: count, rate, time left, and a note."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int, unit: str, enabled: bool | None = None) -> Iterator[Callable[..., None]]:
    """Show progress on stderr while the block runs; in a log, which is no terminal, only its last line.

    Args:
        what: is being done.
        total: units to do.
        unit: their name, in the plural.
        enabled: whether to show it; the default is on the main process only.

    Yields:
        ``advance(n=1, note="")``, to be called as work gets done.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.completed / max(task.finished_time or task.elapsed or 0, 1e-3):,.0f} {unit}/s")

    if enabled is None:
        from meru_fast.distributed import is_main_process

        enabled = is_main_process()
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=console.is_terminal, disable=not enabled) as bar:
        task = bar.add_task(what, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n, note=note)

        yield advance
