"""What tests of kernels need: the accuracy budget, poisoned allocation and guard bands."""

from grpo_kernels.testing.accuracy import accuracy_budget, accuracy_error, assert_as_accurate
from grpo_kernels.testing.guard import GuardBandError, guard_input, guarded_allocations
from grpo_kernels.testing.poison import poisoned_allocations

__all__ = [
    "GuardBandError",
    "accuracy_budget",
    "accuracy_error",
    "assert_as_accurate",
    "guard_input",
    "guarded_allocations",
    "poisoned_allocations",
]
