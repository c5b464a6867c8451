"""Pictures of a file of results: speed-ups over eager PyTorch, and how near the machine's limits the ops are."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from PIL import Image, PngImagePlugin  # what matplotlib itself writes pictures with

from .case import Record
from .report import Results

# Distinguishable with every common colour blindness, and in grey.
COLORS = {"ours": "#0072B2", "torch.compile": "#E69F00", "fastest peer": "#B0B0B0", "eager": "#444444"}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
}
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_WIDTH = 9.0  # inches, as are the heights below
_HEAD = 0.6
_PANEL = 0.55
_CASE = 0.42
_LINE = 0.3
_LABEL = 54  # characters
_ROOFLINE = 3.6
_DOTS = 150  # an inch
_COLORS = 64  # of the lines, and what smooths their edges


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes bench_speedup.png and bench_roofline.png, each if there is something to show; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in (("bench_speedup.png", speedup_figure), ("bench_roofline.png", roofline_figure)):
        with mpl.rc_context(STYLE):
            figure = make(results)
            if figure is not None:
                save(figure, folder / name)
                written.append(folder / name)
    return written


def save(figure: Figure, path: Path, fields: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes a PNG of few colours, as pictures of lines and bars have, with these text fields; closes the figure."""
    info = PngImagePlugin.PngInfo()
    for name, value in fields.items():
        info.add_text(name, value)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DOTS)
    plt.close(figure)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(_COLORS, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=info)


def _device_cases(results: Results) -> list[Record]:
    return [record for record in results["cases"] if record.get("clock", "device") == "device"]


def _panels(title: str, results: Results, heights: Sequence[float], share_x: bool) -> tuple[Figure, list[Axes]]:
    """Axes below each other, of these heights, under a title that names the machine."""
    height = _HEAD + sum(heights)
    figure, grid = plt.subplots(
        len(heights), 1, sharex=share_x, squeeze=False, figsize=(_WIDTH, height), height_ratios=heights
    )
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - _HEAD / height))
    info = results["machine"]
    figure.text(0.01, 1 - 0.12 / height, title, fontsize=11, weight="bold", va="top")
    where = f"{info['device']}, PyTorch {info['torch']}, {info['threads']} CPU threads"
    figure.text(0.01, 1 - 0.34 / height, where, color="#555555", va="top")
    return figure, list(grid[:, 0])


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """One labelled line for each of these, from the top; long labels are wrapped, or nothing is left for the bars."""
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, _LABEL) for label in labels])
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _best(record: Record, kind: str, field: str) -> tuple[str, float] | None:
    """The provider of this kind with the highest value, and the value."""
    found = [(row[field], name) for name, row in record["rows"].items() if row["kind"] == kind and field in row]
    return (max(found)[1], max(found)[0]) if found else None


def speedup_figure(results: Results) -> Figure | None:
    """Bars from 1, which is eager PyTorch, on a logarithmic axis; one panel an op. Host costs are left out."""
    by_op: dict[str, list[Record]] = {}
    for record in _device_cases(results):
        if _best(record, "ours", "speedup"):
            by_op.setdefault(record["op"], []).append(record)
    if not by_op:
        return None
    heights = [_PANEL + _CASE * len(records) for records in by_op.values()]
    figure, grid = _panels("Speed against eager PyTorch", results, heights, share_x=True)
    for axes, (op, records) in zip(grid, by_op.items(), strict=True):
        _speedup_panel(axes, op, records)
    grid[-1].set_xlabel("times as fast as eager PyTorch (median, logarithmic)")
    grid[-1].set_xlim(right=grid[-1].get_xlim()[1] * 1.5)  # room for the labels of the longest bars
    _legend(figure, [Patch(color=COLORS[label], label=label) for label in ("ours", "torch.compile", "fastest peer")])
    return figure


