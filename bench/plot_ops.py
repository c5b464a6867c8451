"""Bars of time, and of memory where it was measured, for the page of an op."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from bench.docs_pictures import STAMP, Bar, Shown
from bench.plot import COLORS, STYLE, save

_LABELS = {"ours": "ours", "compile": "torch.compile", "eager": "eager"}
_WIDTH, _HEAD, _FOOT, _CASE = 9.0, 0.62, 0.5, 0.62  # inches
_LABEL = 30  # characters
_BAR = 0.26  # of a case
_LONGEST = 1.5  # of eager's: longer bars are cut off there


def _bars(axes: Axes, cases: list[tuple[Bar, ...]], title: str) -> None:
    """A group of bars for each case, from the top; every bar says its number."""
    for y, bars in enumerate(cases):
        for place, bar in enumerate(bars):
            height = y + (place - (len(bars) - 1) / 2) * _BAR
            length = min(bar.share, _LONGEST)
            axes.barh(height, length, _BAR * 0.86, color=COLORS[_LABELS[bar.kind]])
            words = bar.text if length == bar.share else f"{bar.text}, {bar.share:.1f} times eager's"
            inside = length < bar.share
            axes.annotate(
                words,
                (length, height),
                (-4 if inside else 4, 0),
                ha="right" if inside else "left",
                va="center",
                color="white" if inside and bar.kind != "compile" else "black",
                fontsize=7.5,
                textcoords="offset points",
            )
    axes.set_xlim(0, 1.65)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_title(title, loc="left", weight="normal")
    axes.set_xticks([0, 0.5, 1, 1.5])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def figure(picture: Shown, path: Path) -> None:
    """Draws the picture into a file: two panels, or one where no memory was measured."""
    panels = 2 if any(case.memory for case in picture.cases) else 1
    height = _HEAD + _FOOT + _CASE * len(picture.cases)
    with mpl.rc_context(STYLE):
        drawn, grid = plt.subplots(1, panels, sharey=True, squeeze=False, figsize=(_WIDTH, height))
        drawn.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.3 / height))
        _bars(grid[0, 0], [case.time for case in picture.cases], "time, of eager's")
        if panels == 2:
            _bars(grid[0, 1], [case.memory for case in picture.cases], "memory above the inputs, of eager's")
        labels = [textwrap.fill(case.label, _LABEL, break_long_words=False) for case in picture.cases]
        grid[0, 0].set_yticks(range(len(labels)), labels)
        kinds = [kind for kind in _LABELS if any(bar.kind == kind for case in picture.cases for bar in case.time)]
        handles = [Patch(color=COLORS[_LABELS[kind]], label=_LABELS[kind]) for kind in kinds]
        drawn.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False)
        drawn.text(0.01, 1 - 0.08 / height, picture.machine, color="#555555", va="top")
        save(drawn, path, {STAMP: picture.stamp()})
