"""The phases, in order of value: what a first run must bring home comes first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_check.settings import Settings, cores

SKIPPED = 77  # exit status of a phase that this machine lacks something for; its last line says what
NOT_RUN = 75  # of one that had no time for everything, and found no failure

Command = Callable[[Settings, float], list[str]]  # the second is its time limit


@dataclass(frozen=True)
class Phase:
    name: str
    limit: float  # seconds at most, of BUDGET
    command: Command
    reserve: float = 0.0  # seconds that the phases before it must leave
    note: str = ""  # regular expression of the line for the summary, the last that matches; else the last line
    group: str = ""  # neighbours of one group run at the same time
    always: bool = False  # also when it has passed before: what later phases need is not kept on every machine
    outcomes: bool = False  # it is a suite, and keeps the outcome of every test
    worthwhile: float = 0.0  # it is skipped where less time than this is left; it proves nothing and may be left out


def outcomes_file(settings: Settings, name: str) -> Path:
    return settings.work / f"tests-{name}.jsonl"


def bench_file(settings: Settings) -> Path:
    return settings.work / "bench.json"


def verify_file(settings: Settings) -> Path:
    return settings.work / "verify.json"


def machine_file(settings: Settings) -> Path:
    return settings.work / "machine.json"


def tuning_file(settings: Settings) -> Path:
    return settings.output / f"tuning-{read_machine(settings)['slug']}.json"


def read_machine(settings: Settings) -> dict[str, Any]:
    """What the phase `versions` found out."""
    found: dict[str, Any] = json.loads(machine_file(settings).read_text())
    return found


def _step(name: str, *arguments: str) -> Command:
    return lambda settings, limit: [settings.python, "-m", "bench.gpu_check.steps", name, *arguments]


def _build(settings: Settings, limit: float) -> list[str]:
    step = [
        settings.python,
        "-m",
        "bench.gpu_check.steps",
        "build",
        str(settings.work),
        read_machine(settings)["capability"],
    ]
    return [*step, "--rehearse"] if settings.rehearse else step


def _suite(name: str, *paths: str, slow: bool = False, workers: int | None = None) -> Command:
    """Tests in worker processes. In a rehearsal the CPU's half of python_tests/gpu, however small."""

    def command(settings: Settings, limit: float) -> list[str]:
        marker = "not gpu and not interpreter" if settings.rehearse else "gpu"
        used = (
            paths if not settings.rehearse else tuple("python_tests/gpu" if p == "python_tests" else p for p in paths)
        )
        return [
            *(settings.python, "-m", "bench.gpu_check.suite"),
            *("--workers", str(workers or settings.workers)),
            *("--test-seconds", f"{30 * settings.stretch:.0f}"),
            *("--deadline", f"{max(limit - 8, limit / 2):.0f}"),
            *("--results", str(outcomes_file(settings, name))),
            *("--", "-m", marker if slow else f"{marker} and not slow", *used),
        ]

    return command


def _each_op(which: str, *command: str, merge: bool = False) -> Command:
    """A command for every op by itself: one that hangs or crashes costs no other."""

    def whole(settings: Settings, limit: float) -> list[str]:
        line = [settings.python, "-m", "bench.gpu_check.each_op", "--ops", ",".join(read_machine(settings)[which])]
        line += ["--seconds", f"{max(limit - 5, limit / 2):.0f}", "--workers", str(settings.workers)]
        line += ["--json", str(verify_file(settings))] if merge else []
        return [*line, "--", *command, "--device", settings.device]

    return whole


_NEWEST = ("fp8", "float8", "quantize")  # in the names of the benchmarks that come first
_FUZZ = ("product", "wgrad", "glu", "glu_backward", "experts", "quantize", "move")


