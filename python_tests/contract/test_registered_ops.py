"""What every registered op must keep, whatever it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from grpo_kernels import _dispatch, _extension
from grpo_kernels.testing import poisoned_allocations
from python_tests import samples
from python_tests.samples import multiplies_matrices, tensors

CASES = [
    pytest.param(name, arguments, id=f"{name}-{index}")
    for module in samples.modules().values()
    for name, argument_lists in module.OPS.items()
    for index, arguments in enumerate(argument_lists)
]

_REAL_ALLCLOSE = torch.allclose

pytestmark = pytest.mark.skipif(
    bool(_extension.cpu_problem()), reason=f"native CPU kernels: {_extension.cpu_problem()}"
)


def _overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.grpo_kernels, name).default


def _fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies that keep strides: an op may write to its arguments."""
    return tuple(copy.deepcopy(argument) for argument in arguments)


def _outputs(name: str, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """What the op returns, and what it writes."""
    arguments = (*_fresh(arguments), "native")
    result = tensors(_overload(name)(*arguments))
    schema = _overload(name)._schema
    written = [
        a
        for a, s in zip(arguments, schema.arguments, strict=True)
        if s.alias_info is not None and s.alias_info.is_write
    ]
    return result + tensors(written)


def test_every_op_has_samples() -> None:
    sampled = {name for module in samples.modules().values() for name in module.OPS}
    assert sampled == set(_dispatch.registered_ops())


def _allclose(lhs: torch.Tensor, rhs: torch.Tensor, **options: Any) -> bool:
    """torch.allclose, which opcheck asks whether an input was modified, and which does not take eight-bit floats."""
    if lhs.dtype.is_floating_point and lhs.element_size() == 1:
        return torch.equal(lhs.view(torch.uint8), rhs.view(torch.uint8))
    return _REAL_ALLCLOSE(lhs, rhs, **options)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_opcheck(name: str, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "allclose", _allclose)
    torch.library.opcheck(_overload(name), (*_fresh(arguments), "native"))


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_fake_describes_the_real_outputs(name: str, arguments: tuple[Any, ...]) -> None:
    real = tensors(_overload(name)(*_fresh(arguments), "native"))
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    fake = tensors(_overload(name)(*meta, "native"))
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_every_output_is_written_and_deterministic(name: str, arguments: tuple[Any, ...]) -> None:
    clean = _outputs(name, arguments)
    with poisoned_allocations():
        poisoned = _outputs(name, arguments)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = _outputs(name, arguments)
    finally:
        torch.set_num_threads(threads)
    for expected, other, alone in zip(clean, poisoned, single, strict=True):
        torch.testing.assert_close(other, expected, rtol=0, atol=0, equal_nan=True)
        if not multiplies_matrices(name):
            torch.testing.assert_close(alone, expected, rtol=0, atol=0, equal_nan=True)
