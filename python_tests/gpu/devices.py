"""The device a test runs on, and what a CPU does in place of CUDA's graphs, streams and synchronisation checks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch, _extension
from python_tests import samples
from python_tests.gpu.fuzz.stages import Recorder, check_stages
from python_tests.samples import Call, assert_gradients_agree, tensors

_NO_CPU = pytest.mark.skipif(bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}")
DEVICES = [pytest.param("cpu", marks=_NO_CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
CUDA = DEVICES[1:]
CALLS = [
    pytest.param(call, id=f"{op}-{call.name}") for op, module in samples.modules().items() for call in module.CALLS
]


def public_function(registered: str) -> str:
    """The public function that a registered op serves, such as token_log_probs_backward_: it decides the backend."""
    public = _dispatch.public_ops()
    package = _dispatch.registered_ops()[registered] + "."
    neighbours = [op for op in public if getattr(grpo_kernels, op).__module__.startswith(package)]
    return max((op for op in public if registered.startswith(op)), key=len, default=neighbours[0])


def kernel_backends(op: str, device: str) -> list[str]:
    """The backends that have kernels for this device, best first."""
    return [name for name in _dispatch.candidates(op, device) if name != "reference"]


def inputs_of(call: Call, device: str, change: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    """Fresh inputs, leaves where the call is differentiable; `change` maps the floating ones."""
    inputs = list(call.make(device))
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor):
            changed = change(value) if change is not None and value.is_floating_point() else value
            inputs[index] = changed.detach().clone()
    for index in call.differentiable:
        inputs[index].requires_grad_()
    return inputs


def fresh(arguments: Sequence[Any], device: str) -> list[Any]:
    """Copies on the device that keep their strides: a registered op may write to its arguments."""
    return [copy.deepcopy(value).to(device) if isinstance(value, Tensor) else value for value in arguments]


def placed(tensor: Tensor, device: str) -> Tensor:
    """A copy on the device with the same strides. What lies between its rows is NaN."""
    if not tensor.numel() or 0 in tensor.stride():
        return tensor.to(device)
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.full((elements * tensor.element_size(),), 0xFF, dtype=torch.uint8, device=device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def has_kernel(arguments: Sequence[Any], device: str) -> bool:
    """On CUDA none takes float64: public functions then resolve to the reference."""
    return device != "cuda" or not any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in arguments[:1])


def call_op(op: str, inputs: Sequence[Any], device: str) -> list[Tensor]:
    """What a registered op returns with the kernels of its public function, then what it writes."""
    overload = getattr(torch.ops.grpo_kernels, op).default
    written = [
        value
        for value, described in zip(inputs, overload._schema.arguments[:-1], strict=True)
        if described.alias_info is not None and described.alias_info.is_write
    ]
    returned = overload(*inputs, kernel_backends(public_function(op), device)[0])
    return [*tensors(returned), *tensors(written)]


def run_op(op: str, arguments: Sequence[Any], device: str) -> list[Tensor]:
    """The same of copies on the device; results on the CPU."""
    inputs = [placed(value, device) if isinstance(value, Tensor) else value for value in arguments]
    return [result.cpu() for result in call_op(op, inputs, device)]


def run(call: Call, inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs, then the gradients of a fixed weighting of the differentiable ones."""
    outputs = tensors(call.function(*inputs))
    used = [output for output in outputs if output.requires_grad]
    leaves = [inputs[index] for index in call.differentiable]
    gradients: Sequence[Tensor] = []
    if used and leaves:
        weights = [
            torch.linspace(0.5, 1.5, o.numel(), device=o.device, dtype=torch.float32).view(o.shape).to(o.dtype)
            for o in used
        ]
        gradients = torch.autograd.grad(used, leaves, weights)
    return [*(output.detach() for output in outputs), *gradients]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], **tolerance: float) -> None:
    """Equal to rounding, NaN to NaN, wherever they lie."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), equal_nan=True, **tolerance)


def assert_agrees(call: Call, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """What `run` returned on two devices, equal to rounding: that of `call.rounds` for gradients."""
    values = len(actual) - len(call.differentiable) if call.differentiable else len(actual)
    assert_same(actual[:values], expected[:values])
    assert_gradients_agree(call, actual[values:], expected[values:])


def assert_as_on_the_cpu(call: Call, device: str) -> None:
    """What kernels of the device give is what the reference gives on the CPU."""
    with grpo_kernels.backend("reference"):
        expected = run(call, inputs_of(call, "cpu"))
    with Recorder() if call.in_stages else contextlib.nullcontext() as recorder:
        actual = run(call, inputs_of(call, device))
    assert all(tensor.device.type == device for tensor in actual)
    assert [(t.shape, t.dtype) for t in actual] == [(t.shape, t.dtype) for t in expected]
    if recorder is None:
        assert_agrees(call, actual, expected)
    else:
        assert recorder.ran
        check_stages(recorder.ran)


def assert_identical(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert_same(actual, expected, rtol=0, atol=0)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal bit by bit: 0.0 is not -0.0, and one NaN is not another."""
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        same = torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
        assert same, f"tensor {index} differs"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def no_synchronization(device: str) -> Iterator[None]:
    """In the block, whatever waits for the device raises."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(device: str, work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """`work` as a CUDA graph: calling the result replays it and gives the same tensors, written anew."""
    if device != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles, loads modules, creates handles: none of it may happen in a capture
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()

    def replay() -> list[Tensor]:
        graph.replay()
        torch.cuda.synchronize()
        return results

    return replay


def late_inputs(device: str, inputs: Sequence[Any], work: Callable[[], list[Tensor]]) -> list[Tensor]:
    """`work` on a stream of its own, on which the floating inputs get their values late: a kernel on any other stream
    would read NaN.
    """
    if device != "cuda":
        return work()
    floating = [t.detach() for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
    values = [t.clone() for t in floating]
    for t in floating:
        t.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for t, value in zip(floating, values, strict=True):
            t.copy_(value)
        results = work()
    stream.synchronize()
    return results
