"""Peak memory of one provider above its inputs. As a program, this module is the CPU's fresh process."""

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

from .case import SIZES, Case, Inputs, Provider
from .machine import RETURNING, environment

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


def peak_cuda(provider: Provider, inputs: Inputs) -> int:
    """Growth of the allocator's peak over a call; the provider has run before, so nothing fixed is in it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = provider.run(inputs)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del results
    return peak - before


def peaks_in_new_process(op: str, provider: str, names: list[str], size: str) -> tuple[dict[str, int], str]:
    """Peak bytes by case, measured in a fresh process, and why there are none, or ""."""
    package = __package__ or ""
    command = [sys.executable, "-m", f"{package}.memory", op, provider, size, *names]
    root = Path(__file__).parents[len(package.split("."))]  # where this package is found first
    try:
        done = subprocess.run(
            command, env=environment(RETURNING), cwd=root, capture_output=True, text=True, timeout=_TIMEOUT, check=True
        )
    except subprocess.CalledProcessError as error:
        return {}, f"exit status {error.returncode}: {' '.join(error.stderr.split())[-200:]}"
    except subprocess.TimeoutExpired as error:
        return {}, str(error)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op")
    parser.add_argument("provider")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    from .run import cases

    wanted = [case for case in cases("cpu") if case.op == arguments.op and case.name in arguments.names]
    print(json.dumps({case.name: _peak_cpu(case, arguments.provider, arguments.size) for case in wanted}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
