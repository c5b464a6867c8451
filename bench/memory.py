"""Peak memory of one provider above its inputs. As a program, this module is the CPU's fresh process."""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .case import SIZES, Case, Inputs, Provider
from .machine import RETURNING, environment
from .progress import Progress
from .target import Row, Rows

_TIMEOUT = 120  # seconds, and for each case
_TIMEOUT_CASE = 60


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _give_back_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)
    if trim is not None:
        trim(0)


def bytes_of(results: Sequence[Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes of the results that do not lie in the inputs, each piece of memory counted once."""
    given = {value.untyped_storage().data_ptr() for value in inputs}
    storages = {result.untyped_storage().data_ptr(): result.untyped_storage().nbytes() for result in results}
    return sum(size for address, size in storages.items() if address not in given)


def _extra(case: Case, growth: int, results: Sequence[Tensor], inputs: Inputs) -> int:
    return max(growth - (0 if case.results_are_extra else bytes_of(results, inputs.values())), 0)


def growth_cpu(run: Callable[[], Sequence[Tensor]]) -> tuple[int, Sequence[Tensor]]:
    """Growth of the resident set over the second of two runs, and its results: the first pays what is fixed, such as
    thread pools and the first backward's machinery. The process has to run under `RETURNING`.
    """
    run()
    _give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    results = run()
    return max(_status("VmHWM") - before, 0), results


def held_cpu(run: Callable[[], Sequence[Tensor]]) -> tuple[int, Sequence[Tensor]]:
    """Growth of the resident set from before the second of two runs to after it, while its results and what autograd
    keeps for them are alive; and the results. The process has to run under `RETURNING`.
    """
    run()
    _give_back_free_memory()
    before = _status("VmRSS")
    results = run()
    _give_back_free_memory()
    return max(_status("VmRSS") - before, 0), results


def _peak_cpu(case: Case, provider: str, size: str) -> int:
    inputs = case.make("cpu", size)
    run = case.provider(provider).run
    growth, results = growth_cpu(lambda: run(inputs))
    return _extra(case, growth, results, inputs)


def peak_cuda(case: Case, provider: Provider, inputs: Inputs) -> int:
    """Growth of the allocator's peak over a call; the provider has run before, so nothing fixed is in it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = provider.run(inputs)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return _extra(case, peak - before, results, inputs)


def peaks_in_new_process(
    op: str, provider: str, names: list[str], size: str, cases: str = "run"
) -> tuple[dict[str, int], str]:
    """Peak bytes by case, measured in a fresh process, and why there are none, or "". `cases` is the module of this
    package whose `choose` has them.
    """
    package = __package__ or ""
    command = [sys.executable, "-m", f"{package}.memory", cases, op, provider, size, *names]
    root = Path(__file__).parents[len(package.split("."))]  # where this package is found first
    try:
        done = subprocess.run(
            command,
            env=environment(RETURNING),
            cwd=root,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT + _TIMEOUT_CASE * len(names),
            check=True,
        )
    except subprocess.CalledProcessError as error:
        return {}, f"exit status {error.returncode}: {' '.join(error.stderr.split())[-200:]}"
    except subprocess.TimeoutExpired as error:
        return {}, str(error)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result, ""


def add_peaks(
    asking: Iterable[tuple[str, str, Rows]],
    progress: Progress,
    cases: str = "run",
    late: Callable[[], bool] = lambda: False,
) -> None:
    """Puts peak bytes into the rows of (op, case, rows) that were timed, until it is late: one fresh process for an op
    and a provider, with all its cases. A process that fails leaves its figures out, and `progress` says why.
    """
    jobs: dict[tuple[str, str], dict[str, Row]] = {}
    for op, name, rows in asking:
        for provider, row in rows.items():
            if "median_us" in row:
                jobs.setdefault((op, provider), {})[name] = row
    if jobs:
        progress.note("peak memory, in fresh processes")
    for (op, provider), found in jobs.items():
        if late():
            break
        progress.step(f"memory of {provider}")
        peaks, problem = peaks_in_new_process(op, provider, list(found), "full", cases)
        if problem:
            progress.note(f"no memory figures for {op}, {provider}: {problem}")
        for name, peak in peaks.items():
            found[name]["extra_bytes"] = peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases")
    parser.add_argument("op")
    parser.add_argument("provider")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    choose = importlib.import_module(f".{arguments.cases}", __package__).choose
    wanted = [
        case
        for case in choose("cpu", [arguments.op], False)
        if case.op == arguments.op and case.name in arguments.names
    ]
    print(json.dumps({case.name: _peak_cpu(case, arguments.provider, arguments.size) for case in wanted}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
