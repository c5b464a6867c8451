"""What every public function keeps on a GPU: right kernels, right values, capture, streams, no synchronisation."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.testing import guard_input, guarded_allocations, poisoned_allocations
from python_tests import samples
from python_tests.gpu.devices import (
    CALLS,
    CUDA,
    DEVICES,
    assert_agrees,
    assert_as_on_the_cpu,
    assert_identical,
    assert_same,
    call_op,
    captured,
    fresh,
    has_kernel,
    inputs_of,
    kernel_backends,
    late_inputs,
    no_synchronization,
    run,
)
from python_tests.samples import Call, tensors

ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
REGISTERED = [
    pytest.param(op, arguments, id=f"{op}-{index}")
    for module in samples.modules().values()
    for op, argument_lists in module.OPS.items()
    for index, arguments in enumerate(argument_lists)
]


@ON_DEVICES
@pytest.mark.parametrize("op", sorted(_dispatch.public_ops()))
def test_the_promised_backend_is_available(op: str, device: str) -> None:
    """A build without CUDA kernels would make every other test here pass through the reference."""
    best = kernel_backends(op, device)[0]
    index = torch.cuda.current_device() if device == "cuda" else -1
    assert _dispatch.problem(op, best, device, index, torch.float32) == ""
    assert _dispatch.resolve(op, torch.empty(1, device=device)) == best


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_kernels_agree_with_the_reference_on_the_cpu(call: Call, device: str) -> None:
    assert_as_on_the_cpu(call, device)


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_the_reference_runs_on_the_device(call: Call, device: str) -> None:
    with grpo_kernels.backend("reference"):
        assert_agrees(call, run(call, inputs_of(call, device)), run(call, inputs_of(call, "cpu")))


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_every_output_is_written_and_deterministic(call: Call, device: str) -> None:
    first = run(call, inputs_of(call, device))
    with poisoned_allocations():
        poisoned = run(call, inputs_of(call, device))
    assert_identical(poisoned, first)
    assert_identical(run(call, inputs_of(call, device)), first)


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_nothing_outside_the_tensors_is_touched(call: Call, device: str) -> None:
    """Inputs lie between NaN: a read out of bounds changes a result. Allocations lie between bands that are checked."""
    expected = run(call, inputs_of(call, device))
    with guarded_allocations(), poisoned_allocations():
        inputs = [guard_input(i) if isinstance(i, Tensor) else i for i in inputs_of(call, device)]
        actual = run(call, inputs)
    assert_identical(actual, expected)


def _registered_op(op: str, arguments: tuple[Any, ...], device: str, guarded: bool = False) -> list[Tensor]:
    """What a registered op returns on the device, with the kernels of its public function, and what it writes.

    Guarded, it must not wait either; the call before that has compiled and loaded.
    """
    inputs = fresh(arguments, device)
    if guarded:
        inputs = [guard_input(i) if isinstance(i, Tensor) else i for i in inputs]
    with no_synchronization(device) if guarded else contextlib.nullcontext():
        return call_op(op, inputs, device)


@ON_DEVICES
@pytest.mark.parametrize(("op", "arguments"), REGISTERED)
def test_registered_ops_stay_in_bounds_and_do_not_wait(op: str, arguments: tuple[Any, ...], device: str) -> None:
    """Each by itself, the backwards too. Values are not compared: what a forward leaves for its backward is its own."""
    if not has_kernel(arguments, device):
        pytest.skip("kernels for float64 on CUDA: there are none, the public function takes the reference")
    expected = _registered_op(op, arguments, device)
    with guarded_allocations(), poisoned_allocations():
        actual = _registered_op(op, arguments, device, guarded=True)
    assert_identical(actual, expected)


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_nothing_waits_for_the_device(call: Call, device: str) -> None:
    expected = run(call, inputs_of(call, device))  # the first call compiles and loads
    inputs = inputs_of(call, device)
    with no_synchronization(device):
        actual = run(call, inputs)
    assert_identical(actual, expected)


@pytest.mark.parametrize("device", CUDA)
def test_the_check_for_synchronisation_works(device: str) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronization(device):
        torch.ones(1, device=device).item()


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_cuda_graph_replays_with_new_values(call: Call, device: str) -> None:
    """Forward and backward in one graph; a replay must not depend on what the replays before it left behind."""
    inputs = inputs_of(call, device)
    replay = captured(device, lambda: run(call, inputs))
    assert_identical(replay(), run(call, inputs_of(call, device)))
    for factor in (0.5, 0.25, 0.5, 1.0):
        changed = inputs_of(call, device, lambda value, factor=factor: value * factor)
        with torch.no_grad():
            for static, new in zip(inputs, changed, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(new)
        expected = run(call, changed)
        assert_identical(replay(), expected)
        assert_identical(replay(), expected)


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_work_goes_to_the_current_stream(call: Call, device: str) -> None:
    expected = run(call, inputs_of(call, device))
    inputs = inputs_of(call, device)
    assert_identical(late_inputs(device, inputs, lambda: run(call, inputs)), expected)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_a_graph_break(call: Call, device: str) -> None:
    """On a CPU, its kernels and the reference: python_tests/contract."""
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager", dynamic=True)
    wrapped = Call(call.name, compiled, call.make, call.differentiable)
    assert_same(run(wrapped, inputs_of(call, device)), run(call, inputs_of(call, device)))


@ON_DEVICES
@pytest.mark.parametrize("call", CALLS)
def test_metrics_and_results_stay_on_the_device(call: Call, device: str) -> None:
    for tensor in tensors(call.function(*inputs_of(call, device))):
        assert tensor.device.type == device
