"""A progress bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, str], None]
"""Called with the steps done and a few words on how it goes."""


@contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Report]:
    if not console.is_terminal:
        yield _line_printer(console, label, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, status="")
        yield lambda done, status: bar.update(task, completed=done, status=status)


def _line_printer(console: Console, label: str, total: int) -> Report:
    interval = max(1, total // 8)

    def report(done: int, status: str) -> None:
        if done == total or (done > 0 and done % interval == 0):
            console.print(f"{label} {done}/{total}  {status}", highlight=False, soft_wrap=True)

    return report
