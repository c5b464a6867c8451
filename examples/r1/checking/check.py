"""`python -m examples.r1.checking.check`: does training work, for several seeds and models, and for the right reason?

Runs that must learn: a few seeds of the dense model; with the first of them the mixture of experts, drafts, and experts
in FP8. Controls that must fall short: rewards without meaning, imitation alone, and a judge that knows too little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from bench.machine import describe
from examples.r1 import demo
from examples.r1.checking.jobs import Job, Verdicts, add_options, run_all
from examples.r1.choices import REASONING, TASKS
from examples.r1.reporting.figures import task_title
from examples.r1.reporting.judge_watch import sentence, verdict
from examples.r1.results import PipelineResult, StageResult
from examples.r1.saving.storage import save_json
from examples.r1.settings import Settings

RISE = 0.1  # of the sampled accuracy by reasoning RL, at least
CONTROL_STEPS = 40
CONTROL_RISE = 0.0  # of the same with rewards that carry no signal, at most
FURTHER_STEPS = 520  # of imitation alone, after those of the cold start
MARGIN = 0.1  # of the greedy accuracy by which imitation alone stays below reasoning RL, at least

Results = Mapping[str, PipelineResult]


@dataclass(frozen=True)
class Check:
    """A run and what must hold for it."""

    name: str
    settings: Settings
    judge: Callable[[Results, str, Verdicts], None]
    other: str | None = None  # the run that it starts from, or is compared with


def learns(results: Results, name: str, verdicts: Verdicts) -> None:
    """Both tasks end where they should, and reasoning RL makes its own task better."""
    result = results[name]
    for task, aim in ((name, info.aim) for name, info in TASKS.items()):
        accuracy = result.final[f"{task}/accuracy"]
        verdicts.add(name, f"{task_title(task)}: greedy accuracy >= {aim}", f"{accuracy:.3f}", accuracy >= aim)
    before, after = _sampled(_stage(result, "reasoning_rl"))
    condition = f"reasoning RL: sampled accuracy rises by >= {RISE}"
    verdicts.add(name, condition, f"{before:.3f} -> {after:.3f}", after - before >= RISE)


def does_not_learn(results: Results, name: str, verdicts: Verdicts) -> None:
    """With shuffled rewards the samples must not get better: the advantages alone can have taught them."""
    before, after = _sampled(_stage(results[name], "reasoning_rl"))
    condition = f"reasoning RL: sampled accuracy rises by <= {CONTROL_RISE}"
    verdicts.add(name, condition, f"{before:.3f} -> {after:.3f}", after - before <= CONTROL_RISE)


def stays_below(results: Results, name: str, verdicts: Verdicts, other: str) -> None:
    """More imitation of the same demonstrations does not do what reasoning RL does."""
    key = f"{REASONING}/accuracy"
    found, reached = results[name].final[key], _stage(results[other], "reasoning_rl").after[key]
    condition = f"{task_title(REASONING)}: greedy accuracy <= that after reasoning RL - {MARGIN}"
    verdicts.add(name, condition, f"{found:.3f}, {reached:.3f}", found <= reached - MARGIN)


def is_hacked(results: Results, name: str, verdicts: Verdicts) -> None:
    """The judge's score holds while the true accuracy falls, and the run's report says so."""
    result = results[name]
    found = verdict(_stage(result, "diverse_rl"))
    condition = "diverse RL: the judge is hacked"
    words = "no judge scored" if found is None else sentence(found)
    verdicts.add(name, condition, words, found is not None and found.hacked)


def _stage(result: PipelineResult, name: str) -> StageResult:
    stage = result.stage(name)
    if stage is None:
        raise ValueError(f"the run has no stage {name}")
    return stage


def _sampled(stage: StageResult) -> tuple[float, float]:
    """Sampled accuracy of the reasoning task before and after a stage."""
    key = f"{REASONING}/sampled_accuracy"
    return stage.before[key], stage.after[key]


def all_checks(settings: Settings, seeds: Sequence[int]) -> list[Check]:
    """Every check; each writes into a folder of its own below the settings' output."""
    first = f"seed-{seeds[0]}"
    base = replace(settings, seed=seeds[0])
    moe = replace(base, model="moe")
    shuffled = replace(
        base, stages=("reasoning_rl",), reasoning_rl_steps=CONTROL_STEPS, shuffle_rewards=True, save_every=0
    )
    imitation = replace(
        base, stages=("cold_start",), cold_start_steps=base.cold_start_steps + FURTHER_STEPS, evaluate_every=110
    )
    weak = replace(base, stages=("reward_model", "diverse_rl"), weak_judge=True)
    found = [
        *(Check(f"seed-{seed}", replace(settings, seed=seed), learns) for seed in seeds),
        Check("moe", moe, learns),
        Check("mtp", replace(base, mtp=1), learns),
        Check("fp8", replace(moe, recipe="fp8_block128"), learns),
        Check("shuffled-rewards", shuffled, does_not_learn, first),
        Check("sft-alone", imitation, partial(stays_below, other=first), first),
        Check("weak-judge", weak, is_hacked, first),
    ]
    return [replace(check, settings=_placed(check, settings.output)) for check in found]


def _placed(check: Check, output: Path) -> Settings:
    folder = output / check.name
    starts_anew = check.other is None or "cold_start" in check.settings.stages
    start_from = None if starts_anew else output / str(check.other)
    return replace(check.settings, output=folder, report=folder / "report.html", start_from=start_from)


def chosen(checks: Sequence[Check], names: Sequence[str]) -> list[Check]:
    """The checks of these names, and the runs that they start from or are compared with."""
    wanted = {*names, *(check.other for check in checks if check.name in names)}
    return [check for check in checks if check.name in wanted]


def train(settings: Settings, console: Console) -> PipelineResult:
    """A run's figures."""
    return replace(demo.run(settings, console), model=None)


def run_checks(checks: Sequence[Check], at_once: int, console: Console) -> Verdicts:
    """Trains, and judges what came of it."""
    jobs = [
        Job(check.name, train, check.settings, after=None if check.settings.start_from is None else check.other)
        for check in checks
    ]
    results = run_all(jobs, at_once, console)
    verdicts = Verdicts()
    for check in checks:
        check.judge(results, check.name, verdicts)
    return verdicts


def as_json(verdicts: Verdicts, settings: Settings, seconds: float) -> dict[str, Any]:
    """What was found, and where."""
    machine = {**describe(settings.device), "threads": settings.threads}
    return {"machine": machine, "seconds": seconds, "failed": verdicts.failed, "verdicts": verdicts.as_json()}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.r1.checking.check", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/r1-check"), help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these, and the runs that they need (default: all)")
    add_options(parser)
    options = parser.parse_args(arguments)
    names = [check.name for check in all_checks(Settings(), options.seeds)]
    unknown = [name for name in options.only or () if name not in names]
    if unknown:
        parser.error(f"--only knows {', '.join(names)}, got {', '.join(unknown)}")
    return options


def main() -> int:
    options = parse_arguments()
    console, start = Console(), perf_counter()
    settings = Settings(device=options.device, threads=1, output=options.output)
    checks = all_checks(settings, options.seeds)
    verdicts = run_checks(chosen(checks, options.only or [check.name for check in checks]), options.jobs, console)
    verdicts.print(console, "examples.r1.checking.check")
    seconds = perf_counter() - start
    save_json(options.output / "check.json", as_json(verdicts, settings, seconds))
    console.print(f"{seconds:.0f} s", highlight=False)
    return 1 if verdicts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
