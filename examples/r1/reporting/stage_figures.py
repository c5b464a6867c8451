"""The figures of a stage and of a whole run as rows of words, which the console and the page both show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from examples.r1.choices import STAGES, TASKS
from examples.r1.reporting.figures import (
    NOTHING,
    count,
    duration,
    ends,
    finite,
    number,
    percent,
    rate,
    size,
    task_title,
    tasks_of,
    times,
    total,
    worded,
)
from examples.r1.reporting.judge_watch import sentence, verdict
from examples.r1.results import PipelineResult, StageResult
from examples.r1.settings import Settings

_DEPTHS = range(1, 10)  # of drafts, more than anybody asks for


class Row(NamedTuple):
    """A figure at the start of a stage and at its end; of the stage as a whole, at its end alone."""

    label: str
    start: str
    end: str


class Section(NamedTuple):
    """Rows that are measured alike."""

    title: str
    rows: list[Row]


class Line(NamedTuple):
    """A line of the closing summary; `holds` is None where nothing was aimed at."""

    label: str
    value: str
    holds: bool | None = None


def short_title(stage: str) -> str:
    return STAGES[stage].short_title if stage in STAGES else stage.replace("_", " ")


def full_title(stage: StageResult) -> str:
    """The stage's own title, as a heading."""
    title = " ".join(stage.title.split()) or short_title(stage.name)
    return f"{title[:1].upper()}{title[1:]}"


def is_rl(stage: StageResult) -> bool:
    return any("reward" in record for record in stage.records)


def sections(stage: StageResult) -> list[Section]:
    """What is known of a stage; sections and rows without a figure are left out."""
    found = [
        Section("held-out prompts", _evaluation_rows(stage)),
        Section("samples of the steps" if is_rl(stage) else "batches of the steps", _record_rows(stage)),
        Section("the whole stage", _whole_rows(stage)),
    ]
    return [section for section in found if section.rows]


def _evaluation_rows(stage: StageResult) -> list[Row]:
    wanted: list[tuple[str, str, Callable[[Any], str]]] = []
    for task in tasks_of([stage]):
        title = task_title(task)
        wanted += [
            (f"{title}, greedy", f"{task}/accuracy", number),
            (f"{title}, sampled", f"{task}/sampled_accuracy", number),
            (f"{title}, form", f"{task}/format", number),
            (f"{title}, language", f"{task}/language", number),
            (f"{title}, judge's score", f"{task}/judge", number),
        ]
    wanted += [
        ("judge's score, right answers", "judge/right", number),
        ("judge's score, wrong answers", "judge/wrong", number),
        ("right answer of a pair preferred", "judge/agreement", number),
        ("validation loss, nats a token", "validation_loss", number),
        ("tokens a pass, with drafts", "tokens_per_pass", lambda value: number(value, 2)),
    ]
    before, after = stage.before, stage.after
    rows = [(label, before.get(name), after.get(name), form) for label, name, form in wanted]
    return [Row(label, form(a), form(b)) for label, a, b, form in rows if a is not None or b is not None]


def _record_rows(stage: StageResult) -> list[Row]:
    """Means of the first and the last steps."""
    wanted: list[tuple[str, str, Callable[[Any], str]]] = [("reward", "reward", number), ("loss", "loss", number)]
    wanted += [(f"{task_title(task)}, right", f"{task}/accuracy", number) for task in tasks_of([stage])]
    wanted += [
        ("form", "format", number),
        ("language", "language", number),
        ("judge's score", "judge", number),
        ("KL to the reference, nats", "kl", number),
        ("entropy, nats", "entropy", number),
        ("largest ratio", "ratio_max", lambda value: number(value, 2)),
        ("clipped tokens", "clip_fraction", percent),
        ("  below", "clip_low_fraction", percent),
        ("  above", "clip_high_fraction", percent),
        ("gradient norm", "grad_norm", number),
        ("groups that teach", "informative", percent),
        ("rounds of sampling", "rounds", lambda value: number(value, 2)),
        ("balance loss", "balance_loss", number),
        ("busiest expert over the mean", "expert_load", lambda value: number(value, 2)),
        ("routes changed, old log-probs", "rollout_mismatch", percent),
        ("routes changed, last update", "route_mismatch", percent),
    ]
    for depth in _DEPTHS:
        wanted += [
            (f"loss, {depth} further ahead", f"mtp_loss_{depth}", number),
            (f"accuracy, {depth} further ahead", f"mtp_accuracy_{depth}", number),
            (f"drafts accepted, depth {depth}", f"acceptance_{depth}", number),
        ]
    wanted.append(("tokens a pass, with drafts", "tokens_per_pass", lambda value: number(value, 2)))
    seen = {name for record in stage.records for name in record}
    return [Row(label, *(form(value) for value in ends(stage, name))) for label, name, form in wanted if name in seen]


