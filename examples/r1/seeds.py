"""Several runs, one after the other or side by side, and what must hold for them."""

from __future__ import annotations

import argparse
import io
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from examples.r1.settings import Settings

Result = TypeVar("Result")
Run = Callable[[Settings, Console], Result]


class Verdicts:
    """What was checked, and whether it held."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str, bool]] = []

    @property
    def failed(self) -> bool:
        return not all(holds for *_, holds in self._rows)

    def add(self, run_name: str, condition: str, found: str, holds: bool) -> None:
        self._rows.append((run_name, condition, found, holds))

    def extend(self, other: Verdicts) -> None:
        self._rows += other._rows

    def print(self, console: Console, title: str) -> None:
        table = Table("run", "what must hold", "found", "", title=title)
        for *words, holds in self._rows:
            table.add_row(*words, "ok" if holds else "FAILED", style="" if holds else "bold red")
        console.print(table)


def _aside(function: Run[Result], settings: Settings) -> tuple[Result, str]:
    """What the function returns, and what it prints."""
    text = io.StringIO()
    return function(settings, Console(file=text, width=120)), text.getvalue()


def run_all(runs: Sequence[tuple[Run[Result], Settings]], jobs: int, console: Console) -> list[Result]:
    """In order; or `jobs` at a time, each in a process, whose output is shown when it has ended."""
    if jobs == 1:
        return [function(settings, console) for function, settings in runs]
    results = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_aside, function, settings) for function, settings in runs]
        for future in futures:
            result, text = future.result()
            console.out(text, highlight=False, end="")
            results.append(result)
    return results


def add_options(parser: argparse.ArgumentParser) -> None:
    """What runs with several seeds have in common."""
    default = Settings()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--device", default=default.device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
