"""What the design promises of a case: a number, and where to find it in the case's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Rows = Mapping[str, Row]
Value = Callable[[Rows], float | None]

ALLOCATION = "allocation alone"


@dataclass(frozen=True)
class Target:
    """A number that the design promises, or without a limit one that it wants reported. `value` finds it in the rows of
    the case, None if it is not there.
    """

    text: str
    limit: float | None
    value: Value
    at_least: bool = True

    def met(self, value: float) -> bool | None:
        """Whether the promise is kept; None where there is none."""
        if self.limit is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit


def figure(field: str, provider: str = "ours") -> Value:
    """A figure of one provider."""
    return lambda rows: rows[provider].get(field)


def ratio(numerator: str, denominator: str, field: str = "median_us") -> Value:
    """The figure of one provider in proportion to another's."""

    def value(rows: Rows) -> float | None:
        above, below = rows[numerator].get(field), rows[denominator].get(field)
        return above / below if above is not None and below else None

    return value


def speedup(limit: float) -> Target:
    """How many times as fast as eager PyTorch."""
    return Target(f">= {limit:g}x eager", limit, figure("speedup"))


def copy_bandwidth(percent: float) -> Target:
    """Bytes that have to move, a second, against those of a copy on the same machine."""
    return Target(f">= {percent:g} % of copy bandwidth", percent, figure("percent_of_copy"))


def device_time(microseconds: float) -> Target:
    """The time of a GPU alone."""
    return Target(f"<= {microseconds:g} us on the device", microseconds, figure("median_us"), at_least=False)


def host_cost(device: str, native: bool = True) -> Target:
    """What a call may cost the host above the provider ALLOCATION; Triton's launcher is slower than the native one."""
    limit = 10.0 if native or device == "cpu" else 25.0

    def above(rows: Rows) -> float | None:
        ours, least = rows["ours"].get("median_us"), rows[ALLOCATION].get("median_us")
        return None if ours is None or least is None else ours - least

    return Target(f"<= {limit:g} us above autograd.Function and allocation", limit, above, at_least=False)
