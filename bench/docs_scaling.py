"""The sweeps of docs/benchmarks.md: how time and memory grow, and how ours compare at the ends."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.docs_benchmarks import markdown
from bench.report import time_text
from bench.scaling import plot
from bench.scaling.growth import series, slope

Results = dict[str, Any]
Sweep = dict[str, Any]
Point = dict[str, Any]

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def _exponent(points: list[Point], provider: str, field: str) -> str:
    found = slope(points, provider, field)
    return "" if found is None else f"{found:.2f}"


def _ratio(point: Point, field: str) -> str:
    """Eager PyTorch's figure in proportion to ours."""
    eager, ours = (point["rows"].get(name, {}).get(field) for name in ("eager", "ours"))
    return f"{eager / ours:.1f}x" if eager and ours else ""


def _row(sweep: Sweep) -> list[str]:
    timed = [point for point in sweep["points"] if "median_us" in point["rows"].get("ours", {})]
    points = timed or sweep["points"]  # of two sizes at the ends both figures
    first, last = points[0], points[-1]
    _, times = series(points, "ours", "median_us")
    return [
        f"`{sweep['op']}`: {sweep['what']}; {sweep['fixed']}",
        f"{first['size']} to {last['size']}",
        f"{time_text(times[0])} to {time_text(times[-1])}" if times else "not timed",
        *(_exponent(points, name, "median_us") for name in ("ours", "eager")),
        " to ".join(text for text in (_ratio(first, "median_us"), _ratio(last, "median_us")) if text),
        *(_exponent(points, name, "extra_bytes") for name in ("ours", "eager")),
        _ratio(last, "extra_bytes"),
    ]


_COLUMNS = (
    "along", "sizes", "ours", "time grows as", "eager's", "eager / ours, first to last", "memory grows as", "eager's",
    "memory, eager / ours, last",
)  # fmt: skip


def _section(name: str, results: Results) -> list[str]:
    machine = results["machine"]
    words = (
        f"PyTorch {machine['torch']}, {machine['threads']} threads, load average {machine['load_average']}, "
        f"{results['seconds']} s in all. `bench/results/{name}` has every point."
    )
    return [
        f"### Growth on {machine['device']}",
        "",
        *textwrap.wrap(words, 120, break_on_hyphens=False),
        "",
        *markdown(_COLUMNS, (_row(sweep) for sweep in results["sweeps"])),
        "",
    ]


def _pictures() -> list[str]:
    """Those that have been drawn."""
    found = []
    for name, title, _ in plot.FIGURES:
        if (IMAGES / plot.file_name(name)).is_file():
            found += [f"![{title}: time and peak memory on logarithmic axes](images/{plot.file_name(name)})", ""]
    return found


def text(files: Mapping[str, Results]) -> str:
    """A table for each machine, and the pictures."""
    if not files:
        return "No machine has been measured yet."
    lines = [line for name, results in files.items() for line in _section(name, results)]
    return "\n".join([*lines, *_pictures()]).strip()
