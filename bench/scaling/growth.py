"""How a figure grows with a size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def series(points: Sequence[dict[str, Any]], provider: str, field: str) -> tuple[list[int], list[float]]:
    """Sizes and values of the points that have one above 0."""
    found = [(point["size"], point["rows"].get(provider, {}).get(field, 0)) for point in points]
    kept = [(size, value) for size, value in found if value > 0]
    return [size for size, _ in kept], [value for _, value in kept]


def slope(points: Sequence[dict[str, Any]], provider: str, field: str) -> float | None:
    """The exponent of the growth over the upper half of the sizes: of a line through the logarithms. None where fewer
    than two of them have a figure.
    """
    sizes, values = series(points[-max(2, math.ceil(len(points) / 2)) :], provider, field)
    if len(sizes) < 2:
        return None
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope
