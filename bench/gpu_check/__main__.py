"""`python3 -m bench.gpu_check`, or `python3 PATH/bench/gpu_check` from anywhere."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

if __package__ in (None, ""):  # started as a folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.gpu_check import processes, summary
from bench.gpu_check.phases import PHASES, Phase
from bench.gpu_check.results import Results
from bench.gpu_check.runner import Runner
from bench.gpu_check.settings import BUDGET, ROOT, Settings, cores, interpreter

_NAMES = [phase.name for phase in PHASES]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.gpu_check",
        description="Builds, checks and times everything on this machine's CUDA GPU.",
        epilog="Environment: REHEARSE=1 runs on the CPU; GK_PYTHON the Python to use; GK_WHEELS a folder of wheels for "
        "packages that it lacks; OUT the folder for results.",
    )
    parser.add_argument("--only", nargs="+", choices=_NAMES, metavar="PHASE", help=f"of {' '.join(_NAMES)}")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (default %(default).0f)")
    parser.add_argument("--output", type=Path, help="folder for results; build/gpu-check/results by default")
    parser.add_argument("--resume", type=Path, metavar="STATE", help="continue from this gpu_check_state.json")
    parser.add_argument("--fresh", action="store_true", help="run everything, whatever has passed before")
    parser.add_argument("--bench-seconds", type=float, default=0.5, help="for each benchmark (default %(default)s)")
    parser.add_argument("--plan", action="store_true", help="print the seconds that every phase gets, and run nothing")
    parser.add_argument("--workers", type=int, help="test processes that share the GPU")
    options = parser.parse_args(arguments)
    for name in ("output", "resume"):  # before the folder is changed
        if (path := getattr(options, name)) is not None:
            setattr(options, name, path.absolute())
    return options


def _settings(options: argparse.Namespace) -> Settings:
    rehearse = os.environ.get("REHEARSE", "") not in ("", "0")
    work = ROOT / "build" / ("gpu-check-rehearsal" if rehearse else "gpu-check")
    asked = options.output or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    output = (asked or work / "results").absolute()
    if os.environ.get("GK_WHEELS"):
        os.environ["GK_WHEELS"] = os.path.abspath(os.environ["GK_WHEELS"])
    for folder in (work, output):
        folder.mkdir(parents=True, exist_ok=True)
    workers = options.workers or max(1, min(3, cores() // 4))
    python = interpreter(rehearse)
    return Settings(rehearse, python, work, output, options.budget, options.bench_seconds, workers, options.fresh)


def _stop(number: int, frame: object) -> None:
    processes.stop.set()


def _chosen(only: list[str] | None) -> list[Phase]:
    """`versions` in any case: it says which machine this is."""
    return [phase for phase in PHASES if not only or phase.name in only or phase.name == "versions"]


def check(settings: Settings, chosen: list[Phase], options: argparse.Namespace) -> tuple[Results, float]:
    """Runs the phases; what they found, and seconds."""
    begin = time.monotonic()
    results = Results(settings)
    earlier = None if options.fresh else results.earlier(options.resume)
    Runner(settings, results, chosen[:1], begin).run()
    said = results.resume(earlier)
    if not said.startswith("continuing"):
        results.forget(keep=chosen[0].name)
    print(f"  {said}" if said else "  from the beginning", flush=True)
    rest = [dataclasses.replace(phase, always=True) if options.only else phase for phase in chosen[1:]]
    runner = Runner(settings, results, rest, begin)
    print("\n".join(plan_lines(runner)), flush=True)
    runner.run()
    return results, time.monotonic() - begin


def plan_lines(runner: Runner) -> list[str]:
    """A few lines: the seconds of every phase at most, and at least."""
    parts = [f"{phase.name} {most:.0f}/{least:.0f}" for phase, most, least in runner.plan()]
    text = "seconds of each phase at most, and when all before it take theirs: " + ", ".join(parts)
    return textwrap.wrap(text, 118, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _record(results: Results) -> None:
    """Puts the results of a real run where the documentation is made from."""
    record = ROOT / "bench" / "results" / results.file.name
    if not results.settings.rehearse and results.key and (results.bench or not record.exists()):
        shutil.copyfile(results.file, record)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    settings = _settings(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    os.chdir(ROOT)
    print(f"gpu-check with {settings.python}, at most {settings.budget:.0f} s", flush=True)
    if options.plan:
        print("\n".join(plan_lines(Runner(settings, Results(settings), _chosen(options.only), time.monotonic()))))
        return 0
    results, seconds = check(settings, _chosen(options.only), options)
    _record(results)
    print("\n" + "\n".join(summary.lines_of(results, seconds)), flush=True)
    return 130 if processes.stop.is_set() else summary.status(results)


if __name__ == "__main__":
    sys.exit(main())
