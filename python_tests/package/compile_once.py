"""Compiles a source, or takes the object that the same compiler made of the same text with the same options before.

`python compile_once.py FOLDER COMPILER ARGUMENTS...` is what CMake calls as CMAKE_CXX_COMPILER_LAUNCHER. Needs the
standard library alone, since builds in isolation run it, too. Objects of a build with debug information, which names
folders, are not to be shared this way.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

PATHS = ("-I", "-isystem", "-o", "-MF", "-MT")
"""Options whose value is a path, which says nothing about the object that the text does not say."""


def without(arguments: list[str], *options: str) -> list[str]:
    """Those arguments but for the options and their values, which follow them as a word or at once."""
    kept, skip = [], False
    for word in arguments:
        if not skip and not word.startswith(options):
            kept.append(word)
        skip = not skip and word in options
    return kept


def key(compiler: str, arguments: list[str]) -> str | None:
    """A name for the object; None for what does not compile a source, and where the text cannot be had."""
    if "-c" not in arguments or "-o" not in arguments:
        return None
    source = arguments[arguments.index("-c") + 1]
    words = [word for word in without(arguments, "-o") if word != "-c"]
    text = subprocess.run([compiler, *words, "-E", "-P"], capture_output=True)
    version = subprocess.run([compiler, "--version"], capture_output=True)
    if text.returncode != 0 or version.returncode != 0:
        return None
    options = [Path(compiler).name, *(word for word in without(arguments, *PATHS) if word != source)]
    return hashlib.sha256(b"\0".join([version.stdout, *map(os.fsencode, options), text.stdout])).hexdigest()


def main(folder: str, compiler: str, *arguments: str) -> int:
    """The compiler's exit status, 0 where it need not run. What the source includes is written down either way."""
    name = key(compiler, list(arguments))
    if name is None:
        return subprocess.call([compiler, *arguments])
    target, kept = Path(arguments[arguments.index("-o") + 1]), Path(folder, f"{name}.o")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what another process is about to compile is waited for
        if kept.is_file():
            shutil.copyfile(kept, target)
            return 0
        status = subprocess.call([compiler, *arguments])
        if status == 0:
            shutil.copyfile(target, kept)
        return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
