"""What the tests of every emulated op share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from python_tests.emulator import emulated


def assert_same_in_every_order(work: Callable[[], Sequence[Tensor]], orders: Sequence[int] = range(8)) -> None:
    """The kernels' results do not depend on which thread runs when, to the last bit."""
    results = []
    for order in orders:
        with emulated(order):
            results.append([tensor.detach().clone() for tensor in work()])
    for order, result in zip(orders[1:], results[1:], strict=True):
        for index, (actual, expected) in enumerate(zip(result, results[0], strict=True)):
            same = torch.equal(actual.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))
            assert same, f"result {index} of order {order} differs from that of order {orders[0]}"
