"""A panel as an inline SVG, whose colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from examples.r1.reporting.figures import number
from examples.r1.reporting.panels import Band, Curve, Panel, is_smoothed, limits, log_ticks, smooth

COLORS = 6  # classes c0 ... c5 of the page's style
_WIDTH, _HEIGHT = 560.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 8.0, 8.0, 22.0
_NAMES = 22.0  # above the panel, two lines for the stages' names


class _Frame:
    """From values to places in the picture."""

    def __init__(self, panel: Panel, along: Sequence[Band]) -> None:
        self.log = panel.log
        self.multiples = log_ticks(panel) if panel.log else ()
        self.low, self.high = limits(panel)
        self.start, self.end = along[0].start, along[-1].end

    def x(self, value: float) -> float:
        return _LEFT + (value - self.start) / (self.end - self.start) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high, found = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, found = math.log(low), math.log(high), math.log(found)
        return _HEIGHT - _BOTTOM - (found - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        """Round values, three to six of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [base * 10.0**decade for decade in decades for base in self.multiples]
        else:
            scale = 10.0 ** math.floor(math.log10(self.high - self.low))
            step = next(size * scale for size in (0.2, 0.5, 1.0, 2.0) if (self.high - self.low) / (size * scale) <= 6)
            found = [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in found if self.low <= value <= self.high]


def figure(panel: Panel, along: Sequence[Band], *, named: bool = True) -> str:
    """The panel with its title and legend."""
    legend = "".join(_entry(curve) for curve in panel.curves if len(panel.curves) > 1)
    unit = f' <span class="unit">{escape(panel.unit)}</span>' if panel.unit else ""
    caption = f"<strong>{escape(panel.title)}</strong>{unit}"
    return (
        f'<figure class="chart"><figcaption>{caption}{f"<ul>{legend}</ul>" if legend else ""}</figcaption>\n'
        f"{svg(panel, along, named=named)}\n</figure>"
    )


def _entry(curve: Curve) -> str:
    """The curve in the legend."""
    shape = "swatch dot" if curve.points else "swatch"
    return f'<li><span class="{shape} b{curve.color % COLORS}"></span>{escape(curve.label)}</li>'


def svg(panel: Panel, along: Sequence[Band], *, named: bool = True) -> str:
    frame = _Frame(panel, along)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT + _NAMES * named:g}" role="img" aria-label="{escape(panel.title)}">',
        f'<g transform="translate(0 {_NAMES * named:g})">',
        *_bands(frame, along, named),
        *_grid(frame),
    ]
    if panel.aim is not None:
        parts.append(_line(frame, [(frame.start, panel.aim), (frame.end, panel.aim)], "aim"))
        parts.append(
            f'<text class="side" x="{_LEFT + 52:g}" y="{frame.y(panel.aim) + 12:.1f}">aim {panel.aim:g}</text>'
        )
    for curve in panel.curves:
        parts += _curve(frame, curve)
    return "\n".join([*parts, "</g></svg>"])


def _bands(frame: _Frame, along: Sequence[Band], named: bool) -> list[str]:
    """Every other stage shaded, its name above, its own count of steps below."""
    parts = []
    bottom = _HEIGHT - _BOTTOM
    for index, band in enumerate(along):
        left, right = frame.x(band.start), frame.x(band.end)
        shade = "band" if index % 2 == 0 and len(along) > 1 else "noband"
        parts.append(
            f'<rect class="{shade}" x="{left:.1f}" y="{_TOP:g}" width="{right - left:.1f}" '
            f'height="{bottom - _TOP:g}"><title>{escape(band.label)}</title></rect>'
        )
        if named:
            warned = " warned" if band.warning else ""
            lines = band.label.split(" ", 1)
            for line, text in enumerate(lines):
                y = 2 - 12 * (len(lines) - 1 - line)
                parts.append(f'<text class="stage{warned}" x="{(left + right) / 2:.1f}" y="{y}">{escape(text)}</text>')
        parts += [
            f'<text class="tick" x="{frame.x(x):.1f}" y="{bottom + 14:g}">{label}</text>' for x, label in band.ticks
        ]
    return parts


def _grid(frame: _Frame) -> list[str]:
    parts = []
    for value in frame.ticks():
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}"/>')
        parts.append(f'<text class="tick side" x="{_LEFT - 6:g}" y="{y + 3.5:.1f}">{value:.6g}</text>')
    return parts


def _curve(frame: _Frame, curve: Curve) -> list[str]:
    color = f"c{curve.color % COLORS}"
    parts = []
    for piece in curve.pieces:
        if is_smoothed(curve):
            parts.append(_line(frame, piece, f"faint {color}"))
            parts.append(_line(frame, smooth(piece), color, curve.label))
        else:
            parts.append(_line(frame, piece, f"{'thin ' if curve.points else ''}{color}", curve.label))
        if curve.points or len(piece) == 1:
            parts += [
                f'<circle class="b{curve.color % COLORS}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6">'
                f"<title>{escape(curve.label)}: {number(y)}</title></circle>"
                for x, y in piece
            ]
    return parts


def _line(frame: _Frame, piece: Sequence[tuple[float, float]], style: str, label: str = "") -> str:
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in piece)
    title = f"<title>{escape(label)}</title>" if label else ""
    return f'<path class="{style}" d="M{path}">{title}</path>'
