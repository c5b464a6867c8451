"""Every op, backend and variant against float64 on the user's own device: what `grpo-kernels verify` runs.

Cases are data, one module per op package, found by its name; `engine` is the one place that runs and judges them.
"""

from __future__ import annotations

import importlib
import importlib.util

from grpo_kernels import _dispatch
from grpo_kernels.testing.verification.case import Case
from grpo_kernels.testing.verification.engine import Outcome, Target, check, targets

__all__ = ["Case", "Outcome", "Target", "cases", "check", "targets"]


def cases() -> dict[str, list[Case]]:
    """The cases of every public op; an op may have none, which whoever verifies must report."""
    found: dict[str, list[Case]] = {op: [] for op in _dispatch.public_ops()}
    for package in sorted(set(_dispatch.registered_ops().values())):
        module = f"{__name__}.{package.rpartition('.')[2]}"
        if importlib.util.find_spec(module) is not None:
            for case in importlib.import_module(module).CASES:
                found[case.op].append(case)
    return found
