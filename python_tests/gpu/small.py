"""Every sample once on a device, for compute-sanitizer: small, without pytest, every allocation its own.

Public calls are compared with the reference on the CPU. Registered ops run after them, since some of their variants are
reached by no small call; what they return is compared elsewhere (test_contract.py, the random problems of fuzz).

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 -m python_tests.gpu.small
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from python_tests import samples
from python_tests.gpu.devices import assert_as_on_the_cpu, call_op, fresh, has_kernel, synchronize


def registered(ops: dict[str, list[tuple[Any, ...]]], device: str) -> None:
    """Runs every op with its sample arguments, but for those that no kernel of the device takes."""
    for op, argument_lists in ops.items():
        for index, arguments in enumerate(argument_lists):
            if not has_kernel(arguments, device):
                continue
            print(f"{op}[{index}]", flush=True)
            call_op(op, fresh(arguments, device), device)
            synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--op", action="append", help="only this op; may be given several times")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    count = 0
    for op, module in samples.modules().items():
        if arguments.op and op not in arguments.op:
            continue
        for call in module.CALLS:
            print(f"{op}: {call.name}", flush=True)  # before it runs: the last line names the call that hung
            assert_as_on_the_cpu(call, arguments.device)
            count += 1
        registered(module.OPS, arguments.device)
    print(f"{count} calls are right on {arguments.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
