"""Runs the phases within the budget, and keeps what they found."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

from bench.gpu_check import processes
from bench.gpu_check.phases import NOT_RUN, SKIPPED, Phase, note_of
from bench.gpu_check.results import FAIL, LATE, PASS, SKIP, Check, Results
from bench.gpu_check.settings import ROOT, Settings

_LEAST = 8.0  # seconds under which a phase is not begun
_MARGIN = 8.0  # seconds of the budget for writing and printing
_REFRESH = 15.0  # seconds between writes of the log while a phase runs
_SHOWN, _WIDTH = 20, 200  # of the output of a phase that did not pass: lines, and their length
_WORDS: dict[int | None, str] = {0: PASS, SKIPPED: SKIP, NOT_RUN: LATE}


class Runner:
    """One run."""

    def __init__(self, settings: Settings, results: Results, chosen: Sequence[Phase], begin: float) -> None:
        self.settings = settings
        self.results = results
        self.chosen = list(chosen)
        self.begin = begin
        self.refreshed = begin
        self.begun: set[str] = set()

    def left(self) -> float:
        return self.settings.budget - _MARGIN - (time.monotonic() - self.begin)

    def limit(self, phase: Phase, left: float | None = None) -> float:
        """Seconds for a phase, of those that are left: its own limit, less what has to be kept for those after it."""
        later: dict[str, float] = {}
        seen = False
        for other in self.chosen:
            if seen and not (other.group and other.group == phase.group) and not self.settled(other):
                later[other.group or other.name] = other.reserve  # a group runs at once
            seen = seen or other is phase
        reserved = sum(later.values()) * self.settings.stretch
        return min(phase.limit * self.settings.stretch, (self.left() if left is None else left) - reserved)

    def plan(self) -> list[tuple[Phase, float, float]]:
        """Of each phase: its seconds at most, and what it gets at least, when all before it take as long as they may; 0
        where it is then left for the end."""
        found: list[tuple[Phase, float, float]] = []
        left = self.left()
        for phases in self._neighbours([phase for phase in self.chosen if not self.settled(phase)]):
            limits = [self.limit(phase, left) for phase in phases]
            assured = [
                limit if limit >= max(_LEAST, p.worthwhile) else 0.0 for p, limit in zip(phases, limits, strict=True)
            ]
            found += [(p, p.limit * self.settings.stretch, least) for p, least in zip(phases, assured, strict=True)]
            left -= max(assured)
        return found

    def _neighbours(self, phases: Sequence[Phase]) -> list[list[Phase]]:
        """Those of one group, which run at the same time, together."""
        return [list(group) for _, group in itertools.groupby(phases, lambda phase: phase.group or phase.name)]

    def settled(self, phase: Phase) -> bool:
        return not phase.always and self.results.has_passed(phase.name)

    def run(self) -> None:
        """All chosen phases; then, in the time that they left, those that had none or have tests still to run."""
        self._pass()
        self.chosen = [phase for phase in self.chosen if self._could_go_on(phase)]
        self._pass()

    def _could_go_on(self, phase: Phase) -> bool:
        check = self.results.checks.get(phase.name)
        if check is None or check.kept or self.left() < max(_LEAST, phase.reserve, phase.worthwhile):
            return False
        if phase.worthwhile and check.verdict == SKIP:
            return check.seconds == 0
        unfinished = phase.outcomes and check.verdict in (FAIL, LATE) and "not run" in check.note
        return unfinished or (check.verdict == LATE and check.seconds == 0)

    def _pass(self) -> None:
        """The chosen phases in order; neighbours of one group at the same time."""
        for neighbours in self._neighbours(self.chosen):
            if processes.stop.is_set():
                break
            threads = [threading.Thread(target=self.phase, args=(p,), daemon=True) for p in neighbours]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.05)  # here signals are handled
                self.refresh()

    def refresh(self) -> None:
        if time.monotonic() - self.refreshed > _REFRESH:
            self.refreshed = time.monotonic()
            self.results.refresh_log()

    def phase(self, phase: Phase) -> None:
        """Runs one and keeps its verdict."""
        if self.settled(phase):
            return
        if self.results.blocked:
            self.results.add(phase, Check(phase.name, SKIP, 0.0, self.results.blocked))
            return
        limit = self.limit(phase)
        if phase.worthwhile and limit < phase.worthwhile:
            note = f"{max(limit, 0.0):.0f} s were left for it, and it needs {phase.worthwhile:.0f} s"
            self.results.add(phase, Check(phase.name, SKIP, 0.0, note))
            return
        if limit < _LEAST:
            self.results.add(phase, Check(phase.name, LATE, 0.0, f"no time left of {self.settings.budget:.0f} s"))
            return
        print(f"  {phase.name} (at most {limit:.0f} s)\n", end="", flush=True)  # one write: phases may run at once
        log = self.results.log_of(phase.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        if phase.name not in self.begun:  # of an earlier run
            log.unlink(missing_ok=True)
        self.begun.add(phase.name)
        try:
            command = phase.command(self.settings, limit)
            result = processes.run(command, limit, log, self.settings.environment(), ROOT)
        except (OSError, ValueError, KeyError) as error:  # a file that an earlier phase should have left
            self.results.add(phase, Check(phase.name, FAIL, 0.0, f"{type(error).__name__}: {error}"))
            return
        output = log.read_text(errors="replace")
        note = note_of(phase, output)
        verdict = LATE if result.stopped else _WORDS.get(result.status, FAIL)
        if phase.worthwhile and not result.stopped and verdict == LATE:
            verdict = SKIP  # with what it has: it had no time for everything, and proves nothing
        if result.stopped:
            note = f"{result.stopped}; its last words: {note}"
        elif verdict == FAIL:
            note = f"status {result.status}: {note}"
        shown = output.splitlines()[-_SHOWN:] if verdict in (FAIL, LATE) else []
        why = "; the end of its output:" if shown else ""
        lines = [f"  {phase.name}: {verdict.upper()}, {result.seconds:.0f} s{why}"]
        lines += [f"      {line[:_WIDTH]}" for line in shown]
        print("\n".join(lines) + "\n", end="", flush=True)
        self.results.add(phase, Check(phase.name, verdict, result.seconds, note[:400]))