def _fuzz(settings: Settings, limit: float) -> list[str]:
    """Random problems for most of the time, every kind of problem in a process of its own."""
    workers = max(settings.workers, min(len(_FUZZ), cores() // 2))  # small problems: they share even a busy GPU
    waves = -(-len(_FUZZ) // workers)
    seconds = 0.6 * (limit - 5) / waves  # the first problems compile, and what is begun must still end
    return [
        *(settings.python, "-m", "bench.gpu_check.each_op", "--ops", ",".join(_FUZZ)),
        *("--seconds", f"{max(limit - 5, limit / 2):.0f}", "--workers", str(workers)),
        *("--", "-m", "python_tests.gpu.fuzz", "--seconds", f"{max(seconds, 1.0):.0f}"),
        *("--device", settings.device),
    ]


def _tuning(settings: Settings, limit: float) -> list[str]:
    """Writes what it measures beside the results; nothing takes a configuration from there by itself."""
    return [
        *(settings.python, "-m", "bench.tune", "--device", settings.device),
        *(() if settings.fresh else ("--resume",)),
        *("--save", str(tuning_file(settings))),
        *("--seconds", f"{max(limit - 10, limit / 2):.0f}"),
    ]


def _benchmarks(settings: Settings, limit: float) -> list[str]:
    deadline = min(limit - 35, 0.8 * limit) if limit > 70 else limit / 2  # what is begun then must still end
    return [
        *(settings.python, "-m", "bench", "--device", settings.device, "--seconds", str(settings.bench_seconds)),
        *("--deadline", f"{deadline:.0f}", "--output", str(bench_file(settings))),
        *(part for word in _NEWEST for part in ("--first", word)),
    ]


def _sanitizer(tool: str) -> Phase:
    def command(settings: Settings, limit: float) -> list[str]:
        return [settings.python, "-m", "bench.gpu_check.steps", "sanitizer", tool, settings.device]

    return Phase(
        tool,
        100,
        command,
        reserve=60,
        note=r"ERROR SUMMARY|RACECHECK SUMMARY|not found|^reported in",
        group="sanitizer",
    )


_CONTRACT = ("python_tests/gpu/test_contract.py", "python_tests/gpu/test_launches.py")
_DETERMINISM = "python_tests/gpu/test_determinism.py"
_SIZES = ("python_tests/gpu/test_sizes.py", "python_tests/gpu/test_sizes_fp8.py")
_BY_THE_PHASE_FUZZ = "python_tests/gpu/test_fuzz.py"
_ELSEWHERE = [f"--ignore={path}" for path in (*_CONTRACT, _DETERMINISM, *_SIZES, _BY_THE_PHASE_FUZZ)]
_TOTALS = r"^\d+ (passed|failed|skipped|not run).* in \d+ s|no test was found"

PHASES = (
    Phase("versions", 60, lambda settings, limit: [
        settings.python, "-m", "bench.gpu_check.steps", "versions", str(machine_file(settings)), settings.device
    ], note=r"^device: ", always=True),
    Phase("packages", 40, lambda settings, limit: [
        settings.python, "-m", "bench.gpu_check.steps", "packages", str(settings.work)
    ], always=True),
    Phase("build", 170, _build, note=r"^built |error", always=True),
    Phase("small", 75, _each_op("packages", "-m", "python_tests.gpu.small"), note=r"^\d+ of \d+ ops"),
    Phase("fuzz", 75, _fuzz, reserve=45, note=r"^\d+ of \d+ ops"),
    Phase("verify", 110, _each_op("public", "-m", "grpo_kernels.cli", "verify", merge=True), note=r"^\d+ of \d+ ops"),
    Phase("contract", 110, _suite("contract", *_CONTRACT), note=_TOTALS, outcomes=True),
    Phase("tests", 90, _suite("tests", "python_tests", *_ELSEWHERE), note=_TOTALS, outcomes=True),
    Phase("tuning", 150, _tuning, note=r"^tuned ", worthwhile=40),
    Phase("benchmarks", 240, _benchmarks, reserve=130, note=r"targets? met"),
    *(_sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck", "initcheck")),
    Phase("determinism", 60, _suite("determinism", _DETERMINISM), reserve=15, note=_TOTALS, outcomes=True),
    Phase("sizes", 60, _suite("sizes", *_SIZES, slow=True, workers=1), reserve=20, note=_TOTALS, outcomes=True),
)  # fmt: skip


def note_of(phase: Phase, output: str) -> str:
    """The one line of its output that goes into the summary."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if phase.note:
        lines = [line for line in lines if re.search(phase.note, line)] or lines
    return lines[-1].strip("= ")[:300] if lines else ""
