"""Maps that do not belong together: the CPU says what is wrong, and nothing outside the tensors is touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grpo_kernels import Permutation, build_permutation, moe_permute, moe_unpermute
from grpo_kernels.moe_experts import ops as expert_ops
from grpo_kernels.moe_permute import ops
from grpo_kernels.testing import guard_input, guarded_allocations

pytestmark = pytest.mark.usefixtures("backend")

IDS = torch.tensor([[0, 1], [2, 0], [-1, 1]])  # rows 0, 1: expert 0; 2, 3: expert 1; 4: expert 2; 5: padding
HIDDEN = 70
NATIVE = pytest.mark.parametrize("backend", ["native"], indirect=True)


def changed(row_of: dict[tuple[int, int], int] | None = None, slot_of: dict[int, int] | None = None) -> Permutation:
    """The map of IDS, with other entries."""
    permutation = build_permutation(IDS, 3)
    assert permutation.row_id_map.tolist() == [[0, 2], [4, 1], [-1, 3]]
    assert permutation.inv_map.tolist() == [0, 3, 1, 5, 2, -1]
    for (token, k), row in (row_of or {}).items():
        permutation.row_id_map[token, k] = row
    for row, slot in (slot_of or {}).items():
        permutation.inv_map[row] = slot
    return permutation


TOO_FAR = {
    "the next row": ({(1, 0): 6}, r"row_id_map\[1, 0\] must be < R = 6, or negative for no row, got 6"),
    "a far row": ({(1, 1): 2**30}, r"row_id_map\[1, 1\] must be < R = 6, .* got 1073741824"),
    "the first of two": ({(2, 1): 7, (0, 1): 2**31 - 1}, r"row_id_map\[0, 1\] must be .* got 2147483647"),
}
TORN = {
    "the next slot": ({}, {3: 6}, r"inv_map\[3\] must be < T \* K = 6, or negative for padding, got 6"),
    "a far slot": ({}, {0: 2**30}, r"inv_map\[0\] must be < T \* K = 6, or negative for padding, got 1073741824"),
    "a row that nobody writes": ({(0, 1): -1}, {}, r"inv_map\[2\] must be negative, or the slot .* is 2, got 1"),
    "a row of two slots": ({(2, 0): 4}, {}, r"row_id_map\[2, 0\] must be negative, or the row .* is 4, got 4"),
    "a row of padding": ({(0, 0): 5}, {}, r"row_id_map\[0, 0\] must be negative, or the row .* is 0, got 5"),
    "padding of a slot": ({}, {5: 4}, r"inv_map\[5\] must be negative, or the slot .* is 5, got 4"),
}
FAULTS = {**TORN, **{name: (rows, {}, message) for name, (rows, message) in TOO_FAR.items()}}


def guarded(*tensors: Tensor) -> list[Tensor]:
    return [guard_input(tensor) for tensor in tensors]


def raises_unharmed(call: Callable[[], object], message: str) -> None:
    """The call raises, and has not written around its outputs."""
    with pytest.raises(ValueError, match=message), guarded_allocations():
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("fault", TOO_FAR)
def test_rows_that_are_not_there(fault: str, dtype: torch.dtype) -> None:
    rows, message = TOO_FAR[fault]
    permutation = changed(rows)
    permutation = Permutation(*guarded(*permutation[:2]), *permutation[2:])
    x, y, weights = guarded(torch.randn(3, HIDDEN).to(dtype), torch.randn(6, HIDDEN).to(dtype), torch.rand(3, 2))
    raises_unharmed(lambda: moe_permute(x, permutation), "^moe_permute: permutation." + message)
    raises_unharmed(lambda: moe_unpermute(y, permutation), "^moe_unpermute: permutation." + message)
    raises_unharmed(lambda: moe_unpermute(y, permutation, weights), "^moe_unpermute: permutation." + message)


@pytest.mark.parametrize("fault", TORN)
def test_maps_that_contradict_each_other(fault: str) -> None:
    """Each would leave a row unwritten, or have it written twice."""
    rows, slots, message = TORN[fault]
    raises_unharmed(
        lambda: moe_permute(torch.randn(3, HIDDEN), changed(rows, slots)), "^moe_permute: permutation." + message
    )


def test_a_map_that_was_cut() -> None:
    permutation = build_permutation(torch.randint(0, 4, (64, 2)), 4)
    cut = permutation._replace(inv_map=permutation.inv_map[:16].clone())
    x, y = guarded(torch.randn(64, HIDDEN), torch.zeros(16, HIDDEN))
    raises_unharmed(lambda: moe_permute(x, cut), r"row_id_map\[\d+, \d\] must be < R = 16")
    raises_unharmed(lambda: moe_unpermute(y, cut), r"row_id_map\[\d+, \d\] must be < R = 16")
    other = permutation._replace(row_id_map=permutation.row_id_map[:8].clone())
    raises_unharmed(lambda: moe_permute(x[:8], other), r"permutation\.")


@NATIVE
@pytest.mark.parametrize("fault", FAULTS)
def test_kernels_with_weights(fault: str) -> None:
    """What the gradients are made of."""
    rows, slots, message = FAULTS[fault]
    maps = guarded(*changed(rows, slots)[:2])
    x, y, weights = guarded(torch.randn(3, HIDDEN), torch.randn(6, HIDDEN), torch.rand(3, 2))
    raises_unharmed(lambda: ops.moe_permute(x, *maps, weights, "native"), "^moe_permute: permutation." + message)
    backward = "^moe_unpermute: permutation." + message
    raises_unharmed(lambda: ops.moe_unpermute_backward(x, y, *maps, weights, "native"), backward)


@NATIVE
def test_the_first_fault_of_many_threads_is_named() -> None:
    ids = torch.randint(0, 16, (4000, 4))
    permutation = build_permutation(ids, 16)
    permutation.row_id_map[1000:3000:100, 1] = 16000
    for call in (
        lambda: moe_permute(torch.randn(4000, 64), permutation),
        lambda: moe_unpermute(torch.randn(16000, 64), permutation),
    ):
        raises_unharmed(
            call, r"permutation.row_id_map\[1000, 1\] must be < R = 16000, or negative for no row, got 16000"
        )


@NATIVE
@pytest.mark.parametrize("slot", [6, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_activation_of_a_slot_that_is_not_there(dtype: torch.dtype, slot: int) -> None:
    """No weight is read and no gradient of a weight is written there; without weights every slot is good."""
    inv_map = torch.tensor([3, 0, slot, -1, slot, 5], dtype=torch.int32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    preact, grad = torch.randn(6, 2 * HIDDEN).to(dtype), torch.randn(6, HIDDEN).to(dtype)
    preact, grad, inv_map, weights = guarded(preact, grad, inv_map, torch.rand(3, 2).to(wide))
    options, message = (
        (False, 1.0, 1.0, False),
        rf"inv_map\[2\] must be < T \* K = 6, or negative for padding, got {slot}",
    )
    raises_unharmed(lambda: expert_ops.moe_glu(preact, inv_map, weights, *options, "native"), "^moe_glu: " + message)
    raises_unharmed(
        lambda: expert_ops.moe_glu_backward(preact, grad, inv_map, weights, None, *options, True, True, True, "native"),
        "^moe_glu_backward: " + message,
    )
    whole = expert_ops.moe_glu(preact, torch.arange(6, dtype=torch.int32), None, *options, "native")
    whole[3] = 0
    assert torch.equal(expert_ops.moe_glu(preact, inv_map, None, *options, "native"), whole)


def test_compiled_code_meets_the_same_fault(backend: str) -> None:
    """Kernels look when they run; what a compiler makes of the definition cannot, and takes such a row for none."""
    permutation = changed({(1, 0): 2**30}, {4: 2**30})
    compiled = torch.compile(moe_permute, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, HIDDEN)
    if backend == "native":
        raises_unharmed(
            lambda: compiled(x, permutation), r"^moe_permute: permutation.row_id_map\[1, 0\] must be < R = 6"
        )
    else:
        assert torch.equal(compiled(x, permutation), moe_permute(x, changed({(1, 0): -1}, {4: -1})))
