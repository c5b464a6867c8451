"""Every sample call once on a device, for compute-sanitizer: small, without pytest, every allocation its own.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 -m python_tests.gpu.small
"""

from __future__ import annotations

import argparse
import sys

import torch

import grpo_kernels
from python_tests import samples
from python_tests.gpu.devices import assert_agrees, inputs_of, run, synchronize


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
            actual = run(call, inputs_of(call, arguments.device))
            synchronize(arguments.device)
            with grpo_kernels.backend("reference"):
                assert_agrees(call, actual, run(call, inputs_of(call, "cpu")))
            count += 1
    print(f"{count} calls are right on {arguments.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
