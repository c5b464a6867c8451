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


def _processes() -> dict[int, tuple[int, int]]:
    """Parent and session of every process that lives."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # gone
            continue
        if state != "Z":
            found[int(entry.name)] = int(parent), int(session)
    return found


def _members(leader: int) -> set[int]:
    """A process's session, whatever process groups are in it, and its descendants, whatever sessions they made."""
    living = _processes()
    members = {pid for pid, (_, session) in living.items() if session == leader} | {leader}
    size = 0
    while size != len(members):
        size = len(members)
        members |= {pid for pid, (parent, _) in living.items() if parent in members}
    return members & living.keys()


def _signal(members: set[int], number: int) -> None:
    for pid in members:
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
    """Runs a command in a session of its own, or in the caller's; all it prints is added to `log`."""
    begin = time.monotonic()
    with log.open("ab") as file:
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
        members: set[int] = set()
        while (status := _wait(process, 0.2)) is None:
            if time.monotonic() - begin > seconds:
                stopped = f"stopped at its limit of {seconds:.0f} s"
            elif stop.is_set():
                stopped = "stopped with the whole run"
            elif log.stat().st_size > _LARGEST_LOG:
                stopped = "stopped: it printed too much"
            if stopped:
                members = _members(process.pid)
                _signal(members, signal.SIGTERM)
                status = _wait(process, _GRACE)
                break
        _signal((members & _processes().keys()) | _members(process.pid), signal.SIGKILL)  # and what it left running
        if status is None:
            status = _wait(process, 5.0)
    return Result(status, time.monotonic() - begin, stopped)
