"""The modules of the package that hold the tables: their text, made from measurements."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_check.settings import ROOT
from bench.tune import choose
from bench.tune.candidates import choice_of, key, known

SCHEMA = 2

_FP8 = '''\
"""Configurations of the kernels for FP8 operands. Written by `python -m bench.tune --apply`; do not edit by hand."""

from __future__ import annotations

PRODUCT: dict[tuple[int, str], tuple[int, int, int, bool, int, int]] = {product}
"""By architecture and rows of an expert: rows of a tile, warps, stages, specialised warps, programs on a \
multiprocessor,
MiB of rows in a group."""
WGRAD: dict[tuple[int, str], tuple[int, int, bool]] = {wgrad}
"""By architecture and rows of the accumulator: warps, stages, specialised warps."""
MEASURED: dict[tuple[str, int, str], str] = {measured}
"""By kernel and the key of its table: on what the entry was measured. Others were chosen without a GPU."""
'''
_TILES = '''\
"""Tuned configurations of [OP]. Written by `python -m bench.tune --apply`; do not edit by hand."""

from __future__ import annotations

Entry = tuple[int, int, int, int, int, int, int, int]

[FIRST]: dict[tuple[int, str], Entry] = {[first]}
[SECOND]: dict[tuple[int, str], Entry] = {[second]}
"""By architecture and class: block_m, block_n, block_k, panels, warps, stages, programs on a multiprocessor, MiB of
rows in a group. What has no entry takes the heuristics of _config_triton.py."""
MEASURED: dict[tuple[str, int, str], str] = {measured}
"""By kernel and the key of its table: on what the entry was measured."""
'''


def _tiles_text(op: str, **tables: str) -> str:
    (first, of_first), (second, of_second) = tables.items()
    words = {"OP": op, "FIRST": of_first, "SECOND": of_second, "first": first, "second": second}
    text = _TILES
    for name, value in words.items():
        text = text.replace(f"[{name}]", value)
    return text


@dataclass(frozen=True)
class Module:
    """A module of tables: where it is, its text, and the table of each op."""

    path: Path  # within the repository
    template: str
    tables: dict[str, str]

    def shipped(self) -> Any:
        return importlib.import_module(".".join(self.path.with_suffix("").parts))


_GROUPED = Path("grpo_kernels/grouped_gemm")
MODULES = (
    Module(_GROUPED / "_fp8_table_triton.py", _FP8, {"product": "PRODUCT", "wgrad": "WGRAD"}),
    Module(
        _GROUPED / "_table_triton.py",
        _tiles_text("grouped_gemm for 16 and 32 bits", grouped="GROUPED", grouped_wgrad="WGRAD"),
        {"grouped": "GROUPED", "grouped_wgrad": "WGRAD"},
    ),
    Module(
        Path("grpo_kernels/linear_log_probs/_table_triton.py"),
        _tiles_text("linear_log_probs", forward="FORWARD", dlogits="DLOGITS"),
        {"forward": "FORWARD", "dlogits": "DLOGITS"},
    ),
)


@dataclass
class Tables:
    """The entries of every op, and on what each of them was measured."""

    entries: dict[str, dict[tuple[int, str], tuple[int, ...]]]
    measured: dict[tuple[str, int, str], str]


def results_text(results: dict[str, Any]) -> str:
    """A file of measurements, one candidate a line."""
    groups = []
    for group in results["groups"]:
        parts = []
        for problem in group["problems"]:
            head = {name: value for name, value in problem.items() if name != "candidates"}
            rows = ",\n      ".join(json.dumps(line) for line in problem["candidates"])
            parts.append(f'    {json.dumps(head)[:-1]}, "candidates": [\n      {rows}]}}')
        head = {name: value for name, value in group.items() if name != "problems"}
        groups.append(f'  {json.dumps(head)[:-1]}, "problems": [\n' + ",\n".join(parts) + "]}")
    head = {name: value for name, value in results.items() if name != "groups"}
    return f'{json.dumps(head)[:-1]},\n "groups": [\n' + ",\n".join(groups) + "]}\n"


def shipped() -> Tables:
    """What the package has."""
    tables = Tables({}, {})
    for module in MODULES:
        current = module.shipped()
        tables.entries |= {op: dict(getattr(current, name)) for op, name in module.tables.items()}
        tables.measured |= current.MEASURED
    return tables


def _value(value: object) -> str:
    """As the formatter writes it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _lines(entries: dict[Any, Any]) -> str:
    if not entries:
        return "{}"
    return "{\n" + "".join(f"    {_value(key)}: {_value(entries[key])},\n" for key in sorted(entries)) + "}"


def text(module: Module, tables: Tables) -> str:
    """The module. The same tables give the same text."""
    measured = {key: words for key, words in tables.measured.items() if key[0] in module.tables}
    entries = {op: _lines(tables.entries[op]) for op in module.tables}
    return module.template.format(**entries, measured=_lines(measured))


def load(path: Path) -> dict[str, Any]:
    """Reads a file of measurements.

    Raises:
        ValueError: it is not one, or not of a GPU.
    """
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a file of measurements with schema {SCHEMA}")
    if not results["architecture"]:
        raise ValueError(f"{path} was not measured on a GPU: it proves nothing about one")
    return results


def applied(tables: Tables, results: dict[str, Any]) -> Tables:
    """The tables with the winners of every group that was measured to the end. Winners are found anew: what the file
    says of them is for readers.

    Raises:
        ValueError: a winner is none of the configurations that this version tries.
    """
    tables = Tables({op: dict(entries) for op, entries in tables.entries.items()}, dict(tables.measured))
    machine, architecture = results["measured_on"], results["architecture"]
    for group in results["groups"]:
        found = choose.winner(group)
        if found is None:
            continue
        op, size = group["op"], group["size"]
        choice = choice_of(op, found["choice"])
        if not known(op, architecture, size, choice):
            raise ValueError(
                f"{op} {size} on sm_{architecture}: {tuple(choice)} is no configuration that this version tries"
            )
        place = key(op, architecture), size
        tables.entries[op][place] = choice[1:4] if op == "wgrad" else tuple(choice)
        words = f"{machine['device']}, Triton {machine['triton']}, the best of {found['compared']}"
        tables.measured[(op, *place)] = words
    return tables


def apply(paths: list[Path], root: Path = ROOT) -> list[Path]:
    """Rewrites the modules below `root` from one file after the other; returns those that changed."""
    tables = shipped()
    for path in paths:
        tables = applied(tables, load(path))
    changed = []
    for module in MODULES:
        target, found = root / module.path, text(module, tables)
        if not target.exists() or target.read_text() != found:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(found)
            changed.append(module.path)
    return changed
