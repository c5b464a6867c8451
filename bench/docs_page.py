"""docs/benchmarks.md: the prose of bench/docs_benchmarks.md, with figures of records and the harness's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import (
    bench_token_log_probs,
    clock,
    compare,
    docs_benchmarks,
    docs_peers,
    docs_reasons,
    docs_scaling,
    docs_targets,
    linear_definitions,
    moe_definitions,
    run,
    targets,
)
from grpo_kernels.grpo_loss import metrics

TEMPLATE = Path(__file__).with_name("docs_benchmarks.md")

Results = dict[str, Any]


def _settings() -> dict[str, str]:
    """The harness's own numbers."""
    moe_rows, moe_experts = moe_definitions.CHECKED_ROWS, moe_definitions.CHECKED_EXPERTS
    found = {
        "seconds": run.FULL.seconds,
        "sets": clock.MAXIMUM_SETS,
        "slower": compare.DEFAULT_LIMIT,
        "checked_tokens": bench_token_log_probs.CHECKED_ROWS,
        "linear_rows": linear_definitions.CHECKED_ROWS,
        "linear_columns": linear_definitions.CHECKED_COLUMNS,
        "moe_rows": moe_rows,
        "moe_experts": moe_experts,
        "moe_wide": moe_rows * moe_experts,
        "metrics": len(metrics.NAMES),
        "target_rounds": targets.ROUNDS,
    }
    return {name: f"{value:g}" for name, value in found.items()}


def _reasons(missed: list[tuple[str, str, str]]) -> str:
    return "\n".join(["Why targets are missed:", "", *docs_reasons.lines(missed)]) if missed else ""


def render(template: str, values: Mapping[str, str]) -> str:
    """The template with each {{name}} replaced.

    Raises:
        ValueError: a name in it has no value, or a value has no place.
    """
    names = set(re.findall(r"\{\{(\w+)\}\}", template))
    if names != set(values):
        raise ValueError(f"the template and the values differ in {', '.join(sorted(names ^ set(values)))}")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match.group(1)], template)
    return re.sub(r"\n{3,}", "\n\n", page)


def text(records: Mapping[str, Mapping[str, Results]]) -> str:
    """The page from the files of results of each kind."""
    benchmarks, judged = records["benchmarks"], records["targets"]
    values = _settings() | {
        "results": docs_benchmarks.text(benchmarks),
        "targets": docs_targets.text(judged),
        "reasons": _reasons(docs_targets.missed(judged) + docs_benchmarks.missed(benchmarks)),
        "scaling": docs_scaling.text(records["scaling"]),
        "peers": docs_peers.text(benchmarks),
        "versions": docs_peers.versions(benchmarks),
    }
    return render(TEMPLATE.read_text(), values)
