"""Several runs, one after the other or side by side, and what must hold for them."""

from __future__ import annotations

import argparse
import io
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.table import Table

from examples.r1.settings import Settings

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job(Generic[Result]):
    """One run. `after` names another one whose folder it reads."""

    name: str
    function: Callable[[Settings, Console], Result]
    settings: Settings
    after: str | None = None


class Verdicts:
    """What was checked, and whether it held."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str, bool]] = []

    @property
    def failed(self) -> bool:
        return not all(holds for *_, holds in self._rows)

    def add(self, run_name: str, condition: str, found: str, holds: bool) -> None:
        self._rows.append((run_name, condition, found, holds))

    def as_json(self) -> list[dict[str, Any]]:
        return [dict(zip(("run", "condition", "found", "holds"), row, strict=True)) for row in self._rows]

    def print(self, console: Console, title: str) -> None:
        table = Table("run", "what must hold", "found", "", title=title)
        for *words, holds in self._rows:
            table.add_row(*words, "ok" if holds else "FAILED", style="" if holds else "bold red")
        console.print(table)


def _aside(job: Job[Result]) -> tuple[Result, str]:
    """What the function returns, and what it prints."""
    text = io.StringIO()
    return job.function(job.settings, Console(file=text, width=120)), text.getvalue()


def run_all(
    jobs: Sequence[Job[Result]], at_once: int, console: Console, keep: Callable[[str, Result], None] | None = None
) -> dict[str, Result]:
    """What each job returns, by its name; `keep` is called with both as soon as it has ended.

    One after the other in this order; or `at_once` side by side, each in a process, whose output is shown when it has
    ended. None starts before the one that it comes after has ended. Raises ValueError if that one does not stand
    before it.
    """
    results: dict[str, Result] = {}

    def ended(name: str, result: Result) -> None:
        results[name] = result
        if keep is not None:
            keep(name, result)

    for index, job in enumerate(jobs):
        if job.after is not None and job.after not in [other.name for other in jobs[:index]]:
            raise ValueError(f"{job.name} reads the folder of {job.after}, which must be run before it")
    if at_once == 1:
        for job in jobs:
            ended(job.name, job.function(job.settings, console))
        return results
    waiting = list(jobs)
    running: dict[Future[tuple[Result, str]], str] = {}
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            while waiting or running:
                for job in [job for job in waiting if job.after is None or job.after in results]:
                    waiting.remove(job)
                    running[pool.submit(_aside, job)] = job.name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result, text = future.result()
                    console.out(text, highlight=False, end="")
                    ended(running.pop(future), result)
        finally:
            pool.shutdown(cancel_futures=True)
    return {job.name: results[job.name] for job in jobs}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What runs with several seeds have in common."""
    default = Settings()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--device", default=default.device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
