"""The pytest plugin of a worker of suite.py: runs the tests that it is told to, one at a time, and reports each.

`FD` in the environment is its end of a pipe. Over it go the collected tests and one outcome per test; back come names
of tests, and None when there are no more.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

import pytest

FD = "GK_WORKER_FD"
SECONDS = "GK_TEST_SECONDS"
POISONED = 3  # exit status of a worker that left because the device was in error

_MESSAGE = 6000  # characters of a failure that are kept


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares what the project's settings name and pytest-timeout, when it is missing, does not."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "time limit of a test; unused here, suite.py has its own")


def pytest_configure(config: pytest.Config) -> None:
    if FD in os.environ:
        config.pluginmanager.register(Worker(Connection(int(os.environ[FD])), float(os.environ[SECONDS])))


class Worker:
    """Takes over pytest's loop over the tests."""

    def __init__(self, pipe: Connection, seconds: float) -> None:
        self.pipe = pipe
        self.seconds = seconds
        self.trace = os.dup(2)  # pytest captures the standard error; the traceback of a hanging test must get out
        self.reports: list[pytest.TestReport] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.pipe.send(("broken", report.nodeid, report.longreprtext[-_MESSAGE:]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        self.pipe.send(("collected", list(items)))
        while (nodeid := self.pipe.recv()) is not None:
            self._run(items[nodeid])
        return True

    def _run(self, item: pytest.Item) -> None:
        self.reports.clear()
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.trace)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        error = _device_error()
        faulthandler.cancel_dump_traceback_later()
        outcome, message = _outcome(self.reports)
        if error:
            left = f"the device was left in error: {error}"
            outcome, message = "failed", f"{message}\n{left}".strip()
        self.pipe.send(("done", outcome, message[-_MESSAGE:], not error))
        if error:  # every later test in this process would fail; an orderly exit could hang
            os._exit(POISONED)


def _outcome(reports: list[pytest.TestReport]) -> tuple[str, str]:
    for report in reports:
        if report.failed:
            output = "".join(f"\n--- {title}\n{text[-2000:]}" for title, text in report.sections)
            return "failed", f"{report.longreprtext}{output}"
    for report in reports:
        if report.skipped:
            reason: Any = report.longrepr
            return "skipped", str(reason[2] if isinstance(reason, tuple) else reason)
    return "passed", ""


def _device_error() -> str:
    """What is wrong with the CUDA context, if anything: an illegal access shows at the next wait, in whatever test."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