def _whole_rows(stage: StageResult) -> list[Row]:
    records = stage.records
    rows = [Row("steps", "", count(stage.steps)), *_fact_rows(stage)]
    if is_rl(stage):
        found = [
            ("tokens/s, sampling", count(rate(records, "sample_seconds"))),
            ("tokens/s, training", count(rate(records, "train_seconds"))),
            ("sampling", duration(total(records, "sample_seconds"))),
            ("training", duration(total(records, "train_seconds"))),
        ]
    else:
        found = [("tokens/s, training", count(rate(records, "seconds")))]
    rows += [Row(label, "", value) for label, value in found if value != NOTHING]
    return [*rows, Row("time, evaluations and all", "", duration(stage.seconds))] if stage.seconds else rows


def _fact_rows(stage: StageResult) -> list[Row]:
    """Shares by their name or between 0 and 1; prompts of which a sample was kept; else counts, or times."""
    rows = []
    for name, value in stage.facts.items():
        task, _, words = name.rpartition("/")
        of = finite(stage.facts.get(f"{task}/prompts"))
        label = f"{task_title(task)}, {words.replace('_', ' ')}" if task else words.replace("_", " ")
        found = finite(value)
        if words == "prompts" and f"{task}/kept" in stage.facts:
            continue
        if words == "kept" and found is not None and of:
            label = f"{task_title(task)}, prompts kept"
            text = f"{count(found)} of {count(of)}, {percent(found / of)}"
        elif name.endswith("seconds"):
            text = duration(value)
        elif found is not None and (0 < abs(found) < 1 or words.endswith(("right", "share"))):
            text = percent(found)
        else:
            text = count(found) if found is None or found == round(found) else number(found)
        rows.append(Row(label, "", text))
    return rows


def summary(result: PipelineResult) -> list[Line]:
    """What the run came to: final accuracies against the aims, the judge, the comparisons that were made."""
    final = result.final
    lines = []
    for task, aim in ((name, info.aim) for name, info in TASKS.items()):
        accuracy = finite(final.get(f"{task}/accuracy"))
        if accuracy is not None:
            found = f"{accuracy:.3f} greedy, {number(final.get(f'{task}/sampled_accuracy'))} sampled; aim {aim:.2f}"
            lines.append(Line(task_title(task), found, met(accuracy, aim, result)))
    for stage in result.stages:
        judged = verdict(stage)
        if judged is not None:
            lines.append(Line(f"judge, {short_title(stage.name)}", sentence(judged), not judged.hacked))
    lines += [Line(label, value) for label, value in comparisons(result)]
    settings = result.settings
    lines.append(Line("model", f"{result.parameters:,} parameters, {settings.model}, seed {settings.seed}"))
    lines.append(Line("time", duration(result.seconds)))
    return lines


def met(accuracy: float, aim: float, result: PipelineResult) -> bool | None:
    """Whether an accuracy reaches its aim; None if it does not, after fewer steps than the recipe has."""
    usual = Settings()
    steps = [f"{name}_steps" for name in STAGES]
    whole = all(getattr(result.settings, name) >= getattr(usual, name) for name in steps)
    return True if accuracy >= aim else False if whole else None


_MEMORY = "  memory beyond its inputs"


def comparisons(result: PipelineResult) -> list[tuple[str, str]]:
    """The loss step against eager PyTorch, sampling with drafts against without."""
    lines = []
    for step in filter(None, (result.loss_step, result.large_loss_step)):
        shape = " x ".join(worded(step.get(name)) for name in ("rows", "columns", "width", "vocabulary"))
        kinds = ((f"loss step, {shape}", "seconds", duration), (_MEMORY, "peak_bytes", size))
        for label, name, form in kinds:
            own, eager = step.get(name), step.get(f"eager_{name}")
            against = f"; eager PyTorch {form(eager)} ({times(eager, own)})" if eager is not None else ""
            lines.append((label, f"{form(own)}{against}"))
        if step.get("note"):
            lines.append(("  beside eager PyTorch", str(step["note"])))
    speed = result.draft_speed
    if speed:
        own, without = speed.get("tokens_per_second"), speed.get("tokens_per_second_without")
        lines.append(
            ("sampling with drafts", f"{count(own)} tokens/s; without {count(without)} ({times(own, without)} as fast)")
        )
    return lines
