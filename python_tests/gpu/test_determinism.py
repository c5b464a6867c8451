"""Twenty runs of everything, each under other conditions, give the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grpo_kernels import _dispatch
from python_tests.gpu.big_calls import BIG
from python_tests.gpu.devices import CALLS, DEVICES, assert_same_bits, inputs_of, run, synchronize
from python_tests.samples import Call, multiplies_matrices

RUNS = 20
ON_DEVICES = pytest.mark.parametrize("device", DEVICES)


class Conditions:
    """What changes from run to run: addresses, the stream and what else the device does; on the CPU the threads, where
    no matrix product of a library is involved, whose order of sums may follow them."""

    def __init__(self, device: str, name: str) -> None:
        self.device = device
        self.threads = torch.get_num_threads()
        self.fewest_threads = self.threads if multiplies_matrices(name) else 1
        self.kept: list[Tensor] = []
        if device == "cuda":
            self.streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
            self.busy = torch.cuda.Stream()
            self.load = torch.randn(1024, 1024, device=device)

    def run(self, index: int, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """`work`, once everything before it is done."""
        self.kept = [*self.kept[-3:], torch.full((1 + 37 * index * index,), float("nan"), device=self.device)]
        if self.device != "cuda":
            torch.set_num_threads(max(1 + index % max(self.threads, 2), self.fewest_threads))
            return work()
        torch.cuda.synchronize()
        if index % 2:
            with torch.cuda.stream(self.busy):
                for _ in range(4):
                    self.load = torch.tanh(self.load @ self.load)
        with torch.cuda.stream(self.streams[index % 3]):
            results = work()
        torch.cuda.synchronize()
        return results

    def restore(self) -> None:
        torch.set_num_threads(self.threads)


def _assert_deterministic(device: str, name: str, work: Callable[[], list[Tensor]]) -> None:
    first = [tensor.clone() for tensor in work()]
    synchronize(device)
    conditions = Conditions(device, name)
    try:
        for index in range(RUNS):
            assert_same_bits(conditions.run(index, work), first)
    finally:
        conditions.restore()


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_samples(call: Call, device: str, request: pytest.FixtureRequest) -> None:
    _assert_deterministic(device, request.node.name, lambda: run(call, inputs_of(call, device)))


def test_every_op_has_a_big_case() -> None:
    assert {name.partition("-")[0] for name in BIG} == set(_dispatch.public_ops())


@ON_DEVICES
@pytest.mark.parametrize("name", BIG)
def test_big(name: str, device: str) -> None:
    _assert_deterministic(device, name, BIG[name](device))


def test_the_comparison_sees_one_bit() -> None:
    zero = torch.zeros(3)
    with pytest.raises(AssertionError, match="tensor 1 differs"):
        assert_same_bits([zero, -zero], [zero, zero])
