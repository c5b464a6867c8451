"""docs/kernels.md: for every GPU kernel and architecture what was proved, and how."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.docs_benchmarks import limit_text, markdown
from bench.floors import page as floors_page
from bench.gates import cuda_kernels, fingerprint, report
from bench.gates.gate import ARCHITECTURES

ROOT = Path(__file__).parents[1]
_GENERATIONS = {"A100": 80, "A800": 80, "H100": 90, "H200": 90, "GH200": 90, "H800": 90, "B200": 100, "GB200": 100}

Results = dict[str, Any]
Row = dict[str, Any]

_HEAD = """\
# Kernels

Made by `python -m bench.docs` from `bench/results`; edit those programs, not this page.

What each GPU kernel was put through so far. From weak to strong:

- **compile-verified**: compiled for that architecture within the limits of the last table. It has not run there.
- **interpreted**: a Triton kernel that the tests run on the CPU in Triton's interpreter. It proves the arithmetic and
  the indices, not the compiled code.
- **emulated**: a CUDA C++ source that the tests compile for the CPU and run there, one fiber a thread
  ([emulator](emulator.md)). It proves arithmetic, indices and synchronisation, not the compiled code.
- **run on** a GPU: the op passed its accuracy check there and was timed. The percentage is that of the op's best case,
  of what the same GPU reaches in a large copy (or matrix product).
"""

_NOTE = """\
`probe_kernel` is empty and never launched: its attributes tell the extension whether the binary fits the device.
"""

_GATES = """\
## Compile gates

`make gates` compiles every kernel as it ships, and fails if one breaks a limit. Triton kernels are compiled as their
launchers launch them: every combination of options (of those outside the loop, one, where rows are not aligned), every
dtype, both dtypes of ids, aligned and ragged vocabularies, views.
A row is the worst of as many specialisations as were "compiled". Beside the limits shown, nothing may spill registers,
use the stack, or add floats with atomics. Registers are those of a thread, shared memory is in bytes of a block, and
"warps of 64" is what a multiprocessor can hold at a time with them. LDG.128 and STG.128 are loads and stores of 16
bytes a thread; BAR is a barrier of the block. "Aligned rows" start at multiples of 16 elements.
"""


def architecture_of(machine: Mapping[str, Any]) -> int:
    """Which architecture a GPU of the results is.

    Raises:
        ValueError: its name is unknown, and the file does not say its compute capability.
    """
    if "capability" in machine:
        major, minor = str(machine["capability"]).split(".")
        return 10 * int(major) + int(minor)
    for name, architecture in _GENERATIONS.items():
        if name in machine["device"].replace("-", " ").split():
            return architecture
    raise ValueError(f"which architecture is {machine['device']!r}? Add `capability` to the `machine` of its results")


def _language(row: Row) -> str:
    return "CUDA C++" if row["compiler"].startswith("nvcc") else "Triton"


def on_the_cpu(op: str, language: str) -> str:
    """How the tests run a kernel without a GPU; empty if they do not."""
    tests = ROOT / "python_tests"
    if language == "Triton":
        return "interpreted" if list((tests / "interpreter").glob(f"test_{op}*.py")) else ""
    source = ROOT / "csrc" / op / "cuda.cu"
    everywhere = source.is_file() and set(cuda_kernels.architecture_names(source)) == set(ARCHITECTURES)
    texts = [path.read_text() for path in (tests / "emulator").rglob("test_*.py")]
    return "emulated" if everywhere and any(re.search(rf"\b{op}\b", text) for text in texts) else ""


def compiled(rows: list[Row], stamp: Callable[[str, str], str] = fingerprint.of) -> str:
    """What the gates say about one kernel on one architecture, for each compiler. stamp: gives fingerprints."""
    if any(row["sources"] != stamp(row["op"], row["compiler"]) for row in rows):
        return "changed since it was compiled"
    broken = sorted({row["compiler"] for row in rows if row["failures"]})
    sound = [row for row in rows if row["compiler"] not in broken]
    texts = []
    if sound:
        compilers = " and ".join(sorted({row["compiler"] for row in sound}))
        texts.append(f"compile-verified: {registers_text(sound)}, 0 spills, {compilers}")
    return "; ".join([*texts, *(f"OVER ITS LIMITS with {compiler}" for compiler in broken)])


def _rows_of(op: str, backend: str, content: Results) -> list[Row]:
    """The rows of ours for an op that went through a backend."""
    cases = [record["rows"] for record in content["cases"] if record["op"] == op]
    return [row for rows in cases for row in rows.values() if row["kind"] == "ours" and row.get("backend") == backend]


def run_on(op: str, language: str, architecture: int, files: Mapping[str, Results]) -> list[str]:
    """The GPUs of one architecture on which an op ran in this language, right and timed."""
    texts = []
    for content in files.values():
        machine = content["machine"]
        if not machine.get("cuda") or architecture_of(machine) != architecture:
            continue
        rows = _rows_of(op, {"CUDA C++": "native", "Triton": "triton"}[language], content)
        right = [row for row in rows if "median_us" in row and "accuracy" not in row and "error" not in row]
        if not right:
            continue
        best = max(right, key=lambda row: max(row.get("percent_of_copy", 0), row.get("percent_of_matmul", 0)))
        share = limit_text(best)
        failed = len(rows) - len(right)
        texts.append(
            f"run on {machine['device']}"
            + (f" at {share}" if share else "")
            + (f", {failed} of {len(rows)} rows FAILED" if failed else "")
        )
    return texts


def registers_text(rows: list[Row]) -> str:
    """Registers of a thread; the most that any form of the kernel has."""
    most = max(row["registers"] for row in rows)
    return f"{'at most ' if sum(row['specialisations'] for row in rows) > 1 else ''}{most} registers"


def checks_text(machine: Mapping[str, Any], checks: list[dict[str, Any]]) -> str:
    """How `make gpu-check` ended on a GPU."""
    verdicts = {
        verdict: [c["phase"] for c in checks if c["verdict"] == verdict] for verdict in ("fail", "late", "skip")
    }
    passed = sum(check["verdict"] == "pass" for check in checks)
    others = "".join(f", {verdict}: {', '.join(phases)}" for verdict, phases in verdicts.items() if phases)
    return f"- {machine['device']}: {passed} of {len(checks)} phases of `make gpu-check` passed{others}."


def _runs(files: Mapping[str, Results]) -> list[str]:
    gpus = [content for content in files.values() if content["machine"].get("cuda")]
    if not gpus:
        return ["No kernel of this version has run on a GPU yet."]
    return [checks_text(content["machine"], content.get("checks", [])) for content in gpus]


def _status(rows: list[Row], files: Mapping[str, Results]) -> list[str]:
    kernels = sorted({(row["op"], _language(row), row["kernel"]) for row in rows})
    table = []
    stamp = functools.cache(fingerprint.of)
    for op, language, kernel in kernels:
        cells = []
        for architecture in ARCHITECTURES:
            mine = [r for r in rows if (r["op"], r["kernel"], r["arch"]) == (op, kernel, architecture)]
            texts = [compiled(mine, stamp), *run_on(op, language, architecture, files)]
            cells.append("; ".join(text for text in texts if text) or "not built")
        table.append((f"`{op}`", f"`{kernel}`", language, on_the_cpu(op, language) or "no", *cells))
    columns = ("op", "kernel", "language", "on the CPU", *(f"sm_{architecture}" for architecture in ARCHITECTURES))
    return markdown(columns, table)


def text(files: Mapping[str, Results]) -> str:
    """The page."""
    rows = report.load()["rows"]
    gates = markdown(report.COLUMNS, (report.cells(row) for row in report.order(rows)))
    return "\n".join(
        [_HEAD, *_runs(files), "", *_status(rows, files), "", _NOTE, *floors_page.text(), "", _GATES, *gates, ""]
    )
