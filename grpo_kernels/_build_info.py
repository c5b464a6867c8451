"""Which sources the package was made of: recorded when it was built, or asked of git where the sources themselves run.

Alone in a file, with the standard library alone, so that setup.py can load it without importing the package.
"""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

RECORD = "build_info.json"
"""Name of the record beside this file, in wheels and sdists."""
UNKNOWN = "unknown"


class BuildInfo(NamedTuple):
    """commit: 40 hex digits, followed by "+dirty" where the files differed from it; or "unknown".

    date: a day in UTC, of $SOURCE_DATE_EPOCH or else of the commit, never of the clock; or "unknown".
    """

    commit: str
    date: str

    def write(self, path: Path) -> None:
        """The record, as bytes that depend on the fields alone."""
        path.unlink(
            missing_ok=True
        )  # in a source archive that is being made, it may be a link to the file it came from
        path.write_text(json.dumps(self._asdict()) + "\n", encoding="utf-8")


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None without git, or where it refuses."""
    line = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def of_sources(root: Path) -> BuildInfo:
    """Of a clone, by git; of an unpacked sdist, by the record in it."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    if _git(root, "rev-parse", "--show-prefix") == "":  # not the repository of something else, which holds this folder
        commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
        seconds = seconds or _git(root, "log", "-1", "--format=%ct") or ""
        return BuildInfo(f"{commit}{'+dirty' if changes else ''}" if commit else UNKNOWN, _day(seconds))
    record = root / "grpo_kernels" / RECORD
    if record.is_file():
        info = _read(record)
        return info._replace(date=_day(seconds)) if seconds else info
    return BuildInfo(UNKNOWN, _day(seconds))


def current() -> BuildInfo:
    """Of the package that this file belongs to."""
    folder = Path(__file__).parent
    record = folder / RECORD
    return _read(record) if record.is_file() else of_sources(folder.parent)


def _read(record: Path) -> BuildInfo:
    return BuildInfo(**json.loads(record.read_text(encoding="utf-8")))


def _day(seconds: str) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).date().isoformat() if seconds else UNKNOWN
