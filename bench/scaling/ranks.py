"""The sweeps over processes: a vocabulary and experts in parts on 1, 2 and 4 ranks that talk through gloo.

The work of all ranks together stays the same. Each rank has one thread, so that more ranks than cores cannot be faster.
A figure is that of the slowest rank, from a common start; memory is that of the rank that needs most. As a program this
module is the process that starts the ranks, with the allocator's settings for times or for memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from .. import machine
from ..derive import rounded
from ..memory import growth_cpu
from ..progress import Progress
from . import rank_definitions as definitions

_TIMEOUT = 240
_ROUNDS = 5

Values = tuple[Tensor, ...]


@dataclass(frozen=True)
class RankSweep:
    """One op over ranks; the providers are those of `rank_definitions.PROVIDERS[op]`."""

    op: str
    fixed: str
    sizes: tuple[int, ...] = (1, 2, 4)
    axis: str = "ranks"
    what: str = "ranks, one thread each"

    def measure(self, progress: Progress) -> list[dict[str, Any]]:
        """Points as those of the other sweeps."""
        points = []
        for world in self.sizes:
            progress.case(f"{self.op}: {world} ranks")
            rows: dict[str, dict[str, Any]] = {
                name: {"kind": kind} for name, (kind, _) in definitions.PROVIDERS[self.op].items()
            }
            point: dict[str, Any] = {"size": world, "rows": rows}
            for what, tunables in (("time", machine.RECYCLING), ("memory", machine.RETURNING)):
                figures, problem = _in_new_process(what, self.op, world, tunables)
                if problem:
                    progress.note(f"no {what} of {self.op} on {world} ranks: {problem}")
                    point["error"] = problem
                for name, fields in figures.items():
                    rows[name] |= fields
            points.append(point)
        return points


SWEEPS = (
    RankSweep(definitions.HEAD, definitions.HEAD_SIZES),
    RankSweep(definitions.DISPATCH, definitions.DISPATCH_SIZES),
)


def _in_new_process(what: str, op: str, world: int, tunables: str) -> tuple[dict[str, dict[str, float]], str]:
    command = [sys.executable, "-m", "bench.scaling.ranks", what, op, str(world)]
    try:
        done = subprocess.run(
            command,
            env=machine.environment(tunables),
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        return {}, f"exit status {error.returncode}: {' '.join(error.stderr.split())[-200:]}"
    except subprocess.TimeoutExpired as error:
        return {}, str(error)
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found, ""


def _once(run: Callable[[], Values]) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    run()
    elapsed = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return float(elapsed)


def _times(providers: dict[str, Callable[[], Values]]) -> dict[str, dict[str, float]]:
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for run in providers.values():
        run()
    for count in range(_ROUNDS):
        for name in providers if count % 2 == 0 else reversed(providers):
            samples[name].append(_once(providers[name]))
    return {name: {"median_us": rounded(statistics.median(found) * 1e6)} for name, found in samples.items()}


def _peaks(providers: dict[str, Callable[[], Values]]) -> dict[str, dict[str, float]]:
    peaks = {}
    for name, run in providers.items():
        growth, results = growth_cpu(run)
        del results
        most = torch.tensor(growth)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        peaks[name] = {"extra_bytes": int(most)}
    return peaks


def _check(found: dict[str, Values]) -> None:
    """All providers computed the same.

    Raises:
        AssertionError: they did not.
    """
    first, *others = found.values()
    for other in others:
        for expected, actual in zip(first, other, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def rank_main(rank: int, world: int, folder: str, what: str, op: str) -> None:
    """One rank; the first one writes the figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        inputs = definitions.inputs(op, rank, world)
        runs = {name: _bound(run, inputs) for name, (_, run) in definitions.PROVIDERS[op].items()}
        _check({name: run() for name, run in runs.items()})
        figures = _times(runs) if what == "time" else _peaks(runs)
        if rank == 0:
            (Path(folder) / "figures.json").write_text(json.dumps(figures))
    finally:
        dist.destroy_process_group()


def _bound(run: Callable[[Any], Values], inputs: Any) -> Callable[[], Values]:
    return lambda: run(inputs)


def main(line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("op", choices=tuple(definitions.PROVIDERS))
    parser.add_argument("world", type=int)
    arguments = parser.parse_args(line)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (arguments.world, folder, arguments.what, arguments.op), nprocs=arguments.world)
        print((Path(folder) / "figures.json").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
