"""From samples to what the table shows: medians, rates, percentages of the limits, and whether targets are met."""

from __future__ import annotations

import statistics
from typing import Any

from .case import Case, Record
from .limits import Limits, dtype_name
from .target import Row, Target


def rounded(value: float) -> float:
    """Four digits: more are noise, and hard to read in a diff."""
    return float(f"{value:.4g}")


def summarise(record: Record) -> None:
    """Replaces the samples of every row by their median, minimum and interquartile range."""
    for row in record["rows"].values():
        if "seconds" not in row:
            continue
        seconds = row.pop("seconds")
        row["median_us"] = rounded(statistics.median(seconds) * 1e6)
        row["min_us"] = rounded(min(seconds) * 1e6)
        if len(seconds) > 1:
            low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
            row["iqr_us"] = rounded((high - low) * 1e6)
        row["rounds"] = len(seconds)


def finish(record: Record, case: Case, limits: Limits) -> None:
    """Adds rates and verdicts to a summarised record; may be called again when the limits have risen."""
    baseline = record["rows"][case.eager.name].get("median_us")
    for row in record["rows"].values():
        if "median_us" in row:
            if baseline is not None:
                row["speedup"] = rounded(baseline / row["median_us"])
            if row["kind"] != "part":
                _add_rates(row, case, limits)
        if "extra_bytes" in row and case.memory:
            row["extra_memory_ratio"] = round(row["extra_bytes"] / case.memory, 3)
    record["targets"] = [_judge(target, record["rows"]) for target in case.targets]


def _add_rates(row: Row, case: Case, limits: Limits) -> None:
    seconds = row["median_us"] * 1e-6
    if case.bytes_moved:
        rate = case.bytes_moved / seconds
        row["gigabytes_per_second"] = rounded(rate * 1e-9)
        row["percent_of_copy"] = rounded(100 * rate / limits.copy)
    if case.operations and case.matmul_dtype:
        rate = case.operations / seconds
        row["teraflops"] = rounded(rate * 1e-12)
        row["percent_of_matmul"] = rounded(100 * rate / limits.matmul[dtype_name(case.matmul_dtype)])
        if case.beside_bfloat16:
            row["percent_of_bfloat16_matmul"] = rounded(100 * rate / limits.matmul["bfloat16"])


def _judge(target: Target, rows: dict[str, Row]) -> dict[str, Any]:
    value = target.value(rows)
    return {
        "target": target.text,
        "limit": target.limit,
        "at_least": target.at_least,
        "measured": None if value is None else rounded(value),
        "met": None if value is None else target.met(value),
    }
