"""What tests of kernels need: the accuracy budget and poisoned allocation."""

from grpo_kernels.testing.accuracy import accuracy_error, assert_as_accurate
from grpo_kernels.testing.poison import poisoned_allocations

__all__ = ["accuracy_error", "assert_as_accurate", "poisoned_allocations"]
