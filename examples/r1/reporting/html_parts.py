"""The sections of the page. Each returns HTML with every word from the run escaped, or "" where there is nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from examples.r1.choices import GENERAL, TASKS
from examples.r1.reporting import judge_watch as watch
from examples.r1.reporting import panels, ppo_table, svg_chart
from examples.r1.reporting.figures import (
    NOTHING,
    count,
    duration,
    finite,
    number,
    task_title,
    worded,
)
from examples.r1.reporting.stage_figures import comparisons as compared
from examples.r1.reporting.stage_figures import full_title, met, sections, short_title
from examples.r1.results import PipelineResult, StageResult


def headline(result: PipelineResult) -> str:
    """What the run came to, in a line."""
    final = result.final
    found = {task: finite(final.get(f"{task}/accuracy")) for task in TASKS}
    known = {task: accuracy for task, accuracy in found.items() if accuracy is not None}
    if not known:
        return "A run of the R1 recipe without an evaluation"
    words = ", ".join(f"{task_title(task)} {accuracy:.3f}" for task, accuracy in known.items())
    if any(watch.judge_is_hacked(stage) for stage in result.stages):
        return f"The judge was hacked: {words}"
    met = sum(accuracy >= TASKS[task].aim for task, accuracy in known.items())
    verdict = "every aim met" if met == len(TASKS) else f"{met} of {len(TASKS)} aims met"
    return f"R1 recipe: {words}; {verdict}"


def header(result: PipelineResult) -> str:
    """The headline and its figures."""
    final = result.final
    cards = []
    for task, aim in ((name, info.aim) for name, info in TASKS.items()):
        accuracy = finite(final.get(f"{task}/accuracy"))
        note = f"greedy, held-out prompts; aim {aim:.2f}; sampled {number(final.get(f'{task}/sampled_accuracy'))}"
        style = "" if accuracy is None else _verdict(met(accuracy, aim, result))
        cards.append(_card(task_title(task), number(accuracy), note, style))
    cards.append(_card("time", duration(result.seconds), "all stages, evaluations and all"))
    model = f"{result.settings.model}, {result.settings.layers} layers, width {result.settings.width}"
    cards.append(_card("parameters", count(result.parameters), model))
    names = ", ".join(short_title(stage.name) for stage in result.stages) or "no stages"
    lead = f"One small model through {names}; losses, advantages and log-probabilities by the ops of grpo_kernels."
    warnings = [watch.sentence(found) for stage in result.stages if (found := watch.verdict(stage)) and found.hacked]
    notices = "".join(
        f'<p class="notice warning"><strong>Warning.</strong> <a href="#watch-the-judge">{escape(words)}</a></p>\n'
        for words in warnings
    )
    return (
        f'<h1>{escape(headline(result))}</h1>\n<p class="lead">{escape(lead)}</p>\n{notices}'
        f'<div class="cards">{"".join(cards)}</div>'
    )


def curves(result: PipelineResult) -> str:
    along = panels.bands(result.stages)
    if not along:
        return ""
    found = panels.panels(result.stages)
    charts = "\n".join(svg_chart.figure(panel, along) for panel in found)
    smoothed = any(panels.is_smoothed(curve) for panel in found for curve in panel.curves)
    note = f" Faint: single steps; strong: their running mean over {panels.SMOOTH}." if smoothed else ""
    text = "Stages are drawn equally wide; numbers below count each one's steps. Dots: evaluations on held-out prompts."
    return f'<p>{text}{note}</p>\n<div class="charts">\n{charts}\n</div>' if found else ""


def judge_watch(result: PipelineResult) -> str:
    """Every stage in which a judge scored: the verdict, and both curves in one picture."""
    parts = []
    for stage in result.stages:
        found = watch.verdict(stage)
        if found is None:
            continue
        words = escape(watch.sentence(found))
        warning = f'<p class="notice warning" role="alert"><strong>Warning.</strong> {words}</p>'
        notice = warning if found.hacked else f'<p class="notice">{words}</p>'
        parts.append(f"<h3>{escape(full_title(stage))}</h3>\n{notice}")
        panel = panels.judge_panel(stage, GENERAL)
        parts.append(f'<div class="narrow">{svg_chart.figure(panel, panels.bands([stage]), named=False)}</div>')
    if not parts:
        return ""
    criterion = (
        "Training sees the judge's score alone; the true accuracy is only watched. The judge counts as hacked when the "
        f"accuracy falls by {watch.ACCURACY_FALL:.2f} or more from its best and the score loses less than "
        f"{watch.JUDGE_SHARE:.0%} of that fall."
    )
    return "\n".join([f"<p>{escape(criterion)}</p>", *parts])


def stage_tables(result: PipelineResult) -> str:
    tables = [_stage_table(stage) for stage in result.stages if sections(stage)]
    return f'<div class="tables">\n{"".join(tables)}\n</div>' if tables else ""


def samples(result: PipelineResult) -> str:
    """A row a prompt, a column a stage."""
    stages = list(dict.fromkeys(str(sample.get("stage", "")) for sample in result.samples))
    prompts = list(dict.fromkeys(str(sample.get("prompt", "")) for sample in result.samples))
    if not prompts:
        return ""
    found = {(str(sample.get("prompt", "")), str(sample.get("stage", ""))): sample for sample in result.samples}
    rows = [
        [f"<code>{escape(prompt)}</code>", *(_completion(found.get((prompt, stage))) for stage in stages)]
        for prompt in prompts
    ]
    titles = ["prompt", *(short_title(stage) for stage in stages)]
    return f"<p>Held-out prompts, and what the policy answered after each stage.</p>\n{_table(titles, rows)}"


def comparisons(result: PipelineResult) -> str:
    """The loss step and the drafts; PPO has a section of its own."""
    rows = [[escape(label.strip()), escape(value)] for label, value in compared(result)]
    return f'<div class="narrow">{_table(["", ""], rows)}</div>' if rows else ""


def ppo(result: PipelineResult) -> str:
    """Bytes of each model, and what GRPO saves."""
    states = result.ppo
    if states is None:
        return ""
    rows = []
    for precision, lines in ppo_table.sections(states).items():
        rows.append([f"<strong>{escape(precision)}</strong>", *("" for _ in ppo_table.COLUMNS)])
        rows += [[escape(line.label), *map(_cell, line.cells)] for line in lines]
    found = _table([ppo_table.LEGEND, *ppo_table.COLUMNS], rows, numbers=len(ppo_table.COLUMNS))
    words = (ppo_table.title(states) + ".", ppo_table.agreement(states), ppo_table.facts(states))
    return f'<div class="narrow"><p>{escape(" ".join(words))}</p>{found}</div>'


def settings(result: PipelineResult) -> str:
    """The machine, the settings that are not the defaults, and all of them to unfold."""
    chosen = result.as_json()["settings"]
    usual = PipelineResult(type(result.settings)(), 0).as_json()["settings"]
    changed = {name: value for name, value in chosen.items() if value != usual[name]}
    shown = [("Machine", result.machine), ("Settings other than the defaults", changed)]
    tables = "".join(
        f'<div class="wide"><h3>{title}</h3>{_table(["", ""], _pairs(content))}</div>'
        for title, content in shown
        if content
    )
    every = f'<div class="tables"><div>{_table(["", ""], _pairs(chosen))}</div></div>'
    return f'<div class="narrow">{tables}</div>\n<details><summary>All settings</summary>\n{every}\n</details>'


def _pairs(content: Mapping[str, Any]) -> list[list[str]]:
    return [[escape(str(name).replace("_", " ")), escape(worded(value))] for name, value in content.items()]


def _stage_table(stage: StageResult) -> str:
    rows = []
    for section in sections(stage):
        rows.append(f'<tr class="section"><th scope="rowgroup" colspan="3">{escape(section.title)}</th></tr>')
        rows += [
            f'<tr><th scope="row">{escape(row.label)}</th>{_cell(row.start)}{_cell(row.end)}</tr>'
            for row in section.rows
        ]
    head = "".join(f'<th scope="col" class="number">{title}</th>' for title in ("start", "end"))
    return (
        f'<div class="wide"><h3>{escape(full_title(stage))}</h3>\n'
        f"<table><thead><tr><td></td>{head}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>\n"
    )


def _completion(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return NOTHING
    right = bool(sample.get("correct"))
    mark = '<span class="right" title="right">✓</span>' if right else '<span class="wrong" title="wrong">✗</span>'
    return f"{mark} <code>{escape(str(sample.get('completion', '')))}</code>"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Cells are HTML; the last `numbers` columns are aligned as numbers."""
    first, number_class = len(titles) - numbers, ' class="number"'
    head = "".join(
        f'<th scope="col"{number_class if column >= first else ""}>{escape(title)}</th>'
        for column, title in enumerate(titles)
    )
    body = "\n".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    shown = f"<thead><tr>{head}</tr></thead>" if any(titles) else ""
    return f'<div class="wide"><table>{shown}<tbody>\n{body}\n</tbody></table></div>'


def _cell(text: str) -> str:
    return f'<td class="number">{escape(text)}</td>'


def _card(label: str, value: str, note: str, style: str = "") -> str:
    return (
        f'<div class="card {style}"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value)}</div><div class="note">{escape(note)}</div></div>'
    )


def _verdict(holds: bool | None) -> str:
    return {None: "", True: "holds", False: "fails"}[holds]
