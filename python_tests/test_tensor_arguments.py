"""Bindings read tensors through DLPack's C functions, and without them by their attributes: the same results."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _extension
from grpo_kernels.grpo_loss import ops
from python_tests import samples
from python_tests.samples import Call, results_and_gradients

_OPS = ("grpo_loss", "moe_router", "token_log_probs")
_CALLS = [pytest.param(call, id=f"{op}-{call.name}") for op in _OPS for call in samples.modules()[op].CALLS]

pytestmark = pytest.mark.skipif(
    bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}"
)


@pytest.fixture
def module() -> Iterator[Any]:
    """The module `_C`, which afterwards reads tensors as it did before."""
    extension = _extension.extension()
    yield extension
    extension.set_tensor_type(torch.Tensor, False)


@pytest.mark.parametrize("call", _CALLS)
def test_attributes_give_what_dlpack_gives(call: Call, module: Any) -> None:
    through_dlpack = results_and_gradients(call)
    module.set_tensor_type(torch.Tensor, True)
    for found, expected in zip(results_and_gradients(call), through_dlpack, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


class _Header(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p))


def test_another_version_of_the_functions_is_not_called(module: Any) -> None:
    def loss() -> Tensor:
        log_probs = torch.linspace(-2.0, 0.0, 12).view(3, 4)
        return grpo_kernels.grpo_loss(log_probs, log_probs - 0.1, torch.tensor([1.0, -1.0, 0.5]), None).loss

    expected, header = loss(), _Header(2, 0, None)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    name = b"dlpack_exchange_api"
    later = type("Later", (), {"__dlpack_c_exchange_api__": capsule(ctypes.addressof(header), name, None)})
    for other in (later, type("Without", (), {})):
        module.set_tensor_type(other, False)
        torch.testing.assert_close(loss(), expected, rtol=0, atol=0)


def _arguments(log_probs: Any, options: Any) -> tuple[Any, ...]:
    tensors = (log_probs, None, torch.ones(3, 1), *[None] * 9)
    parameters = grpo_kernels.GRPOLossConfig().pack()[1]
    outputs = (torch.empty(()), None, None, torch.empty(2), torch.empty(ops.METRICS))
    return (*tensors, None, 0.0, None, 0.0, None, 0.0, 0, options, parameters, None, None, *outputs, -1, 1)


def test_what_is_no_tensor_or_not_as_many_numbers_raises(module: Any) -> None:
    log_probs, options = torch.zeros(3, 4), grpo_kernels.GRPOLossConfig().pack()[0]
    assert module.grpo_loss(*_arguments(log_probs, options)) == -1
    for wrong, error in (
        (_arguments([0.0], options), TypeError),
        (_arguments(log_probs.int(), options), TypeError),
        (_arguments(log_probs.to("meta"), options), (BufferError, RuntimeError)),
        (_arguments(log_probs, options[:-1]), ValueError),
        (_arguments(log_probs, 3), TypeError),
        (_arguments(log_probs, (*options[:-1], "1")), TypeError),
    ):
        with pytest.raises(error):
            module.grpo_loss(*wrong)


@pytest.mark.parametrize("attributes", [False, True])
def test_what_tensors_may_be_like(module: Any, attributes: bool) -> None:
    """Those that want gradients, of inference mode, with an offset, expanded, transposed, of the next axis, empty."""
    module.set_tensor_type(torch.Tensor, attributes)
    logits = torch.linspace(-3.0, 3.0, 60).view(3, 5, 4)
    ids = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 1], [2, 3, 0, 1, 2]])
    expected = grpo_kernels.token_log_probs(logits[1:, :, :].clone(), ids[1:].clone()).log_probs

    def check(values: Tensor, wanted: Tensor, mask: Tensor | None = None) -> None:
        found = grpo_kernels.token_log_probs(values, wanted, mask=mask).log_probs
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=0)

    check(logits[1:], ids[1:])
    check(torch.nn.Parameter(logits)[1:], ids[1:].int())
    check(logits[1:].transpose(0, 2).contiguous().transpose(0, 2), ids[1:].t().contiguous().t())
    check(logits[1:], ids[1:], torch.ones(1, 1, dtype=torch.bool).expand(2, 5))
    with torch.inference_mode():
        check(logits[1:].clone(), ids[1:].clone())
    assert grpo_kernels.token_log_probs(logits[:0], ids[:0]).log_probs.shape == (0, 5)
