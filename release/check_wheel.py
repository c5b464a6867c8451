"""`make check-wheels`: looks into wheels and sdists, and installs each wheel into a fresh environment that verifies it.

There PATH has neither nvcc nor a compiler. A wheel of an interpreter that is not on this machine fails. An sdist is
built again, as a pure wheel, whose bytes must be those of the pure wheel beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from packaging.utils import parse_wheel_filename

from release import contents, interpreters
from release.environment import Failed, fresh, verify

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    """0 where every file is as it should be."""
    parser = argparse.ArgumentParser(
        prog="python -m release.check_wheel", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a wheel or an sdist")
    parser.add_argument("--torch", default="2.13.0", metavar="VERSION", help="torch to install; 2.13.0 by default")
    parser.add_argument("--contents", action="store_true", help="look into the files alone, install nothing")
    parser.add_argument(
        "--expect", metavar="VERSION", help="the version that every file must have, such as that of a tag"
    )
    parser.add_argument("--dtype", action="append", default=[], help="verify these alone; all by default")
    options = parser.parse_args(arguments)
    failures = 0
    for path in options.files:
        start = time.perf_counter()
        try:
            notes = check(path, options)
        except Failed as failure:
            failures += 1
            print(f"FAILED {path.name}: {failure}", flush=True)
            continue
        seconds = time.perf_counter() - start
        print(f"passed {path.name}  {path.stat().st_size / 1e6:.2f} MB  {seconds:.0f} s  {notes}", flush=True)
    return 1 if failures else 0


def check(path: Path, options: argparse.Namespace) -> str:
    """What was tried, in a few words.

    Raises:
        Failed: something is wrong with the file.
    """
    if options.expect and f"-{options.expect}-" not in path.name.replace(".tar.gz", "-"):
        raise Failed(f"its version is not {options.expect}")
    sdist = path.name.endswith(".tar.gz")
    wrong = contents.problems_of_sdist(path) if sdist else contents.problems_of_wheel(path, build_folders())
    if wrong:
        raise Failed("; ".join(wrong))
    if options.contents:
        return "contents"
    return rebuild(path) if sdist else install(path, options.torch, options.dtype)


def build_folders() -> list[str]:
    """Beginnings of paths of this machine, which may not be in a wheel."""
    return [f"{ROOT}/", f"{tempfile.gettempdir()}/pip-", f"{tempfile.gettempdir()}/build-env-", f"{sys.prefix}/"]


def rebuild(sdist: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", "-w", folder, str(sdist)]
        environment = {**os.environ, "GRPO_KERNELS_NATIVE": "0", "GRPO_KERNELS_CUDA": "0"}
        environment["SOURCE_DATE_EPOCH"] = str(int(time_of(sdist)))
        environment.pop("GRPO_KERNELS_LOCAL_VERSION", None)
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Failed(f"it does not build: {done.stderr[-2000:]}")
        (wheel,) = Path(folder).glob("*.whl")
        beside = sdist.with_name(wheel.name)
        if beside.is_file() and beside.read_bytes() != wheel.read_bytes():
            raise Failed(f"the wheel that it builds differs from {beside.name}")
        return f"builds {wheel.name}{', the same bytes' if beside.is_file() else ''}"


def time_of(sdist: Path) -> float:
    """When its files are from: the SOURCE_DATE_EPOCH that it was made with."""
    with tarfile.open(sdist) as archive:
        return max(member.mtime for member in archive.getmembers())


def install(wheel: Path, torch: str, dtypes: list[str]) -> str:
    (interpreter,) = {tag.interpreter for tag in parse_wheel_filename(wheel.name)[3]}
    found = interpreters.find()
    version = f"{interpreter[2]}.{interpreter[3:]}" if interpreter != "py3" else next(iter(found))
    if version not in found:
        raise Failed(f"there is no Python {version} here")
    with fresh(found[version]) as environment:
        environment.install(f"torch=={torch}")
        environment.install("--no-deps", str(wheel.resolve()))
        options = [word for dtype in dtypes for word in ("--dtype", dtype)]
        torch_version, summary, report = verify(environment, contents.is_native(wheel), options)
    build = [" ".join(line.split()) for line in report.splitlines() if line.split()[:1] in (["commit"], ["CUDA"])]
    return "; ".join([f"Python {version}", f"torch {torch_version}", summary, *build])


if __name__ == "__main__":
    raise SystemExit(main())
