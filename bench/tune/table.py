"""The module of the package that holds the tables: its text, made from measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu_check.settings import ROOT
from bench.tune import choose
from bench.tune.candidates import Choice, known
from grpo_kernels.grouped_gemm import _fp8_table_triton as current

PATH = ROOT / "grpo_kernels" / "grouped_gemm" / "_fp8_table_triton.py"
SCHEMA = 1

_TEXT = '''\
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


class Tables(NamedTuple):
    """What the module holds."""

    product: dict[tuple[int, str], tuple[int, int, int, bool, int, int]]
    wgrad: dict[tuple[int, str], tuple[int, int, bool]]
    measured: dict[tuple[str, int, str], str]


def shipped() -> Tables:
    return Tables(dict(current.PRODUCT), dict(current.WGRAD), dict(current.MEASURED))


def _value(value: object) -> str:
    """As the formatter writes it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _lines(entries: dict[Any, Any]) -> str:
    if not entries:
        return "{}"
    return "{\n" + "".join(f"    {_value(key)}: {_value(entries[key])},\n" for key in sorted(entries)) + "}"


def text(tables: Tables) -> str:
    """The module. The same tables give the same text."""
    return _TEXT.format(**{name: _lines(entries) for name, entries in tables._asdict().items()})


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
    if not results["family"]:
        raise ValueError(f"{path} was not measured on a GPU: it proves nothing about one")
    return results


def applied(tables: Tables, results: dict[str, Any]) -> Tables:
    """The tables with the winners of every group that was measured to the end. Winners are found anew: what the file
    says of them is for readers.

    Raises:
        ValueError: a winner is none of the configurations that this version tries.
    """
    tables = Tables(*(dict(entries) for entries in tables))
    machine = results["measured_on"]
    for group in results["groups"]:
        found = choose.winner(group)
        if found is None:
            continue
        op, size, family = group["op"], group["size"], results["family"]
        choice = Choice(*found["choice"])
        if not known(op, family, size, choice):
            raise ValueError(f"{op} {size} on sm_{family}: {tuple(choice)} is no configuration that this version tries")
        if op == "product":
            tables.product[family, size] = tuple(choice)
        else:
            tables.wgrad[family, size] = choice[1:4]
        words = f"{machine['device']}, Triton {machine['triton']}, the best of {found['compared']}"
        tables.measured[op, family, size] = words
    return tables


def apply(paths: list[Path], target: Path = PATH) -> str:
    """Rewrites the module from one file after the other; returns its text."""
    tables = shipped()
    for path in paths:
        tables = applied(tables, load(path))
    found = text(tables)
    target.write_text(found)
    return found
