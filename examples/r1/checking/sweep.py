"""`python -m examples.r1.checking.sweep`: time and result of every model and of every preset, for the page's tables.

What is already in the file of results, with equal settings, is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from rich.console import Console

from bench.machine import describe, slug
from examples.r1 import demo
from examples.r1.checking import combinations_page
from examples.r1.checking.jobs import Job, run_all
from examples.r1.choices import PRESETS
from examples.r1.reporting.figures import ends
from examples.r1.results import PipelineResult
from examples.r1.saving.run_state import comparable_settings
from examples.r1.saving.storage import save_json
from examples.r1.settings import Settings

ROOT = Path(__file__).parents[3]
PAGE = Path(__file__).parents[1] / "README.md"
BASE = "dense"
_KEPT = (  # of the evaluations at both ends of a stage
    "digit_sorting/accuracy",
    "digit_sorting/sampled_accuracy",
    "spell_backward/accuracy",
    "spell_backward/sampled_accuracy",
    "validation_loss",
    "tokens_per_pass",
)
_LAST = ("kl", "entropy", "ratio_max", "clip_fraction", "rounds", "expert_load", "acceptance_1", "tokens_per_pass")


@dataclass(frozen=True)
class Combination:
    """Options that are run together."""

    name: str  # as they are given on the command line
    settings: Settings
    after: str | None = None  # the combination whose cold start it goes on from


def combinations(settings: Settings) -> list[Combination]:
    """The models, with all their stages; then, from the dense model's cold start, what changes reasoning RL."""
    moe = {"model": "moe"}
    models: dict[str, dict[str, Any]] = {
        BASE: {},
        "--model moe": moe,
        "--mtp 1": {"mtp": 1},
        "--mtp 2": {"mtp": 2},
        "--model moe --mtp 1": {**moe, "mtp": 1},
        "--model moe --recipe bf16": {**moe, "recipe": "bf16"},
        "--model moe --recipe fp8_block128": {**moe, "recipe": "fp8_block128"},
        "--model moe --recipe fp8_block128_wgrad": {**moe, "recipe": "fp8_block128_wgrad"},
    }
    losses: dict[str, dict[str, Any]] = {f"--preset {preset}": {"preset": preset} for preset in PRESETS}
    losses |= {
        "--aggregation sum_then_normalize": {"aggregation": "sum_then_normalize"},
        "--dynamic-sampling 1": {"dynamic_sampling": 1},
    }
    found = [Combination(name, replace(settings, **changes)) for name, changes in models.items()]
    for name, changes in losses.items():
        found.append(Combination(name, replace(settings, stages=("reasoning_rl",), **changes), after=BASE))
    return [replace(combination, settings=_placed(combination, settings.output)) for combination in found]


def _placed(combination: Combination, output: Path) -> Settings:
    """A folder of its own, and no checkpoints on the way."""
    start_from = None if combination.after is None else output / folder_name(combination.after)
    settings = replace(combination.settings, output=output / folder_name(combination.name), start_from=start_from)
    return replace(settings, save_every=0)


def folder_name(name: str) -> str:
    return name.replace("--", "").replace(" ", "-")


NAMES = tuple(combination.name for combination in combinations(Settings()))


def train(settings: Settings, console: Console) -> dict[str, Any]:
    """A row of the file."""
    start = process_time()  # on one thread that of a quiet machine, whatever else runs
    result = demo.run(settings, console)
    seconds = process_time() - start
    return {
        "settings": kept_settings(settings),
        "machine": {**describe(settings.device), "threads": settings.threads},
        "parameters": result.parameters,
        "processor_seconds": seconds,
        "stages": {stage.name: _stage_row(result, stage.name) for stage in result.stages},
    }


def _stage_row(result: PipelineResult, name: str) -> dict[str, Any]:
    stage = result.stage(name)
    if stage is None:
        raise ValueError(f"the run has no stage {name}")
    row: dict[str, Any] = {"steps": stage.steps, "seconds": stage.seconds, "facts": stage.facts}
    for end, look in (("before", stage.before), ("after", stage.after)):
        row[end] = {key: look[key] for key in _KEPT if key in look}
    means = {key: ends(stage, key)[1] for key in _LAST}
    row["end"] = {key: value for key, value in means.items() if value is not None}
    return row


def kept_settings(settings: Settings) -> dict[str, Any]:
    """What a result depends on: not the folders."""
    values = comparable_settings(settings)
    return {name: value for name, value in values.items() if name != "start_from"} | {"stages": list(settings.stages)}


def missing(found: Sequence[Combination], rows: dict[str, Any]) -> list[Combination]:
    """What is not in the file, or was run with other settings; the base, too, where its models are needed and gone."""

    def lacks(combination: Combination) -> bool:
        row = rows.get(combination.name)
        return row is None or row["settings"] != kept_settings(combination.settings)

    wanted = [combination for combination in found if lacks(combination)]
    needed = {combination.after for combination in wanted}
    names = {combination.name for combination in wanted}
    again = [
        combination
        for combination in found
        if combination.name in needed - names and not (combination.settings.output / "models").is_dir()
    ]
    return again + wanted


def run_missing(path: Path, found: Sequence[Combination], at_once: int, console: Console) -> dict[str, Any]:
    """All rows of the file, in the order of the combinations; each is there as soon as it is known."""
    rows = load(path)
    wanted = missing(found, rows)
    names = [combination.name for combination in wanted]
    jobs = [
        Job(combination.name, train, combination.settings, combination.after if combination.after in names else None)
        for combination in wanted
    ]

    def keep(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        save_json(path, {"combinations": {name: rows[name] for name in NAMES if name in rows}})

    run_all(jobs, at_once, console, keep)
    return rows


def load(path: Path) -> dict[str, Any]:
    """The rows of a file of results; none if there is no file."""
    if not path.is_file():
        return {}
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["combinations"]
    return rows


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m examples.r1.checking.sweep", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/r1-sweep"), help="(default: %(default)s)")
    parser.add_argument("--device", default=default.device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="combinations; quote their options (default: all)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="(default: bench/results/r1-<processor>.json)")
    parser.add_argument("--write", action="store_true", help="also writes the tables into examples/r1/README.md")
    options = parser.parse_args(arguments)
    options.results = options.results or ROOT / "bench" / "results" / f"r1-{slug(options.device)}.json"
    unknown = [name for name in options.only or () if name not in NAMES]
    if unknown:
        parser.error(f"--only knows {', '.join(map(repr, NAMES))}, got {', '.join(map(repr, unknown))}")
    return options


def main() -> int:
    options = parse_arguments()
    console, start = Console(), perf_counter()
    settings = Settings(output=options.output, device=options.device, seed=options.seed, threads=1)
    found = combinations(settings)
    if options.only:
        found = [combination for combination in found if combination.name in (*options.only, BASE)]
    rows = run_missing(options.results, found, options.jobs, console)
    text = combinations_page.text(rows)
    if options.write:
        PAGE.write_text(combinations_page.between_markers(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        console.out(text, highlight=False)
    console.print(f"{perf_counter() - start:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
