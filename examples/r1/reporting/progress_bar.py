"""A progress bar on a terminal, a line now and then anywhere else, nothing on a quiet console."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.r1.choices import TASKS
from examples.r1.reporting.figures import finite, number, rate
from examples.r1.results import Record

Report = Callable[[int, Record | str], None]
"""Called with the steps done and the step's record, or a few words. `{**evaluation, **record}` shows the accuracies of
the last evaluation where a step has none of its own."""

_REFRESHES = 4  # a second, by a thread of its own
_BAR = 14  # characters
_FIXED = _BAR + 34  # characters of all columns but the label and the figures
_LINES = 8  # of a stage, where there is no terminal


@contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Report]:
    """Shows the progress of `total` steps. Ranks other than the first have a quiet console."""
    if console.quiet:
        yield lambda done, status: None
    elif not console.is_terminal:
        yield _line_printer(console, label, total)
    else:
        columns = (
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=_BAR),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}", markup=False, style="cyan"),
        )
        with Progress(*columns, console=console, refresh_per_second=_REFRESHES) as bar:
            task = bar.add_task(label, total=total, status="")
            room = max(console.width - len(label) - _FIXED, 0)
            yield lambda done, status: bar.update(task, completed=done, status=words(status, room))


def words(status: Record | str, room: int = 1000) -> str:
    """The figures of a step, the important ones first, as many as there is room for."""
    found = [status] if isinstance(status, str) else _figures(status)
    text = ""
    for part in found:
        longer = f"{text}  {part}" if text else part
        if len(longer) > room:
            break
        text = longer
    return text


def _figures(record: Mapping[str, float]) -> list[str]:
    found = [f"{name} {number(record[name])}" for name in ("reward", "loss") if name in record][:1]
    for task, word in ((name, info.word) for name, info in TASKS.items()):
        if f"{task}/accuracy" in record:
            found.append(f"{word} {number(record[f'{task}/accuracy'], 2)}")
    found += [f"{word} {number(record[name])}" for name, word in (("judge", "judge"), ("kl", "KL")) if name in record]
    times = [name for name in ("sample_seconds", "train_seconds") if name in record] or ["seconds"]
    tokens = finite(rate([dict(record)], *times))
    return found if tokens is None else [*found, f"{tokens / 1e3:.1f}k tok/s"]


def _line_printer(console: Console, label: str, total: int) -> Report:
    interval = max(1, total // _LINES)

    def report(done: int, status: Record | str) -> None:
        if done == total or (done > 0 and done % interval == 0):
            console.print(f"{label} {done}/{total}  {words(status)}", highlight=False, markup=False, soft_wrap=True)

    return report
