"""Peak memory of one provider above its inputs. `python -m bench.memory` is the CPU's fresh process."""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench import case as cases_module
from bench.case import Case
from bench.machine import RETURNING, environment

_TIMEOUT = 180


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


def _peak_cpu(case: Case, provider: str, size: str) -> int:
    """Growth of the resident set over the second of two runs: the first pays what is fixed, such as thread pools and
    the first backward's machinery.
    """
    inputs = case.make("cpu", size)
    run = case.provider(provider).run
    run(inputs)
    _give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    results = run(inputs)
    peak = _status("VmHWM")
    del results
    return max(peak - before, 0)


def peak_cuda(case: Case, provider: str, size: str) -> int:
    """Growth of the allocator's peak over the second of two runs."""
    inputs = case.make("cuda", size)
    run = case.provider(provider).run
    run(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(inputs)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del results
    return peak - before


def peaks_in_new_process(op: str, provider: str, names: list[str], size: str) -> dict[str, int]:
    """Peak bytes by case, measured in a fresh process; empty where it cannot be measured."""
    command = [sys.executable, "-m", "bench.memory", op, provider, size, *names]
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(
            command, env=environment(RETURNING), cwd=root, capture_output=True, text=True, timeout=_TIMEOUT, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"bench: no memory figures for {op}, {provider}: {error}\n{error.stderr or ''!s}", file=sys.stderr)
        return {}
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op")
    parser.add_argument("provider")
    parser.add_argument("size", choices=cases_module.SIZES)
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    from bench.run import cases

    wanted = [case for case in cases("cpu") if case.op == arguments.op and case.name in arguments.names]
    print(json.dumps({case.name: _peak_cpu(case, arguments.provider, arguments.size) for case in wanted}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
