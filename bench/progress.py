"""What is being measured: a bar on a terminal, a line for each case anywhere else. Both write to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_REFRESH = 0.25  # seconds between two drawings


class Progress:
    """Says nothing; the base of those that do."""

    def begin(self, total: int) -> None:
        """So many cases follow."""

    def case(self, label: str) -> None:
        """The next case begins."""

    def step(self, text: str) -> None:
        """What the case is at; called between measurements, thus cheap."""

    def note(self, text: str) -> None:
        """Something that the reader should see."""


class Lines(Progress):
    """One line a case."""

    def __init__(self) -> None:
        self._total = self._count = 0

    def begin(self, total: int) -> None:
        self._total = total

    def case(self, label: str) -> None:
        self._count += 1
        self.note(f"[{self._count}/{self._total}] {label}")

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bar(Progress):
    """A bar with the case, the provider and the time so far. It is drawn between measurements only: a thread that
    redraws would take one of the cores that are measured.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._rich.add_task("limits of this machine", total=None)
        self._label = ""
        self._begun = 0
        self._drawn = 0.0

    def begin(self, total: int) -> None:
        self._rich.start()
        self._rich.update(self._task, total=total)
        self._draw()

    def case(self, label: str) -> None:
        self._rich.update(self._task, completed=self._begun, description=label)
        self._begun += 1
        self._label = label
        self._draw()

    def step(self, text: str) -> None:
        if time.monotonic() - self._drawn > _REFRESH:
            self._rich.update(self._task, description=f"{self._label}: {text}")
            self._draw()

    def note(self, text: str) -> None:
        self._rich.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._rich.stop()

    def _draw(self) -> None:
        self._rich.refresh()
        self._drawn = time.monotonic()


@contextmanager
def shown() -> Iterator[Progress]:
    """The bar where standard error is a terminal and rich is installed, else lines."""
    bar = None
    if sys.stderr.isatty():
        try:
            bar = Bar()
        except ImportError:
            bar = None
    try:
        yield bar or Lines()
    finally:
        if bar:
            bar.close()
