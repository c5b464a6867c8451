"""What a run has found out so far: kept for the next run, and written out after every phase."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_check import phases
from bench.gpu_check.phases import Phase
from bench.gpu_check.settings import ROOT, Settings

PASS, FAIL, SKIP, LATE = "pass", "fail", "skip", "late"
_HEAD, _TAIL = 60_000, 300_000  # bytes of a phase's output that the log keeps
_SOURCES = ("csrc", "cmake", "grpo_kernels", "python_tests", "bench", "CMakeLists.txt", "pyproject.toml")
_SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cmake", ".map", ".txt", ".toml")


@dataclass
class Check:
    """The verdict on a phase: pass, fail, skip (something is missing) or late (not finished in time)."""

    phase: str
    verdict: str
    seconds: float
    note: str
    failed: list[str] = field(default_factory=list)  # names of tests
    kept: bool = False  # from an earlier run


def source_digest() -> str:
    """Changes with anything that a result depends on, whether or not there is a git repository."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in _SUFFIXES and path.is_file() and "gpu_check" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def json_text(value: Any, depth: int = 4, indent: str = "") -> str:
    """JSON with one line for whatever lies deeper than `depth`: short, and readable in a diff."""
    if depth == 0 or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{inner}{json.dumps(str(key))}: {json_text(item, depth - 1, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    parts = [inner + json_text(item, depth - 1, inner) for item in value]
    return "[\n" + ",\n".join(parts) + f"\n{indent}]"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def merged_verification(by_op: Any) -> dict[str, Any] | None:
    """What `grpo-kernels verify --json` writes for every op, from a file for each; an op without one has failed."""
    if not isinstance(by_op, dict) or not by_op:
        return None
    parts = {op: part if isinstance(part, dict) else {} for op, part in by_op.items()}
    rows = [row for part in parts.values() for row in part.get("rows", [])]
    failures = [row for part in parts.values() for row in part.get("failures", [])]
    failures += [{"op": op, "verdict": "FAILED", "problem": "it did not finish"} for op in parts if not parts[op]]
    verified = all(part.get("verified") for part in parts.values())
    counts = f"{len(parts)} ops, {sum(row.get('comparisons', 0) for row in rows)} comparisons"
    first: dict[str, Any] = next((part for part in parts.values() if part), {})
    return {
        "verified": verified,
        "summary": f"verified: {counts}" if verified else f"FAILED: {len(failures)} checks; {counts}",
        "seconds": round(sum(part.get("seconds", 0.0) for part in parts.values()), 1),
        "versions": first.get("versions", {}),
        "devices": first.get("devices", {}),
        "rows": rows,
        "failures": failures,
    }


def shortened(output: bytes) -> str:
    """The head and the tail of what a phase printed."""
    if len(output) > _HEAD + _TAIL:
        output = output[:_HEAD] + b"\n[... left out ...]\n" + output[-_TAIL:]
    return output.decode(errors="replace")


class Results:
    """Verdicts and artifacts of the phases, and the files made of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lock = threading.Lock()
        self.checks: dict[str, Check] = {}
        self.machine: dict[str, Any] = {"slug": "unknown", "machine": {}}
        self.bench: dict[str, Any] | None = None
        self.verify: dict[str, Any] | None = None
        self.key = ""
        self.blocked = ""  # why the phases after `versions` cannot run

    # --- what an earlier run left ---------------------------------------------------------------------------------

    def earlier(self, source: Path | None) -> Any:
        """What an earlier run left, read before this one writes: None if nothing, False if it cannot be read."""
        source = source or self.settings.work / self.state.name
        if source.is_dir():
            source = source / self.state.name
        return _read(source) or (False if source.exists() else None)

    def resume(self, state: Any) -> str:
        """Takes over what an earlier run with these sources on such a machine found out; says what it did."""
        if state is None:
            return ""
        if not isinstance(state, dict):
            return "what an earlier run left is damaged: everything is run"
        if state.get("key") != self.key:
            return "earlier results are of other sources or another machine: everything is run"
        try:
            checks = {check["phase"]: Check(**check) for check in state["checks"]}
            for name, lines in state["outcomes"].items():
                phases.outcomes_file(self.settings, name).write_text(lines)
            self.bench, self.verify = state["bench"], state["verify"]
            phases.bench_file(self.settings).write_text(json.dumps(self.bench))
            phases.verify_file(self.settings).unlink(missing_ok=True)  # the merged one is in the state
        except (KeyError, TypeError, AttributeError) as error:
            return f"what an earlier run left is damaged ({type(error).__name__}): everything is run"
        for check in checks.values():
            check.kept = True
        self.checks = {**checks, **self.checks}
        return f"continuing: {sum(check.verdict == PASS for check in checks.values())} phases have passed before"

    def forget(self, keep: str) -> None:
        """Removes what an earlier run left in the working folder, but for the log of one phase of this run."""
        self.bench = self.verify = None
        for phase in phases.PHASES:
            phases.outcomes_file(self.settings, phase.name).unlink(missing_ok=True)
        for path in (phases.bench_file(self.settings), phases.verify_file(self.settings)):
            path.unlink(missing_ok=True)
        for log in (self.settings.work / "logs").glob("*.log"):
            if log.stem != keep:
                log.unlink()

    def has_passed(self, name: str) -> bool:
        return name in self.checks and self.checks[name].verdict == PASS

    # --- what this run finds out ----------------------------------------------------------------------------------

    def log_of(self, name: str) -> Path:
        return self.settings.work / "logs" / f"{name}.log"

    def add(self, phase: Phase, check: Check) -> None:
        """Takes a verdict, and writes everything out."""
        with self.lock:
            if phase.outcomes:
                check.failed = [line["id"] for line in self._outcomes(phase.name) if line["outcome"] == FAIL + "ed"]
            self.checks[phase.name] = check
            if phase.name == "versions":
                self._identify()
            measured = _read(phases.bench_file(self.settings))
            if isinstance(measured, dict) and isinstance(measured.get("cases"), list):
                self.bench = measured
            self.verify = merged_verification(_read(phases.verify_file(self.settings))) or self.verify
            self._save()

    def _identify(self) -> None:
        """Which machine this is, and what earlier results would have to agree with."""
        if not self.has_passed("versions"):
            self.blocked = "the phase versions did not pass"
            return
        self.machine = _read(phases.machine_file(self.settings)) or self.machine
        about = self.machine["machine"]
        self.key = " ".join(
            [self.machine["slug"], *map(str, (about.get("torch"), about.get("python"))), source_digest()]
        )

    def _outcomes(self, name: str) -> list[dict[str, Any]]:
        """The last outcome of every test of a suite."""
        path = phases.outcomes_file(self.settings, name)
        last = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                outcome = json.loads(line)
                last[outcome["id"]] = outcome
            except (ValueError, KeyError):  # half a line
                continue
        return list(last.values())

    def refresh_log(self) -> None:
        """While a phase runs: whoever ends this process finds what was printed."""
        with self.lock:
            self._save_log()

    def ordered(self) -> list[Check]:
        names = [phase.name for phase in phases.PHASES]
        known = [self.checks[name] for name in names if name in self.checks]
        return known + [check for name, check in self.checks.items() if name not in names]

    def report(self) -> dict[str, Any]:
        """The content of <machine>.json: the benchmarks' format, with the checks and the verification."""
        base = self.bench or {"machine": self.machine["machine"], "seconds": 0, "skipped": [], "cases": []}
        checks = []
        for check in self.ordered():
            entry: dict[str, Any] = {"phase": check.phase, "verdict": check.verdict, "seconds": round(check.seconds, 1)}
            entry["note"] = check.note
            if check.failed:
                entry["failed"] = check.failed
            checks.append(entry)
        extra = {"rehearsal": True} if self.settings.rehearse else {}
        cases = base["cases"]
        head = {key: value for key, value in base.items() if key != "cases"}
        return {**head, **extra, "checks": checks, "verify": self.verify, "cases": cases}

    @property
    def file(self) -> Path:
        return self.settings.output / f"{self.machine['slug']}.json"

    @property
    def tuning(self) -> Path:
        """What the phase `tuning` writes."""
        return self.settings.output / f"tuning-{self.machine['slug']}.json"

    @property
    def log(self) -> Path:
        return self.settings.output / "gpu_check.log"

    @property
    def state(self) -> Path:
        return self.settings.output / "gpu_check_state.json"

    def _save(self) -> None:
        outcomes = {}
        for phase in phases.PHASES:
            path = phases.outcomes_file(self.settings, phase.name)
            if phase.outcomes and path.exists():
                outcomes[phase.name] = path.read_text(errors="replace")
        state = {
            "key": self.key,
            "checks": [asdict(check) for check in self.ordered()],
            "outcomes": outcomes,
            "bench": self.bench,
            "verify": self.verify,
        }
        if self.key:
            write(self.state, json.dumps(state))
            if self.settings.work != self.settings.output:
                shutil.copyfile(self.state, self.settings.work / self.state.name)
        write(self.file, json_text(self.report()) + "\n")
        self._save_log()

    def _save_log(self) -> None:
        order = [phase.name for phase in phases.PHASES]
        logs = sorted(
            self.log_of("any").parent.glob("*.log"),
            key=lambda path: (order.index(path.stem) if path.stem in order else 99, path.stem),
        )
        write(self.log, "\n".join(f"===== {path.stem}\n{shortened(path.read_bytes())}\n" for path in logs))
