"""Runs tests in worker processes, so that one that hangs or breaks the CUDA context costs itself and no other.

    python -m bench.gpu_check.suite [--workers N] [--test-seconds S] [--deadline S] [--results FILE] -- PYTEST ARGUMENTS

A worker collects the tests, runs one at a time and reports it at once. When it dies, when a test takes too long, or
when the device is in error after a test, that test has failed and a new worker goes on with the others. Exit status:
0 all passed, 1 some failed, 75 some were not run, 77 all were skipped.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from bench.gpu_check.phases import NOT_RUN, SKIPPED
from bench.gpu_check.settings import ROOT, cores

_START_SECONDS = 120.0  # for imports and collection
_PLUGIN = "bench.gpu_check.worker"


class Process:
    """One worker."""

    def __init__(self, pytest_arguments: list[str], test_seconds: float, workers: int) -> None:
        self.pipe, theirs = Pipe()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self.test_seconds = test_seconds
        environment = {"OMP_NUM_THREADS": str(max(1, cores() // workers)), **os.environ}
        environment |= {"GK_WORKER_FD": str(theirs.fileno()), "GK_TEST_SECONDS": str(test_seconds)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", _PLUGIN, *pytest_arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
        theirs.close()

    def message(self, seconds: float) -> tuple[Any, ...] | None:
        """The worker's next message; None when it is dead or `seconds` are over."""
        end = time.monotonic() + seconds
        with contextlib.suppress(EOFError, OSError):
            while time.monotonic() < end:
                alive = self.process.poll() is None
                if self.pipe.poll(0.2 if alive else 0):
                    received: tuple[Any, ...] = self.pipe.recv()
                    return received
                if not alive:  # a child of its own may still hold the pipe
                    return None
        return None

    def send(self, nodeid: str | None) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(nodeid)

    def end(self, seconds: float = 0.0) -> int | None:
        """Its exit status, after `seconds` to end by itself; None for one that even SIGKILL does not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(5)
        return None

    def output(self, characters: int = 4000) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-characters:].strip()


class Suite:
    """The queue of tests, and their outcomes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.begin = time.monotonic()
        self.lock = threading.Lock()
        self.collected: list[str] = []
        self.queue: collections.deque[str] | None = None  # None until a worker has collected
        self.outcomes: dict[str, tuple[str, float, str]] = {}
        before = _outcomes_before(arguments.results)
        self.known = {nodeid: entry for nodeid, entry in before.items() if entry[0] != "failed"}
        self.failed_before = before.keys() - self.known.keys()
        self.running: set[Process] = set()
        self.stopped = False

    def left(self) -> float:
        return float(self.arguments.deadline) - (time.monotonic() - self.begin)

    def record(self, nodeid: str, outcome: str, seconds: float, message: str) -> None:
        with self.lock:
            self.outcomes[nodeid] = outcome, seconds, message
            if self.arguments.results:
                line = {"id": nodeid, "outcome": outcome, "seconds": round(seconds, 3), "message": _short(message)}
                with self.arguments.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        if outcome == "failed":
            print(f"\nFAILED {nodeid} ({seconds:.1f} s)\n{_indented(message)}", flush=True)

    def postpone(self, nodeid: str) -> None:
        """Moves the other cases of a test that killed its worker to the end: they may do the same, which costs time."""
        function = nodeid.partition("[")[0]
        with self.lock:
            self.queue = collections.deque(sorted(self.queue or (), key=lambda i: i.partition("[")[0] == function))

    def take(self) -> str | None:
        with self.lock:
            if self.stopped or not self.queue or self.left() <= 0:
                return None
            return self.queue.popleft()

    def serve(self) -> None:
        """What a thread does: workers, one after the other, until the queue is empty."""
        unused = 0  # workers in a row that ran no test
        while unused < 2 and not self.stopped and self.left() > 0 and (self.queue is None or self.queue):
            worker = Process(self.arguments.pytest, self.arguments.test_seconds, self.arguments.workers)
            self.running.add(worker)
            try:
                unused = 0 if self._work(worker) else unused + 1
            finally:
                worker.end()
                self.running.discard(worker)

    def _work(self, worker: Process) -> int:
        """How many tests this worker ran, or 1 if there were none left for it."""
        count = 0
        going_on = self._collect(worker)
        while going_on:
            count += 1
            nodeid = self.take()
            worker.send(nodeid)
            if nodeid is None:
                worker.end(10)
                break
            going_on = self._test(worker, nodeid)
        return count

    def _collect(self, worker: Process) -> bool:
        end = time.monotonic() + min(_START_SECONDS, max(self.left(), 1.0))
        while (message := worker.message(end - time.monotonic())) is not None:
            if message[0] == "broken" and message[1] not in self.outcomes:
                self.record(message[1], "failed", 0.0, message[2])
            if message[0] == "collected":
                with self.lock:
                    if self.queue is None:
                        self.collected = message[1]
                        self.outcomes |= {i: self.known[i] for i in self.collected if i in self.known}
                        rest = [i for i in self.collected if i not in self.known]
                        self.queue = collections.deque(sorted(rest, key=lambda i: i in self.failed_before))
                return True
        status = worker.end(2)
        if self.left() > 0 and not self.stopped:
            print(f"a worker died before its first test ({_death(status)}):\n{_indented(worker.output())}", flush=True)
        return False

    def _test(self, worker: Process, nodeid: str) -> bool:
        """Runs one test; whether the worker can go on."""
        begin = time.monotonic()
        patience = self.arguments.test_seconds + 10  # the worker's own clock should strike first
        message = worker.message(max(min(patience, self.left() + 3), 1.0))
        seconds = time.monotonic() - begin
        if message is not None:
            self.record(nodeid, message[1], seconds, message[2])
            if not message[3]:
                self.postpone(nodeid)
            return bool(message[3])
        late = self.left() <= 0 and seconds < self.arguments.test_seconds and worker.process.poll() is None
        if late or self.stopped:
            return False
        status = worker.end(2 if seconds < patience else 0)  # its end of the pipe closes before it is gone
        reason = _death(status)
        if seconds >= self.arguments.test_seconds:
            reason = f"it ran longer than {self.arguments.test_seconds:g} s"
        self.record(nodeid, "failed", seconds, f"{_without_frames_of_pytest(worker.output())}\n{reason}")
        self.postpone(nodeid)
        return False

    def run(self) -> int:
        """Everything; the exit status."""
        threads = [threading.Thread(target=self.serve, daemon=True) for _ in range(self.arguments.workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            self.stopped = True
            for worker in list(self.running):
                worker.end()
        return self.report()

    def report(self) -> int:
        """Prints skips, the slowest tests and the totals; the exit status."""
        counts = collections.Counter(outcome for outcome, _, _ in self.outcomes.values())
        reasons = collections.Counter(message for outcome, _, message in self.outcomes.values() if outcome == "skipped")
        for reason, count in reasons.items():
            print(f"skipped {count}: {reason}")
        slowest = sorted(self.outcomes.items(), key=lambda item: -item[1][1])[:5]
        print("slowest: " + ", ".join(f"{nodeid.split('::')[-1]} {entry[1]:.1f} s" for nodeid, entry in slowest))
        missing = [nodeid for nodeid in self.collected if nodeid not in self.outcomes]
        if missing:
            print(f"not run: {' '.join(missing)}")
        parts = [f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if counts[name]]
        parts += [f"{len(missing)} not run"] if missing else []
        failed = [nodeid for nodeid, entry in self.outcomes.items() if entry[0] == "failed"]
        names = f"; failed: {' '.join(failed)}" if failed else ""
        print(f"{', '.join(parts) or 'no test was found'} in {time.monotonic() - self.begin:.0f} s{names}")
        if failed or not self.collected:
            return 1
        if missing:
            return NOT_RUN
        return 0 if counts["passed"] else SKIPPED


def _outcomes_before(results: Path | None) -> dict[str, tuple[str, float, str]]:
    """What an earlier run left: what passed or was skipped stands, what failed is repeated last."""
    known = {}
    if results is not None and results.exists():
        for line in results.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError):  # a killed run leaves half a line
                entry = json.loads(line)
                known[entry["id"]] = entry["outcome"], entry["seconds"], entry["message"]
    return known


def _death(status: int | None) -> str:
    if status is None:
        return "its process cannot be killed"
    if status < 0:
        return f"its process died: {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


def _short(message: str) -> str:
    """The line that says most: the first that pytest marks, or the last."""
    lines = message.strip().splitlines() or [""]
    marked = [line for line in lines if line.startswith("E  ")]
    return (marked or lines[-1:])[0].removeprefix("E").strip()[:300]


def _without_frames_of_pytest(output: str) -> str:
    noise = ("/_pytest/", "/pluggy/", "/pytest/__main__", "/gpu_check/worker.py", "<frozen runpy>", "Extension modules")
    return "\n".join(line for line in output.splitlines() if not any(word in line for word in noise))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.suite", description=__doc__)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--test-seconds", type=float, default=30.0, help="time limit of one test")
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), help="seconds after which no further test is run"
    )
    parser.add_argument(
        "--results", type=Path, help="a file of outcomes, one JSON line a test; what passed there is not run"
    )
    parser.add_argument("pytest", nargs="+", help="arguments of pytest, after --")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    return Suite(arguments).run()


if __name__ == "__main__":
    sys.exit(main())
