"""What the curves show, before anything draws it: all stages of a run along one axis, each equally wide."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from examples.r1.choices import TASKS
from examples.r1.reporting.figures import finite, task_title, tasks_of
from examples.r1.reporting.judge_watch import judge_is_hacked
from examples.r1.reporting.stage_figures import is_rl, short_title
from examples.r1.results import Record, StageResult

SMOOTH = 9  # steps of the running mean that is drawn over the single steps
_SHORTEST = 2 * SMOOTH  # fewer steps are drawn as they are
_DEPTHS = range(1, 10)


class Curve(NamedTuple):
    """Points of one figure, in pieces: a curve ends with its stage, and where the figure is missing."""

    label: str
    color: int  # in the palette
    pieces: list[list[tuple[float, float]]]
    points: bool = False  # an evaluation now and then, rather than a figure of every step

    @property
    def values(self) -> list[float]:
        return [y for piece in self.pieces for _, y in piece]


class Band(NamedTuple):
    """A stage on the common axis, from `start` to `start + 1`."""

    label: str
    start: float
    ticks: list[tuple[float, str]]  # places on the axis, and the steps of the stage there
    warning: str = ""

    @property
    def end(self) -> float:
        return self.start + 1


class Panel(NamedTuple):
    """One picture: what it shows, its unit, its curves."""

    title: str
    unit: str
    curves: list[Curve]
    share: bool = False  # of something: the axis goes from 0 to 1
    log: bool = False
    aim: float | None = None


def bands(stages: Iterable[StageResult]) -> list[Band]:
    """One after the other; a stage without steps is none."""
    return [
        Band(
            short_title(stage.name),
            start,
            [(start + step / length, f"{step:g}") for step in _round_steps(length)],
            "judge hacked" if judge_is_hacked(stage) else "",
        )
        for stage, start, length in _places(stages)
    ]


def panels(stages: Sequence[StageResult]) -> list[Panel]:
    """The panels that have something to show."""
    found = [
        Panel("Reward and judge", "", _from_steps(stages, [("reward", "reward"), ("judge's score", "judge")])),
        Panel("Accuracy", "right answers", _accuracy(stages), share=True, aim=min(info.aim for info in TASKS.values())),
        Panel("Loss where the model imitates", "nats a token", _losses(stages), log=True),
        Panel("KL to the reference", "nats a token", _from_steps(stages, [("KL", "kl")])),
        Panel("Entropy of the policy", "nats a token", _from_steps(stages, [("entropy", "entropy")])),
        Panel("Clipped tokens", "share", _clips(stages)),
        Panel(
            "Form, language, groups that teach",
            "share",
            _from_steps(stages, [("form", "format"), ("language", "language"), ("groups that teach", "informative")]),
            share=True,
        ),
        Panel("Busiest expert over the mean", "1 is even", _from_steps(stages, [("load", "expert_load")])),
        Panel("Drafts accepted", "share", _from_steps(stages, _accepted()), share=True),
    ]
    return [panel._replace(curves=kept) for panel in found if (kept := [c for c in panel.curves if c.values])]


def judge_panel(stage: StageResult, task: str) -> Panel:
    """What the judge said and what was true, of the samples of the steps and of the evaluations."""
    steps = _from_steps([stage], [("judge's score", "judge"), ("true accuracy", f"{task}/accuracy")])
    names = [("judge's score", f"{task}/judge"), ("true accuracy", _held_out_name(stage, task))]
    looks = _from_evaluations([stage], [(f"{label}, held-out prompts", name) for label, name in names])
    title = f"{task_title(task).capitalize()}: what the judge says and what is true"
    return Panel(title, "", [curve for curve in (*steps, *looks) if curve.values], share=True)


def smooth(piece: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean, centred, over fewer steps at the ends."""
    half = SMOOTH // 2
    means = []
    for index, (x, _) in enumerate(piece):
        reach = min(half, index, len(piece) - 1 - index)
        near = [y for _, y in piece[index - reach : index + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def is_smoothed(curve: Curve) -> bool:
    """Whether single steps are many enough to be drawn faintly, behind their running mean."""
    return not curve.points and max((len(piece) for piece in curve.pieces), default=0) >= _SHORTEST


def log_ticks(panel: Panel) -> tuple[int, ...]:
    """Which multiples of a power of ten are named: over many powers, themselves alone."""
    low, high = limits(panel)
    return (1, 2, 5) if high / low <= 300 else (1,)


def limits(panel: Panel) -> tuple[float, float]:
    """Lowest and highest value of the axis."""
    values = [value for curve in panel.curves for value in curve.values]
    if panel.share:
        return -0.03, 1.03
    if panel.log:
        positive = [value for value in values if value > 0] or [1.0]
        return min(positive) / 1.2, max(positive) * 1.2
    low, high = min(values, default=0.0), max(values, default=1.0)
    if 0 <= low < 0.5 * high:
        low = 0.0
    room = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    return (low if low == 0 else low - room), high + room


def _accuracy(stages: Sequence[StageResult]) -> list[Curve]:
    tasks = tasks_of(stages)
    words = {task: TASKS[task].short_title if task in TASKS else task_title(task) for task in tasks}
    looks = _from_evaluations(stages, [(f"{words[task]}, greedy", f"{task}/accuracy") for task in tasks])
    steps = _from_steps(stages, [(f"{words[task]}, samples", f"{task}/accuracy") for task in tasks])
    return [*looks, *steps]


def _losses(stages: Sequence[StageResult]) -> list[Curve]:
    rl = {stage.name for stage in stages if is_rl(stage)}
    steps = _from_steps(stages, [("training", "loss")], without=rl)
    looks = _from_evaluations(stages, [("held-out prompts", "validation_loss")])
    return [*steps, *(curve._replace(color=1) for curve in looks)]


def _clips(stages: Sequence[StageResult]) -> list[Curve]:
    names = [("both", "clip_fraction"), ("below", "clip_low_fraction"), ("above", "clip_high_fraction")]
    return _from_steps(stages, names)


def _accepted() -> list[tuple[str, str]]:
    return [(f"depth {depth}", f"acceptance_{depth}") for depth in _DEPTHS]


def _held_out_name(stage: StageResult, task: str) -> str:
    sampled = f"{task}/sampled_accuracy"
    return sampled if any(sampled in look for look in stage.evaluations) else f"{task}/accuracy"


def _from_steps(
    stages: Sequence[StageResult], names: Sequence[tuple[str, str]], without: Collection[str] = ()
) -> list[Curve]:
    """A curve for each (label, key of the records), over all stages but those named."""

    def steps(stage: StageResult) -> list[tuple[float, Record]]:
        return [] if stage.name in without else list(enumerate(stage.records, start=1))

    return _curves(stages, names, steps, points=False)


def _from_evaluations(stages: Sequence[StageResult], names: Sequence[tuple[str, str]]) -> list[Curve]:
    """A curve for each (label, key of the evaluations)."""

    def looks(stage: StageResult) -> list[tuple[float, Record]]:
        return [(finite(look.get("step")) or 0.0, look) for look in stage.evaluations]

    return _curves(stages, names, looks, points=True)


def _curves(
    stages: Sequence[StageResult],
    names: Sequence[tuple[str, str]],
    points_of: Callable[[StageResult], Sequence[tuple[float, Record]]],
    points: bool,
) -> list[Curve]:
    curves = []
    for color, (label, name) in enumerate(names):
        pieces: list[list[tuple[float, float]]] = []
        for stage, start, length in _places(stages):
            found = [(start + step / length, finite(record.get(name))) for step, record in points_of(stage)]
            pieces += _whole_pieces(found)
        curves.append(Curve(label, color, pieces, points))
    return curves


def _whole_pieces(found: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Neighbours that have a value."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in found:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _places(stages: Iterable[StageResult]) -> list[tuple[StageResult, float, float]]:
    """The stages that have steps, with their place on the axis and their length in steps."""
    lengths = [(stage, max(float(len(stage.records)), finite(stage.after.get("step")) or 0.0)) for stage in stages]
    long = [(stage, length) for stage, length in lengths if length > 0]
    return [(stage, float(place), length) for place, (stage, length) in enumerate(long)]


def _round_steps(length: float) -> list[float]:
    """Two to four round numbers of steps, away from the ends, where the neighbours' would stand."""
    scale = 10.0 ** math.floor(math.log10(length))
    between = next(size * scale for size in (0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0) if length / (size * scale) <= 4)
    if between < 1:
        between = 1.0
    return [between * k for k in range(1, math.floor(length / between) + 1) if between * k <= 0.93 * length]
