"""Runs the groups, each in a process of its own, and collects what it wrote, whatever became of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_check import processes
from bench.gpu_check.settings import ROOT
from bench.tune import choose
from bench.tune.candidates import AnyChoice, candidates
from bench.tune.problems import GROUPS, Group

Record = dict[str, Any]
LEAST = 5.0
"""Seconds that a process must have to be begun."""


@dataclass
class Trials:
    """Measurements of groups of problems, until their time is over.

    Attributes:
        folder: for requests, lines and the log.
        end: when everything must be over, on the monotonic clock.
        candidate_seconds: of measuring one; `limit`: until it counts as one that hangs.
    """

    device: str
    architecture: int
    folder: Path
    end: float
    candidate_seconds: float = 0.12
    limit: float = 20.0
    worker: tuple[str, ...] = (sys.executable, "-m", "bench.tune.worker")

    def group(self, group: Group) -> Record:
        """The record of one group. `complete`: nothing was left out for lack of time."""
        choices = candidates(group.op, self.architecture, group.size)
        jobs = [(which, index) for which in range(len(group.problems)) for index in range(len(choices))]
        found: dict[tuple[int, int], Record] = {}
        failed: dict[int, str] = {}
        while jobs and self.end - time.monotonic() > LEAST and not processes.stop.is_set():
            why = self._work(group, choices, jobs, found, failed)
            left = [job for job in jobs if job not in found and job[0] not in failed]
            if why and left == jobs:  # it did not come as far as to say what it began
                failed[jobs[0][0]] = why
                left = [job for job in jobs if job[0] not in failed]
            jobs = left
        records = []
        for which, problem in enumerate(group.problems):
            lines = [{"choice": list(choice), **found.get((which, i), {})} for i, choice in enumerate(choices)]
            record: Record = {"problem": problem.on(self.device).text, "candidates": lines}
            records.append(record | ({"error": failed[which]} if which in failed else {}))
        record = {"op": group.op, "size": group.size, "complete": not jobs, "problems": records}
        return record | {"winner": choose.winner(record)}

    def _work(
        self,
        group: Group,
        choices: Sequence[AnyChoice],
        jobs: list[tuple[int, int]],
        found: dict[tuple[int, int], Record],
        failed: dict[int, str],
    ) -> str:
        """One process, and what it wrote until it ended; returns how, and nothing where its time was over."""
        request, output = self.folder / "request.json", self.folder / "lines.jsonl"
        output.unlink(missing_ok=True)
        seconds = {"seconds": self.candidate_seconds, "limit": self.limit}
        fields = {"group": GROUPS.index(group), "choices": choices, "jobs": jobs, "device": self.device, **seconds}
        request.write_text(json.dumps({**fields, "output": str(output)}))
        left = self.end - time.monotonic()
        result = processes.run([*self.worker, str(request)], left, self.folder / "log", None, ROOT)
        begun = _read(output, found, failed)
        if result.stopped:
            return ""  # a candidate that was begun then is measured in no run
        why = f"it hung or crashed (status {result.status})"
        if begun is not None and result.status != 0:
            which, index = begun
            if index is None:
                failed.setdefault(which, why)
            else:
                found.setdefault((which, index), {"error": why})
        return why


def _read(output: Path, found: dict[tuple[int, int], Record], failed: dict[int, str]) -> tuple[int, int | None] | None:
    """Adds what was written; returns what was begun last."""
    begun = None
    for line in output.read_text().splitlines() if output.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # cut off
            continue
        which, index = record.pop("problem"), record.pop("candidate", None)
        if record.get("begun"):
            begun = which, index
        elif index is None:
            failed[which] = record["error"]
        else:
            found[which, index] = record
    return begun