def _speedup_panel(axes: Axes, op: str, records: list[Record]) -> None:
    kinds = (("ours", "ours"), ("compile", "torch.compile"), ("peer", "fastest peer"))
    thickness = 0.27
    for position, record in enumerate(records):
        bars = [(label, best) for kind, label in kinds if (best := _best(record, kind, "speedup"))]
        for index, (label, (provider, value)) in enumerate(bars):
            y = position + (index - (len(bars) - 1) / 2) * thickness
            axes.barh(y, value - 1, left=1, height=0.9 * thickness, color=COLORS[label])
            if label == "ours":
                text = f"{value:.1f}x{provider.removeprefix('ours').replace(',', '')}"
                axes.annotate(text, (max(value, 1), y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_title(op, loc="left")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=COLORS["eager"], linewidth=1)
    _rows(axes, [record["case"] for record in records])


def roofline_figure(results: Results) -> Figure | None:
    """Bandwidth as percent of a copy for cases that only move bytes, and a roofline of those that compute."""
    records = _device_cases(results)
    moving = [r for r in records if "operations" not in r and _best(r, "ours", "percent_of_copy")]
    computing = [r for r in records if "bytes_moved" in r and _best(r, "ours", "teraflops")]
    panels = [(_bandwidth_panel, moving, _PANEL + _LINE * len(moving)), (_roofline_panel, computing, _ROOFLINE)]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    heights = [height for _, _, height in panels]
    figure, grid = _panels("Against the measured limits of the machine", results, heights, share_x=False)
    for axes, (panel, chosen, _) in zip(grid, panels, strict=True):
        panel(axes, chosen, results["machine"])
    _legend(figure, [Line2D([], [], linestyle="", marker="o", label=kind, **_mark(kind)) for kind in ("ours", "eager")])
    return figure


def _mark(kind: str) -> dict[str, Any]:
    face = COLORS[kind] if kind == "ours" else "white"
    return {"markeredgecolor": COLORS[kind], "markerfacecolor": face, "markersize": 6, "zorder": 4}


def _bandwidth_panel(axes: Axes, records: list[Record], machine: dict[str, Any]) -> None:
    for y, record in enumerate(records):
        points = {kind: best[1] for kind in ("eager", "ours") if (best := _best(record, kind, "percent_of_copy"))}
        axes.plot(list(points.values()), [y] * len(points), color="#CCCCCC", linewidth=2)
        for kind, value in points.items():
            axes.plot([value], [y], "o", **_mark(kind))
    axes.axvline(100, color=COLORS["eager"], linewidth=1, linestyle="--")
    axes.set_title("achieved bandwidth", loc="left")
    axes.set_xlabel(f"percent of a large copy ({machine['copy_gigabytes_per_second']:.4g} GB/s, read plus written)")
    axes.set_xlim(left=0)
    _rows(axes, [f"{record['op']} {record['case']}" for record in records])


def _roofline_panel(axes: Axes, records: list[Record], machine: dict[str, Any]) -> None:
    slope = machine["copy_gigabytes_per_second"] * 1e-3  # TFLOP/s at one operation a byte
    roofs = machine["matmul_teraflops"]
    intensities = [record["operations"] / record["bytes_moved"] for record in records]
    corners = [rate / slope for rate in roofs.values()]
    left, right = min(intensities + corners) / 4, max(intensities + corners) * 4
    for name, rate in roofs.items():
        axes.plot([left, rate / slope, right], [left * slope, rate, rate], color=COLORS["eager"], linewidth=1)
        text = f"{name} matrix product, {rate:.4g} TFLOP/s"
        axes.annotate(text, (right, rate), (0, 3), ha="right", fontsize=8, textcoords="offset points")
    text = f"copy, {machine['copy_gigabytes_per_second']:.4g} GB/s"
    axes.annotate(text, (left, left * slope), (14, 4), fontsize=8, textcoords="offset points")
    for record, x in zip(records, intensities, strict=True):
        for kind in ("eager", "ours"):
            if best := _best(record, kind, "teraflops"):
                axes.plot([x], [best[1]], "o", **_mark(kind))
        side, shift = ("left", 6) if x * x < left * right else ("right", -6)  # towards the middle
        label, point = f"{record['op']} {record['case']}", (x, (_best(record, "ours", "teraflops") or ("", 0.0))[1])
        place = {"ha": side, "va": "top", "fontsize": 8, "textcoords": "offset points"}
        axes.annotate(label, point, (shift, -3), bbox={"color": "white", "pad": 0.5}, **place)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("roofline", loc="left")
    axes.set_xlabel("operations per byte moved")
    axes.set_ylabel("TFLOP/s")
    axes.grid()
