"""The guard bands themselves: planted accesses out of bounds must show, and honest ones must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grpo_kernels.testing import GuardBandError, guard_input, guarded_allocations, poisoned_allocations
from python_tests.gpu.devices import DEVICES

ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool]


def _element(tensor: Tensor, index: int) -> Tensor:
    """The element `index` places from the start of `tensor`, which need not be inside it."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + index)


@ON_DEVICES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("index", "says"), [(15, "after its end"), (-1, "before its start"), (40, "after its end")])
def test_one_element_written_outside_is_found(index: int, says: str, dtype: torch.dtype, device: str) -> None:
    def work() -> None:
        with guarded_allocations():
            innocent = torch.zeros(7, device=device)
            tensor = torch.empty(3, 5, dtype=dtype, device=device)
            _element(tensor, index).fill_(1)
            innocent.add_(1)

    with pytest.raises(GuardBandError, match=rf"^empty \[3, 5\].*test_guard.py:\d+: \d bytes overwritten {says}.*$"):
        work()


@ON_DEVICES
@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty(2, 3, device=x.device),
        lambda x: torch.empty_like(x),
        lambda x: torch.empty_strided((2, 3), (5, 1), device=x.device),
        lambda x: x.new_empty(2, 3),
        lambda x: x.new_empty_strided((2, 3), (1, 2)),
        lambda x: torch.zeros((2, 3), device=x.device),
        lambda x: torch.zeros_like(x),
        lambda x: x.new_zeros((2, 3)),
    ],
)
def test_every_allocator_is_guarded_and_gives_what_it_always_gives(
    allocate: Callable[[Tensor], Tensor], device: str
) -> None:
    like = torch.randn(3, 2, dtype=torch.float64, device=device).T
    plain = allocate(like)
    with guarded_allocations():
        tensor = allocate(like)
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) == (
        plain.shape,
        plain.stride(),
        plain.dtype,
        plain.device,
    )
    assert tensor.data_ptr() % 256 == 0
    assert not tensor._is_view()
    with pytest.raises(GuardBandError, match="after its end, the nearest 1 away"), guarded_allocations():
        _element(allocate(like), span).fill_(1)


def test_the_block_leaves_nothing_behind() -> None:
    real = torch.empty, torch.Tensor.new_empty
    with guarded_allocations():
        assert torch.empty is not real[0]
    assert (torch.empty, torch.Tensor.new_empty) == real
    with pytest.raises(ZeroDivisionError), guarded_allocations():
        raise ZeroDivisionError
    assert (torch.empty, torch.Tensor.new_empty) == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_not_written_is_nan(dtype: torch.dtype) -> None:
    with guarded_allocations():
        assert torch.empty(9, dtype=dtype).isnan().all()
        assert torch.zeros(9, dtype=dtype).eq(0).all()
        with poisoned_allocations():
            assert torch.empty(9, dtype=torch.int32).unique().tolist() == [-(2**30)]


def test_allocations_with_options() -> None:
    with guarded_allocations():
        leaf = torch.empty(2, requires_grad=True)
        assert leaf.is_leaf
        assert leaf.requires_grad
        assert torch.empty(0).shape == (0,)
        assert torch.empty(()).shape == ()
        assert torch.empty(2, device="meta").is_meta


@ON_DEVICES
def test_inputs_keep_values_strides_and_gradients(device: str) -> None:
    wide = torch.randn(4, 6, device=device)
    for tensor in (wide, wide.T, wide[:, :4], wide[1:, ::2], wide[0].expand(3, 6), wide[:0], wide[0, 0]):
        copy = guard_input(tensor)
        assert copy.stride() == tensor.stride()
        torch.testing.assert_close(copy, tensor, rtol=0, atol=0)
    leaf = guard_input(wide.requires_grad_())
    assert leaf.is_leaf
    (gradient,) = torch.autograd.grad((leaf * leaf).sum(), leaf)
    torch.testing.assert_close(gradient, 2 * wide.detach())


@ON_DEVICES
def test_reads_outside_an_input_show(device: str) -> None:
    floats = guard_input(torch.ones(4, 6, device=device)[:, :4])
    assert _element(floats, 6 * 3 + 4).isnan().all()
    assert _element(floats, -1).isnan().all()
    assert _element(floats, 4).isnan().all(), "between two rows"
    integers = guard_input(torch.ones(5, dtype=torch.int32, device=device))
    assert _element(integers, 5).item() < -(2**16)


@ON_DEVICES
def test_inputs_are_checked_in_the_block(device: str) -> None:
    with pytest.raises(GuardBandError, match=r"input \[5\] int64: 8 bytes overwritten after its end"):
        with guarded_allocations():
            _element(guard_input(torch.ones(5, dtype=torch.int64, device=device)), 5).zero_()
