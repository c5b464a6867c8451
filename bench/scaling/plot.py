"""Pictures of the sweeps: time, and peak memory where it was measured, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.plot import COLORS, STYLE, save
from bench.scaling import rank_definitions
from bench.scaling.growth import series, slope

Sweep = dict[str, Any]

# A picture's name, its title, and the ops in it.
FIGURES = (
    ("token_log_probs", "Log-probs of chosen tokens", ("token_log_probs",)),
    ("linear_grpo_loss", "The loss straight from hidden states", ("linear_grpo_loss",)),
    ("losses", "The loss, and group statistics", ("grpo_loss", "group_advantages")),
    ("routing", "Routing and moving tokens to experts", ("moe_router", "build_permutation", "moe_permute")),
    ("moe_experts", "A layer of experts, router included", ("moe_experts",)),
    ("ranks", "Over ranks", (rank_definitions.HEAD, rank_definitions.DISPATCH)),
)

_LINES = {"ours": "ours", "compile": "torch.compile", "eager": "eager"}
_MARKERS = {"ours": "o", "eager": "s", "compile": "^"}
_PANEL_WIDTH, _PANEL_HEIGHT, _HEAD = 3.7, 2.5, 0.62  # inches
_WIDEST = 3  # panels beside each other
_MEGABYTE = 2**20
_SMALLEST = 0.05 * _MEGABYTE  # below, the resident set says nothing


def file_name(name: str) -> str:
    return f"scaling_{name}.png"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes a picture for each of `FIGURES` that the record has something for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, title, ops in FIGURES:
        sweeps = [sweep for sweep in results["sweeps"] if sweep["op"] in ops]
        if sweeps:
            with mpl.rc_context(STYLE):
                save(figure(sweeps, title, results["machine"]), folder / file_name(name))
            written.append(folder / file_name(name))
    return written


def _has_memory(sweep: Sweep) -> bool:
    return any("extra_bytes" in row for point in sweep["points"] for row in point["rows"].values())


def figure(sweeps: Sequence[Sweep], title: str, machine: dict[str, Any]) -> Figure:
    """A panel of time for each sweep, and under it one of memory where there are figures."""
    with_memory = any(_has_memory(sweep) for sweep in sweeps)
    columns = len(sweeps) if len(sweeps) <= _WIDEST else 2
    bands = [sweeps[start : start + columns] for start in range(0, len(sweeps), columns)]
    rows = len(bands) * (1 + with_memory)
    height = _HEAD + _PANEL_HEIGHT * rows
    made, grid = plt.subplots(rows, columns, squeeze=False, figsize=(_PANEL_WIDTH * columns, height))
    made.set_layout_engine("constrained", rect=(0, 0, 1, 1 - _HEAD / height), hspace=0.06, wspace=0.04)
    for band, chosen in enumerate(bands):
        for column in range(columns):
            top = grid[band * (1 + with_memory)][column]
            below = grid[band * (1 + with_memory) + 1][column] if with_memory else None
            if column >= len(chosen):
                top.set_visible(False)
                continue
            _panel(top, chosen[column], "median_us", titled=True)
            if below is not None and _has_memory(chosen[column]):
                _panel(below, chosen[column], "extra_bytes", titled=False)
            elif below is not None:
                below.set_visible(False)
    _head(made, sweeps, title, machine, height)
    return made


def _head(made: Figure, sweeps: Sequence[Sweep], title: str, machine: dict[str, Any], height: float) -> None:
    made.text(0.012, 1 - 0.12 / height, title, fontsize=12, weight="bold", va="top")
    where = f"{machine['device']}, PyTorch {machine['torch']}; numbers: slopes of the upper half; dotted: slope 1"
    made.text(0.012, 1 - 0.36 / height, where, color="#555555", va="top")
    kinds = {row["kind"] for sweep in sweeps for point in sweep["points"] for row in point["rows"].values()}
    second = {provider for sweep in sweeps for provider in _providers(sweep) if provider.startswith("ours,")}
    handles = [
        Line2D([], [], label=label, **_line(kind, False))
        for kind, label in (("ours", "ours"), ("compile", "torch.compile"), ("eager", "eager"))
        if kind in kinds
    ]
    handles[1:1] = [Line2D([], [], label=name, **_line("ours", True)) for name in sorted(second)]
    made.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, handlelength=1.8)


def _providers(sweep: Sweep) -> dict[str, str]:
    """Kinds by name, ours last, so that they lie on top."""
    found = {name: row["kind"] for point in sweep["points"] for name, row in point["rows"].items()}
    return dict(sorted(found.items(), key=lambda pair: (pair[1] == "ours", "," not in pair[0])))


def _line(kind: str, second: bool) -> dict[str, Any]:
    color = COLORS[_LINES[kind]]
    face = "white" if second else color
    style = {"color": color, "marker": _MARKERS[kind], "markersize": 4.5, "markerfacecolor": face}
    return style | {"linewidth": 1.6, "linestyle": (0, (4, 1.5)) if second else "-"}


def _panel(axes: Axes, sweep: Sweep, field: str, *, titled: bool) -> None:
    points, ends = sweep["points"], []
    scale, least = (1e-3, 0.0) if field == "median_us" else (1 / _MEGABYTE, _SMALLEST)
    for provider, kind in _providers(sweep).items():
        sizes, values = series(points, provider, field)
        kept = [(size, value) for size, value in zip(sizes, values, strict=True) if value >= least]
        if not kept:
            continue
        xs, ys = [size for size, _ in kept], [value * scale for _, value in kept]
        if provider == "ours":  # where it would have been in proportion to the size
            guide = [ys[-1] * size / xs[-1] for size in xs]
            axes.plot(xs, guide, color="#BBBBBB", linewidth=0.9, linestyle=":", zorder=1, scaley=False)
        axes.plot(xs, ys, zorder=4 if kind == "ours" else 3, **_line(kind, provider.startswith("ours,")))
        exponent = slope(points, provider, field)
        if exponent is not None and kept[-1][0] == points[-1]["size"]:
            ends.append((ys[-1], f"{exponent:.2f}".replace("-", "\u2212"), COLORS[_LINES[kind]]))
    _axes(axes, sweep, "time, ms" if field == "median_us" else "peak memory, MiB")
    _label_ends(axes, points[-1]["size"], ends)
    if titled:
        axes.set_title(sweep["op"], loc="left", pad=17)
        fixed = sweep["fixed"].removesuffix(", forward and backward")
        axes.annotate(
            fixed, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=7.5, color="#555555"
        )


def _label_ends(axes: Axes, size: int, ends: Sequence[tuple[float, str, str]]) -> None:
    """The slopes beside the lines, from below, none over another."""
    lowest = -1e9
    for value, text, color in sorted(ends):
        place = axes.transData.transform((size, value))[1] * 72 / axes.figure.dpi
        shift = max(place, lowest + 8.5) - place
        lowest = place + shift
        axes.annotate(
            text, (size, value), (6, shift), textcoords="offset points", va="center", fontsize=7.5, color=color,
            annotation_clip=False,
        )  # fmt: skip


def _short(value: float, _: int | None = None) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.0f}M"
    return f"{value / 1e3:.0f}k" if value >= 10000 else f"{value:g}"


def _axes(axes: Axes, sweep: Sweep, quantity: str) -> None:
    sizes = [point["size"] for point in sweep["points"]]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(right=sizes[-1] * (sizes[-1] / sizes[0]) ** 0.12)  # room for the slopes
    axes.set_xlabel(sweep["what"] if len(sweep["axis"]) > 1 else f"{sweep['axis']}, {sweep['what']}")
    axes.set_ylabel(quantity)
    axes.grid()
