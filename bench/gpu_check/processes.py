"""Running a command with a time limit, and ending it with everything that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_LARGEST_LOG = 2**28  # bytes; a command that prints more is stopped
_GRACE = 4.0  # seconds between SIGTERM and SIGKILL

stop = threading.Event()
"""Set when the whole run is to end: commands are stopped, and none is begun."""


@dataclass(frozen=True)
class Result:
    status: int | None  # None: it could not even be killed
    seconds: float
    stopped: str = ""  # why it was ended from outside


def session_members(session: int) -> list[int]:
    """Processes of a session, whatever process group they made for themselves."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # gone
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(int(entry.name))
    return members


def _signal_session(session: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(session, number)
    for pid in session_members(session):
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def run(
    command: list[str],
    seconds: float,
    log: Path,
    environment: dict[str, str] | None,
    folder: Path,
    session: bool = True,
) -> Result:
    """Runs a command in a session of its own, or in the caller's; all it prints goes to `log`."""
    begin = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=session,
                process_group=None if session else 0,
            )
        except OSError as error:
            file.write(f"{command[0]}: {error}\n".encode())
            return Result(127, 0.0)
        stopped = ""
        while (status := _wait(process, 0.2)) is None:
            if time.monotonic() - begin > seconds:
                stopped = f"stopped at its limit of {seconds:.0f} s"
            elif stop.is_set():
                stopped = "stopped with the whole run"
            elif log.stat().st_size > _LARGEST_LOG:
                stopped = "stopped: it printed too much"
            if stopped:
                _signal_session(process.pid, signal.SIGTERM)
                status = _wait(process, _GRACE)
                break
        _signal_session(process.pid, signal.SIGKILL)  # and whatever it left running
        if status is None:
            status = _wait(process, 5.0)
    return Result(status, time.monotonic() - begin, stopped)
