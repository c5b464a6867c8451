"""The accuracy budget: how far from float64 a result may be, given how far plain PyTorch is on the same data."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT64_BUDGET = 1e-13
"""For float64 results: some hundred roundings, which long sums need."""


def accuracy_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| over the finite expected values, relative to the largest of them; 0 for empty tensors.

    Args:
        actual: Any shape and dtype.
        expected: Same shape, float64.

    Returns:
        The error; inf where `actual` misses a NaN or an infinity of `expected`, or has one of its own.
    """
    actual = actual.detach().to("cpu", torch.float64)
    expected = expected.detach().to("cpu", torch.float64)
    if actual.shape != expected.shape:
        raise ValueError(
            f"accuracy_error: actual must have the shape of expected, {list(expected.shape)}, got {list(actual.shape)}"
        )
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    if not finite.all():
        special, special_expected = actual[~finite], expected[~finite]
        if not torch.equal(special.isnan(), special_expected.isnan()):
            return float("inf")
        if not torch.equal(special.nan_to_num(nan=0.0), special_expected.nan_to_num(nan=0.0)):
            return float("inf")
        actual, expected = actual[finite], expected[finite]
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def accuracy_budget(dtype: torch.dtype, eager_error: float) -> float:
    """The largest error that a result may have: twice eager float32's, plus one rounding to its own dtype.

    Args:
        dtype: The floating type of the result.
        eager_error: `accuracy_error` of plain PyTorch in float32 on the same (upcast) inputs.
    """
    if dtype == torch.float64:  # twice the error of float32 would be a licence
        return _FLOAT64_BUDGET
    if eager_error == float("inf"):  # eager overflowed or made a NaN: it sets no standard
        eager_error = 0.0
    return 2.0 * eager_error + torch.finfo(dtype).eps


def assert_as_accurate(actual: Tensor, expected: Tensor, eager: Tensor, *, name: str = "result") -> None:
    """Asserts that `actual` is at most twice as far from `expected` as `eager`, plus one rounding to its own dtype.

    Both errors are max-norms relative to the max-norm of `expected`. The budget comes from the data: nothing is tuned
    by hand.

    Args:
        actual: The kernel's result, any dtype.
        expected: Same shape, float64. The definition evaluated in float64 on the same (upcast) inputs.
        eager: Same shape, float32. Plain PyTorch evaluated in float32 on the same (upcast) inputs.
        name: What to call the tensor in the message.

    Raises:
        AssertionError: the error exceeds the budget; the message gives both.
    """
    error = accuracy_error(actual, expected)
    eager_error = accuracy_error(eager, expected)
    budget = accuracy_budget(actual.dtype, eager_error)
    if not error <= budget:
        raise AssertionError(
            f"{name}: error {error:.3e} exceeds the budget {budget:.3e} (eager float32: {eager_error:.3e})"
        )
