"""Which candidate an entry of a table should name, by what was measured."""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]

WORTH = 1.02
"""How much faster than the default a candidate must be, at least: less may be noise. The default is timed against
itself, too, and what it differs from 1 there is noise for certain."""


def _gain(lines: list[Record]) -> float | None:
    """The geometric mean over the problems of how much faster than the default it is; None where one lacks its time."""
    if not all(line.get("held") and "microseconds" in line for line in lines):
        return None
    return math.exp(sum(math.log(line["default_microseconds"] / line["microseconds"]) for line in lines) / len(lines))


def winner(group: Record) -> Record | None:
    """The fastest candidate of those that gave what they have to for every problem of the group, or the default; None
    where something was not measured.

    Returns:
        its choice, its gain over the default, and how many candidates were compared.
    """
    problems = group["problems"]
    if not group["complete"] or not problems or any("error" in problem for problem in problems):
        return None
    rows = list(zip(*(problem["candidates"] for problem in problems), strict=True))
    gains = [_gain(list(lines)) for lines in rows]
    if not gains or gains[0] is None:
        return None
    noise = max(WORTH, gains[0], 1 / gains[0])
    # Of equal ones the first: the order of candidates is fixed.
    others = [(gain, index) for index, gain in enumerate(gains) if index and gain is not None]
    gain, index = max(others, key=lambda other: other[0], default=(1.0, 0))
    if gain <= noise:
        gain, index = 1.0, 0
    return {
        "choice": rows[index][0]["choice"],
        "gain": round(gain, 4),
        "compared": sum(gain is not None for gain in gains),
    }


def problems_of(group: Record) -> list[str]:
    """What a reader has to know: candidates that failed, gave other bits or were not exact enough."""
    found = []
    for problem in group["problems"]:
        if "error" in problem:
            found.append(f"{problem['problem']}: {problem['error']}")
        for line in problem["candidates"]:
            choice = tuple(line["choice"])
            if "error" in line:
                found.append(f"{problem['problem']}, {choice}: {line['error']}")
            elif line.get("held") is False:
                found.append(
                    f"{problem['problem']}, {choice}: {line['why']}, by {line['difference']:.1e} of the largest"
                )
    return found


def default_failed(group: Record) -> bool:
    """Whether what is shipped does not run, or gives other bits the second time, or is not exact."""
    firsts = [problem["candidates"][0] for problem in group["problems"]]
    return any("error" in p for p in group["problems"]) or any(
        "error" in line or line.get("held") is False for line in firsts
    )
