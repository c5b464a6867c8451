"""The picture of each op's page: time and memory of its first cases against eager PyTorch, from a machine's record.

A picture carries a stamp of the numbers that it shows, by which `python -m bench.docs` knows whether it is current.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from bench.docs_benchmarks import fastest
from bench.report import time_text

ROOT = Path(__file__).parents[1]
STAMP = "grpo_kernels record"  # the PNG's text field
_CASES = 5

Results = dict[str, Any]
Record = dict[str, Any]

# A page in docs/, and the ops of the record that belong there.
PAGES: dict[str, tuple[str, ...]] = {
    "fp8_quantize": ("fp8_quantize", "fp8_dequantize"),
    "group_advantages": ("group_advantages",),
    "grouped_gemm": ("grouped_gemm",),
    "grpo_loss": ("grpo_loss",),
    "linear_log_probs": ("linear_grpo_loss", "linear_token_log_probs", "linear_cross_entropy"),
    "moe_experts": ("moe_experts",),
    "moe_permute": ("moe_permute", "moe_unpermute", "build_permutation", "moe_permute_quantize"),
    "moe_router": ("moe_router",),
    "multi_token_prediction": ("mtp_linear_cross_entropy",),
    "speculative_sampling": ("verify_draft",),
    "token_log_probs": ("token_log_probs",),
}


@dataclass(frozen=True)
class Bar:
    """One provider in one case: its share of eager's number, and the number in words."""

    kind: str
    share: float
    text: str


@dataclass(frozen=True)
class Case:
    """One case: `memory` is empty where it was not measured."""

    label: str
    time: tuple[Bar, ...]
    memory: tuple[Bar, ...]


@dataclass(frozen=True)
class Shown:
    """What a picture shows, of the record `name`."""

    name: str
    machine: str
    cases: tuple[Case, ...]

    def stamp(self) -> str:
        numbers = [(case.label, *[(bar.kind, bar.text) for bar in case.time + case.memory]) for case in self.cases]
        return hashlib.sha256(json.dumps([self.machine, numbers]).encode()).hexdigest()[:16]


def size_text(mebibytes: float) -> str:
    return f"{mebibytes:.{1 if mebibytes < 10 else 0}f} MiB"


def _timed(record: Record) -> bool:
    rows = record["rows"]
    return record.get("clock", "device") == "device" and bool(fastest(rows, "ours") and fastest(rows, "eager"))


def _chosen(ops: tuple[str, ...], results: Results) -> list[Record]:
    """The first timed cases of these ops, in turn."""
    queues = [[r for r in results["cases"] if r["op"] == op and _timed(r)] for op in ops]
    return [record for turn in zip_longest(*queues) for record in turn if record][:_CASES]


def _case(record: Record) -> Case:
    found = {kind: fastest(record["rows"], kind) for kind in ("ours", "compile", "eager")}
    rows = {kind: pair[1] for kind, pair in found.items() if pair}
    ours, eager = rows["ours"], rows["eager"]
    time, memory = [], []
    for kind, row in rows.items():
        mark = "*" if "accuracy" in row else ""
        time.append(Bar(kind, row["median_us"] / eager["median_us"], time_text(row["median_us"]) + mark))
        if eager.get("extra_bytes") and "extra_bytes" in row and "extra_bytes" in ours:
            size = row["extra_bytes"] / 2**20
            memory.append(Bar(kind, row["extra_bytes"] / eager["extra_bytes"], size_text(size)))
    variant = (found["ours"] or ("ours",))[0].removeprefix("ours")
    return Case(f"{record['op']} {record['case']}{variant}", tuple(time), tuple(memory))


def shown(page: str, files: Mapping[str, Results]) -> Shown:
    """What the picture of a page shows: a GPU's record where one has cases of its ops, else the first that has.

    Raises:
        ValueError: no record has a timed case.
    """
    found = [(name, content, _chosen(PAGES[page], content)) for name, content in files.items()]
    found = sorted((entry for entry in found if entry[2]), key=lambda entry: not entry[1]["machine"].get("cuda"))
    if not found:
        raise ValueError(f"no record has a timed case of {', '.join(PAGES[page])}")
    name, content, records = found[0]
    info = content["machine"]
    machine = f"{info['device']}, PyTorch {info['torch'].partition('+')[0]}, {info['threads']} threads"
    return Shown(name, machine, tuple(map(_case, records)))


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def text(page: str, files: Mapping[str, Results]) -> str:
    """The picture with what it says in words, and the line that names the machine."""
    picture = shown(page, files)
    parts = [f"{_range([case.time[0].share for case in picture.cases])} of the time of eager PyTorch"]
    if memory := [case.memory[0].share for case in picture.cases if case.memory]:
        parts.append(f"{_range(memory)} of its memory")
    alt = f"Bars, case by case: ours takes {' and '.join(parts)}"
    of_memory = " and memory above the inputs" if memory else ""
    marked = any(bar.text.endswith("*") for case in picture.cases for bar in case.time)
    faults = " * misses the accuracy budget." if marked else ""
    words = (
        f"Time{of_memory} on {picture.machine}; medians, of `bench/results/{picture.name}`.{faults} "
        "[Benchmarks](benchmarks.md) has every case."
    )
    lines = textwrap.wrap(words, 120, break_on_hyphens=False, break_long_words=False)
    return "\n".join([f"![{alt}](images/op_{page}.png)", "", *lines])


def path_of(page: str) -> Path:
    return ROOT / "docs" / "images" / f"op_{page}.png"


def stale(page: str, files: Mapping[str, Results]) -> bool:
    """Whether a page's picture is missing, or shows other numbers than the record has."""
    path = path_of(page)
    if not path.is_file():
        return True
    with Image.open(path) as picture:
        return picture.info.get(STAMP) != shown(page, files).stamp()


def draw(page: str, files: Mapping[str, Results]) -> Path:
    """Writes the picture of a page; returns its path."""
    from bench.plot_ops import figure  # matplotlib: only where something is drawn

    figure(shown(page, files), path_of(page))
    return path_of(page)
