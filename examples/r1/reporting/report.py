"""What a run shows at its end: tables on the console, `results.json`, `curves.png`, and a page if it was asked for."""

from __future__ import annotations

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.machine import describe
from examples.r1.reporting import curves, html_report, ppo_table
from examples.r1.reporting.stage_figures import full_title, sections, summary
from examples.r1.results import PipelineResult, StageResult
from examples.r1.saving.storage import save_json


def publish(result: PipelineResult, console: Console) -> None:
    """Writes the files of a run into its folder, the page where it was asked for, and prints the tables.

    What took minutes to find out comes first: figures and tables, before anything that may fail.
    """
    settings = result.settings
    save(result)
    show(result, console)
    picture = _save_curves(result)
    if settings.report is not None:
        html_report.save(settings.report, result)
    words = [f"figures, models and checkpoints are in {settings.output}", picture]
    if settings.report is not None:
        words.append(f"the page is {settings.report}")
    console.print("; ".join(word for word in words if word), highlight=False, markup=False, soft_wrap=True)


def save(result: PipelineResult) -> None:
    """Writes `results.json`, of which every other report can be made again."""
    result.machine = {**describe(result.settings.device), **result.machine}
    save_json(result.settings.output / "results.json", result.as_json())


def _save_curves(result: PipelineResult) -> str:
    """Draws curves.png and says so, or why not."""
    path = result.settings.output / "curves.png"
    try:
        if curves.save_curves(path, result.stages):
            return "curves are in curves.png"
    except ModuleNotFoundError as error:
        return f"no curves.png: {error}"
    path.unlink(missing_ok=True)  # of an earlier run
    return ""


def show(result: PipelineResult, console: Console) -> None:
    """The tables of the stages, as many side by side as there is room for, and the summary."""
    tables = [stage_table(stage) for stage in result.stages if sections(stage)]
    if tables:
        console.print(Columns(tables, padding=(1, 4)))
    console.print(summary_table(result))
    if result.ppo is not None:
        console.print(ppo_table.table(result.ppo))
        console.print(ppo_table.facts(result.ppo), highlight=False)


def stage_table(stage: StageResult) -> Table:
    """One stage: before and after on held-out prompts, the first and the last steps, the stage as a whole."""
    table = Table(title=escape(full_title(stage)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("start", justify="right", no_wrap=True)
    table.add_column("end", justify="right", no_wrap=True)
    for section in sections(stage):
        table.add_section()
        table.add_row(Text(section.title, style="italic dim"), "", "")
        for row in section.rows:
            table.add_row(Text(row.label), row.start, row.end)
    return table


def summary_table(result: PipelineResult) -> Table:
    """What the run came to."""
    table = Table(title="GRPO with grpo_kernels", title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("")
    for line in summary(result):
        style = {None: "", True: "green", False: "bold red"}[line.holds]
        table.add_row(Text(line.label), Text(line.value, style=style))
    return table
