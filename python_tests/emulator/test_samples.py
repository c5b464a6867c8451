"""The sample calls of every op with CUDA C++ kernels, emulated: the numbers of the definition, in every order."""

from __future__ import annotations

import pytest

import grpo_kernels
from python_tests import samples
from python_tests.emulator import ORDERS, build, emulated
from python_tests.gpu.devices import assert_same, inputs_of, run
from python_tests.samples import Call

CALLS = [
    pytest.param(call, id=f"{op}-{call.name}")
    for op, module in samples.modules().items()
    if (build.ROOT / "csrc" / op / "cuda.cu").is_file()
    for call in module.CALLS
]


@pytest.mark.parametrize("call", CALLS)
def test_a_sample_call(call: Call) -> None:
    with grpo_kernels.backend("reference"):
        expected = run(call, inputs_of(call, "cpu"))
    for order in ORDERS:
        with emulated(order):
            assert_same(run(call, inputs_of(call, "cpu")), expected)
