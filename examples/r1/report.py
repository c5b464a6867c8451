"""What a run shows at its end: a table, a picture, and the numbers as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from examples.r1 import draft_report
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
        **draft_report.summary(result),
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
    rows += _validation_rows(summaries)
    rows.append(("tokens/s, sampling", [f"{s['sampled_tokens_per_second']:,.0f}" for s in summaries]))
    rows.append(("tokens/s, training", [f"{s['trained_tokens_per_second']:,.0f}" for s in summaries]))
    rows += _routing_rows(results)
    rows += draft_report.rows(results)
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


def _validation_rows(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The cold start's loss on held-out problems; a run that goes on from an old checkpoint has none."""
    stages = [summary["stages"]["sft"] for summary in summaries if "sft" in summary["stages"]]
    if not stages or not all("validation_loss" in stage["before"] for stage in stages):
        return []
    cells = [f"{stage['before']['validation_loss']:.3f} -> {stage['after']['validation_loss']:.3f}" for stage in stages]
    return [("validation loss, sft", cells)]


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
    """Pictures of a task: the cold start's loss, the rewards of GRPO's samples, the accuracy on held-out prompts.

    And what drafts were worth, if the models draft.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4 if any(draft_report.depths(result) for result in results) else 3
    figure, axes = pyplot.subplots(len(results), columns, figsize=(16 * columns / 3, 3.4 * len(results)), squeeze=False)
    for (loss, rewards, accuracy, *more), result in zip(axes, results, strict=True):
        _plot_loss(loss, result)
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
        for drafts in more:
            draft_report.plot(drafts, result)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_loss(axes: Any, result: TaskResult) -> None:
    """The loss of the cold start: of every step's batch, and on held-out problems now and then."""
    progress = result.progress
    axes.plot([record["loss"] for record in progress.records.get("sft", ())], label="training", linewidth=1.2)
    looks = [look for look in progress.evaluations.get("sft", ()) if "validation_loss" in look]
    losses = [look["validation_loss"] for look in looks]
    axes.plot([look["step"] for look in looks], losses, "-o", markersize=3, label="validation")
    axes.set(title=f"{result.task}: loss of the cold start", xlabel="step", ylabel="nats a token", yscale="log")
    axes.legend(fontsize=8)


def _rate(records: Sequence[Record], seconds: str) -> float:
    spent = sum(record[seconds] for record in records)
    return sum(record["tokens"] for record in records) / spent if spent else 0.0


def _versus(value: float, unit: str, eager: float, ours: float) -> str:
    ratio = f" ({eager / ours:.1f}x)" if ours > 0 else ""
    return f"{value:.2f} {unit}{ratio}"
