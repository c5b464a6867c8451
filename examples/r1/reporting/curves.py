"""The curves of a run as a picture, `curves.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.r1.reporting.panels import (
    SMOOTH,
    Band,
    Curve,
    Panel,
    bands,
    is_smoothed,
    limits,
    log_ticks,
    panels,
    smooth,
)
from examples.r1.results import StageResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for every eye
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
_WARNING = "#B00020"
_COLUMNS = 2
_WIDTH = 7.2  # inches, of a panel
_HEIGHT = 2.5


def save_curves(path: Path, stages: Sequence[StageResult]) -> bool:
    """Writes the picture; False, and nothing written, where there is nothing to show."""
    found, along = panels(stages), bands(stages)
    if not found or not along:
        return False
    import matplotlib  # here: training needs no picture

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        figure = draw(found, along)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
    return True


def draw(found: Sequence[Panel], along: Sequence[Band]) -> Figure:
    """Panels side by side over one axis of steps; the bands are named at the top."""
    from matplotlib import pyplot

    columns = min(_COLUMNS, len(found))
    rows = -(-len(found) // columns)
    size = (_WIDTH * columns, _HEIGHT * rows + 0.7)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    places = list(grid.flat)
    for index, (axes, panel) in enumerate(zip(places, found, strict=False)):
        _shade(axes, along, named=index < columns)
        _draw_panel(axes, panel, along)
        if index + columns >= len(found):
            axes.set_xlabel("steps of each stage")
    for axes in places[len(found) :]:
        axes.set_visible(False)
    if any(is_smoothed(curve) for panel in found for curve in panel.curves):
        figure.supxlabel(f"faint: single steps; strong: their running mean over {SMOOTH}", fontsize=8, color="#666666")
    return figure


def _shade(axes: Axes, along: Sequence[Band], named: bool) -> None:
    """Every other stage on grey, with its own count of steps below; names stand above the panel."""
    for index, band in enumerate(along):
        if index % 2 == 0 and len(along) > 1:
            axes.axvspan(band.start, band.end, color="#F1F3F5", zorder=0, linewidth=0)
        if index > 0:
            axes.axvline(band.start, color="#AAAAAA", linewidth=0.8, zorder=1)
        if named:
            axes.annotate(
                f"{band.label}\n{band.warning}" if band.warning else band.label,
                (band.start + 0.5, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 22),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8.5,
                color=_WARNING if band.warning else "#333333",
                weight="bold",
            )
    ticks = [tick for band in along for tick in band.ticks]  # stages of a single step have none
    axes.set_xticks([place for place, _ in ticks], [label for _, label in ticks])


def _draw_panel(axes: Axes, panel: Panel, along: Sequence[Band]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for curve in panel.curves:
        _draw_curve(axes, curve)
    if panel.aim is not None:
        axes.axhline(panel.aim, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"aim {panel.aim:g}",
            (along[0].start, panel.aim),
            xytext=(4, -3),
            textcoords="offset points",
            va="top",
            fontsize=7.5,
            color="#666666",
        )
    axes.set_title(panel.title, loc="left", fontsize=10, weight="bold")
    axes.set_ylabel(panel.unit)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=log_ticks(panel)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(*limits(panel))
    axes.set_xlim(along[0].start, along[-1].end)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=6,
            frameon=False,
            fontsize=7.5,
            borderaxespad=0.2,
            handlelength=1.6,
            columnspacing=1.0,
        )


def _draw_curve(axes: Axes, curve: Curve) -> None:
    color = PALETTE[curve.color % len(PALETTE)]
    label: str | None = curve.label
    for piece in curve.pieces:
        xs, ys = zip(*piece, strict=True)
        if curve.points:
            axes.plot(xs, ys, "o-", color=color, markersize=4, linewidth=1.2, markeredgecolor="white", label=label)
        elif is_smoothed(curve):
            axes.plot(xs, ys, color=color, alpha=0.28, linewidth=0.8)
            axes.plot(*zip(*smooth(piece), strict=True), color=color, linewidth=1.8, label=label)
        else:
            axes.plot(xs, ys, color=color, linewidth=1.4, marker="." if len(piece) < 3 else None, label=label)
        label = None  # one entry in the legend for all pieces
