"""The Python interpreters of this machine that wheels can be built for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANAGED = ("{PYENV_ROOT}/versions/*/bin", "{HOME}/.local/share/uv/python/*/bin", "/opt/python/cp*/bin")
"""Where pyenv, uv and the manylinux images keep interpreters that PATH does not name."""
PROBE = """
import json, pathlib, sys, sysconfig
header = pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file()
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
usable = header and not free_threaded and sys.implementation.name == "cpython"
print(json.dumps(["%d.%d" % sys.version_info[:2], sys.executable, usable]))
"""


def supported() -> list[str]:
    """Versions such as "3.11" that the package's classifiers name, ascending."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"]]
    return sorted((match.group(1) for match in found if match), key=lambda text: int(text.partition(".")[2]))


def _candidates(version: str) -> Iterator[str]:
    if found := shutil.which(f"python{version}"):
        yield found
    home = Path.home()
    places = {"HOME": str(home), "PYENV_ROOT": os.environ.get("PYENV_ROOT", str(home / ".pyenv"))}
    for pattern in MANAGED:
        folder = Path(pattern.format(**places))
        yield from map(
            str, sorted(Path(folder.anchor).glob(f"{folder.relative_to('/')}/python{version}"), reverse=True)
        )
    yield sys.executable


def find() -> dict[str, Path]:
    """Version -> executable, for each supported version that is installed with its headers; the first found counts."""
    interpreters: dict[str, Path] = {}
    for version in supported():
        for candidate in _candidates(version):
            # From the root of the file system: no folder's own choice of a version decides what a shim starts.
            probe = subprocess.run([candidate, "-c", PROBE], capture_output=True, text=True, check=False, cwd="/")
            if probe.returncode != 0:  # a shim for a version that is not chosen
                continue
            found, executable, usable = json.loads(probe.stdout)
            if found == version and usable:
                interpreters[version] = Path(executable)
                break
    return interpreters
