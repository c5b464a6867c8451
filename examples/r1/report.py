"""What a run shows at its end: a table, a picture, and the numbers as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from examples.r1.checkpoint import comparable_settings, write_atomically
from examples.r1.pipeline import TaskResult
from examples.r1.settings import Settings
from examples.r1.stage import Record


def summarise(result: TaskResult) -> dict[str, Any]:
    """The figures of one task."""
    records = result.progress.records
    return {
        "parameters": result.parameters,
        "stages": {
            stage: {"steps": len(records[stage]), "before": evaluations[0], "after": evaluations[-1]}
            for stage, evaluations in result.progress.evaluations.items()
        },
        "sampled_tokens_per_second": _rate(records["grpo"], "sample_seconds"),
        "trained_tokens_per_second": _rate(records["grpo"], "train_seconds"),
        "loss_step": result.loss_step._asdict(),
    }


def as_json(results: Sequence[TaskResult], settings: Settings, seconds: float) -> dict[str, Any]:
    """Everything a run found out; what is not a measurement of time or memory repeats exactly for equal settings."""
    return {
        "settings": comparable_settings(settings),
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": seconds,
        "tasks": {result.task: summarise(result) for result in results},
        "curves": {
            result.task: {"records": result.progress.records, "evaluations": result.progress.evaluations}
            for result in results
        },
    }


def table(results: Sequence[TaskResult]) -> Table:
    """One column a task."""
    table = Table(title="GRPO with grpo_kernels: held-out accuracy, speed, and the loss step against eager PyTorch")
    table.add_column("")
    for result in results:
        table.add_column(f"{result.task}\n{result.parameters:,} parameters", justify="right")
    summaries = [summarise(result) for result in results]
    rows: list[tuple[str, list[str]]] = []
    for key, title in (("accuracy", "greedy accuracy"), ("sampled_accuracy", "sampled accuracy")):
        for stage in summaries[0]["stages"] if summaries else ():
            changes = [summary["stages"][stage] for summary in summaries]
            rows.append((f"{title}, {stage}", [f"{c['before'][key]:.3f} -> {c['after'][key]:.3f}" for c in changes]))
    rows.append(("tokens/s, sampling", [f"{s['sampled_tokens_per_second']:,.0f}" for s in summaries]))
    rows.append(("tokens/s, training", [f"{s['trained_tokens_per_second']:,.0f}" for s in summaries]))
    rows += _routing_rows(results)
    steps = [result.loss_step for result in results]
    rows.append(("loss step, hidden states", [f"{s.rows} x {s.columns} x {s.width}" for s in steps]))
    rows.append(("  time, this package", [f"{s.seconds * 1e3:.2f} ms" for s in steps]))
    rows.append(("  time, eager", [_versus(s.eager_seconds * 1e3, "ms", s.eager_seconds, s.seconds) for s in steps]))
    rows.append(("  extra memory, this package", [f"{s.peak_bytes / 2**20:.2f} MiB" for s in steps]))
    rows.append(
        (
            "  extra memory, eager",
            [_versus(s.eager_peak_bytes / 2**20, "MiB", s.eager_peak_bytes, s.peak_bytes) for s in steps],
        )
    )
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def _routing_rows(results: Sequence[TaskResult]) -> list[tuple[str, list[str]]]:
    """How even the experts' loads were and how far routes moved, in the last ten GRPO steps of an MoE model."""
    lasts = [result.progress.records["grpo"][-10:] for result in results]
    if not lasts or not all(last and "expert_load" in last[0] for last in lasts):
        return []

    def means(name: str, form: str) -> list[str]:
        values = [[record[name] for record in last if name in record] for last in lasts]
        return [form.format(sum(found) / len(found)) if found else "-" for found in values]

    return [
        ("busiest expert / mean", means("expert_load", "{:.2f}")),
        ("routes changed, old log-probs", means("rollout_mismatch", "{:.2%}")),
        ("routes changed, second update", means("route_mismatch", "{:.2%}")),
    ]


def save_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1))


def save_curves(path: Path, results: Sequence[TaskResult]) -> None:
    """Two pictures a task: the rewards of the samples while training, and the accuracy on held-out prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 2, figsize=(11, 3.4 * len(results)), squeeze=False)
    for (rewards, accuracy), result in zip(axes, results, strict=True):
        records = result.progress.records["grpo"]
        for name in ("reward", "accuracy", "language", "format"):
            rewards.plot([record[name] for record in records], label=name, linewidth=1.2)
        rewards.set(title=f"{result.task}: samples of each GRPO step", xlabel="GRPO step")
        rewards.legend(fontsize=8)
        start = 0.0
        for colour, (stage, evaluations) in enumerate(result.progress.evaluations.items()):
            steps = [start + evaluation["step"] for evaluation in evaluations]
            for name, style in (("accuracy", "-o"), ("sampled_accuracy", "--")):
                values = [evaluation[name] for evaluation in evaluations]
                label = f"{stage}: {name.replace('_', ' ')}"
                accuracy.plot(steps, values, style, color=f"C{colour}", markersize=3, label=label)
            start = steps[-1]
        accuracy.set(title=f"{result.task}: held-out prompts", xlabel="step", ylim=(-0.03, 1.03))
        accuracy.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _rate(records: Sequence[Record], seconds: str) -> float:
    spent = sum(record[seconds] for record in records)
    return sum(record["tokens"] for record in records) / spent if spent else 0.0


def _versus(value: float, unit: str, eager: float, ours: float) -> str:
    ratio = f" ({eager / ours:.1f}x)" if ours > 0 else ""
    return f"{value:.2f} {unit}{ratio}"
