"""build_permutation, moe_permute and moe_unpermute: the map against a loop, the moves against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import grpo_kernels
from grpo_kernels import Permutation, build_permutation, moe_permute, moe_unpermute
from grpo_kernels.moe_permute.reference import row_bound
from grpo_kernels.testing import assert_as_accurate, guarded_allocations, poisoned_allocations

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN = float("nan")
NATIVE = pytest.mark.parametrize("backend", ["native"], indirect=True)  # what is said of the kernels alone


def routes(tokens: int, top_k: int, experts: int, missing: float = 0.1) -> Tensor:
    """[T, K] int64, some without an expert."""
    ids = torch.randint(0, experts, (tokens, top_k))
    ids[torch.rand(tokens, top_k) < missing] = -1
    return ids


@poisoned_allocations()
def check_map(ids: Tensor, experts: int, alignment: int = 1, expert_range: tuple[int, int] | None = None) -> None:
    """Against a loop over experts and slots; every entry is asserted."""
    permutation = build_permutation(ids, experts, alignment=alignment, expert_range=expert_range)
    first, last = expert_range or (0, experts)
    flat = ids.reshape(-1).tolist()
    bound = len(flat) + min(last - first, len(flat)) * (alignment - 1)
    inverse: list[int] = []
    offsets, counts = [], []
    for expert in range(first, last):
        slots = [slot for slot, value in enumerate(flat) if value == expert]
        inverse += slots + [-1] * (-len(slots) % alignment)
        offsets.append(len(inverse))
        counts.append(len(slots))
    rows = {slot: row for row, slot in enumerate(inverse) if slot >= 0}
    assert len(inverse) <= bound - bound % alignment
    assert [tensor.dtype for tensor in permutation] == [torch.int32] * 4
    assert permutation.inv_map.tolist() == inverse + [-1] * (bound - bound % alignment - len(inverse))
    assert permutation.row_id_map.reshape(-1).tolist() == [rows.get(slot, -1) for slot in range(len(flat))]
    assert permutation.row_id_map.shape == ids.shape
    assert permutation.offsets.tolist() == offsets
    assert permutation.tokens_per_expert.tolist() == counts


# --- the map ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 6),
    experts=st.integers(1, 12),
    alignment=st.sampled_from([1, 2, 3, 8, 128]),
    data=st.data(),
)
def test_map_properties(tokens: int, top_k: int, experts: int, alignment: int, data: st.DataObject) -> None:
    """Stable, every live slot once, segments aligned, the rest -1; whatever the routes."""
    slots = st.lists(st.integers(-2, experts - 1), min_size=tokens * top_k, max_size=tokens * top_k)
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    ids = torch.tensor(data.draw(slots), dtype=dtype).view(tokens, top_k)
    first = data.draw(st.integers(0, experts))
    expert_range = data.draw(st.sampled_from([None, (first, data.draw(st.integers(first, experts)))]))
    check_map(ids, experts, alignment, expert_range)


@pytest.mark.parametrize("alignment", [1, 8, 128])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(0, 8, 256), (1, 1, 1), (1, 8, 256), (300, 1, 7), (50, 22, 1024), (64, 4, 1)]
)
def test_map_shapes(tokens: int, top_k: int, experts: int, alignment: int) -> None:
    check_map(routes(tokens, top_k, experts), experts, alignment)


@pytest.mark.parametrize("expert_range", [None, (5, 9), (3, 5), (0, 0)])
def test_all_tokens_to_one_expert(expert_range: tuple[int, int] | None) -> None:
    check_map(torch.full((70, 2), 5), 64, 16, expert_range)


def test_no_slot_has_an_expert() -> None:
    check_map(torch.full((9, 2), -1), 4, 8)
    check_map(torch.full((9, 2), -(2**40)), 4, 1)


def test_ids_of_other_ranks_are_global() -> None:
    """A rank's experts count from its first one; the ids of the others have no row."""
    ids = torch.tensor([[0, 4], [5, 7], [4, 1]])
    permutation = build_permutation(ids, 8, expert_range=(4, 8))
    assert permutation.row_id_map.tolist() == [[-1, 0], [2, 3], [1, -1]]
    assert permutation.tokens_per_expert.tolist() == [2, 1, 0, 1]
    assert permutation.offsets.tolist() == [2, 3, 3, 4]


def test_map_of_many_slots_does_not_depend_on_the_threads(backend: str) -> None:
    ids = routes(20000, 4, 100).int()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(build_permutation(ids, 100, alignment=16))
    finally:
        torch.set_num_threads(threads)
    with grpo_kernels.backend("reference"):
        expected = build_permutation(ids, 100, alignment=16)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_ids_that_are_not_contiguous(layout: str) -> None:
    ids = routes(4, 30, 9)
    check_map(ids.T if layout == "transposed" else ids[:, ::3], 9, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_id_out_of_range_is_named(dtype: torch.dtype) -> None:
    ids = torch.zeros(9000, 4, dtype=dtype)
    ids[8191, 2], ids[7000, 3] = 8, 9
    with pytest.raises(ValueError, match=r"build_permutation: topk_ids\[7000, 3\] must be < num_experts = 8.* got 9"):
        build_permutation(ids, 8)
    with pytest.raises(ValueError, match=r"topk_ids\[7000, 3\]"):
        build_permutation(ids, 8, expert_range=(0, 2))


def test_row_bound_is_tight() -> None:
    """As many experts as can be, each with one row more than full tiles: not a row too few, not a tile too many."""
    ids = torch.arange(6).view(3, 2)
    assert build_permutation(ids, 100, alignment=8).inv_map.shape == (48,)
    assert build_permutation(ids, 100, alignment=8).offsets[-1] == 48
    assert [row_bound(10, 4, 8), row_bound(10, 100, 8), row_bound(10, 0, 8), row_bound(0, 4, 8)] == [32, 80, 8, 0]


# --- the moves -------------------------------------------------------------------------------------------------------


def definition(
    dtype: torch.dtype, x: Tensor, y: Tensor, weights: Tensor, row_id_map: Tensor, upstream: tuple[Tensor, ...]
) -> list[Tensor]:
    """Values and gradients of both moves in `dtype`, one (token, slot) after the other."""
    x, y, weights, grad_rows, grad_tokens = (v.to(dtype) for v in (x, y, weights, *upstream))
    rows, tokens, grad_x = torch.zeros_like(y), torch.zeros_like(x), torch.zeros_like(x)
    grad_y, grad_weights = torch.zeros_like(y), torch.zeros_like(weights)
    for token, slots in enumerate(row_id_map.tolist()):
        for k, row in enumerate(slots):
            if row < 0:
                continue
            rows[row] = x[token]
            tokens[token] += weights[token, k] * y[row]
            grad_x[token] += grad_rows[row]
            grad_y[row] = weights[token, k] * grad_tokens[token]
            grad_weights[token, k] = (grad_tokens[token] * y[row]).sum()
    return [rows, tokens, grad_x, grad_y, grad_weights]


@poisoned_allocations()
def check_moves(dtype: torch.dtype, hidden: int, tokens: int = 24, top_k: int = 3, **options: Any) -> None:
    """Values and gradients, with NaN in everything that must not be read."""
    ids = routes(tokens, top_k, 6)
    with grpo_kernels.backend("reference"):
        permutation = build_permutation(ids, 6, **options)
    rows = permutation.inv_map.shape[0]
    dead = permutation.inv_map < 0
    x, y = torch.randn(tokens, hidden).to(dtype), torch.randn(rows, hidden).to(dtype)
    weights = torch.rand(tokens, top_k)
    upstream = torch.randn(rows, hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
    values = (x, y, weights, permutation.row_id_map, upstream)
    expected, plain = definition(torch.float64, *values), definition(torch.float32, *values)
    y[dead], upstream[0][dead] = NAN, NAN
    weights[permutation.row_id_map < 0] = NAN
    leaves = [v.clone().requires_grad_() for v in (x, y, weights)]
    permuted = moe_permute(leaves[0], permutation)
    summed = moe_unpermute(leaves[1], permutation, leaves[2])
    gradients = torch.autograd.grad((permuted, summed), leaves, upstream)
    assert torch.equal(permuted, expected[0].to(dtype))
    assert permuted[dead].count_nonzero() == gradients[1][dead].count_nonzero() == 0
    assert [summed.dtype, *(g.dtype for g in gradients)] == [dtype, dtype, dtype, torch.float32]
    for name, actual, wanted, eager in zip(
        ("tokens", "grad_x", "grad_y", "grad_weights"), (summed, *gradients), expected[1:], plain[1:], strict=True
    ):
        assert_as_accurate(actual, wanted, eager, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 2, 63, 64, 200, 1031, 4100])
def test_moves_against_float64(dtype: torch.dtype, hidden: int) -> None:
    check_moves(dtype, hidden, alignment=4)


@pytest.mark.parametrize(
    "options", [{}, {"alignment": 128}, {"expert_range": (2, 4)}, {"expert_range": (6, 6)}], ids=str
)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (7, 1), (5, 12)])
def test_moves_of_every_map(tokens: int, top_k: int, options: dict[str, Any]) -> None:
    check_moves(torch.bfloat16, 24, tokens, top_k, **options)


@poisoned_allocations()
def test_moves_of_rows_that_leave_the_caches() -> None:
    """Results beyond a few megabytes take another way out of the processor; so do rows that no line begins with."""
    ids = routes(600, 4, 6, 0.0)
    permutation = build_permutation(ids, 6, alignment=8)
    x = torch.randn(600, 1031)
    rows = moe_permute(x, permutation)
    live = permutation.inv_map >= 0
    assert torch.equal(rows[live], x[permutation.inv_map[live] // 4])
    assert rows[~live].count_nonzero() == 0
    weights = torch.rand(600, 4, requires_grad=True)
    leaf = rows.clone().requires_grad_()
    grad_y, grad_weights = torch.autograd.grad(moe_unpermute(leaf, permutation, weights), (leaf, weights), x)
    index = permutation.inv_map[live].long()
    assert torch.equal(grad_y[live], x[index // 4] * weights.detach().view(-1)[index, None])
    assert grad_y[~live].count_nonzero() == 0
    products = x.double().pow(2).sum(1)[:, None].expand(-1, 4)
    assert_as_accurate(grad_weights, products, x.pow(2).sum(1)[:, None].expand(-1, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_weights_rows_are_added(dtype: torch.dtype) -> None:
    """And the gradient of the one move is the other move."""
    permutation = build_permutation(routes(11, 3, 4), 4, alignment=8)
    y = torch.randn(permutation.inv_map.shape[0], 40).to(dtype)
    upstream = torch.randn(11, 40).to(dtype)
    y.requires_grad_()
    plain = moe_unpermute(y, permutation)
    ones = moe_unpermute(y, permutation, torch.ones(11, 3))
    assert torch.equal(plain, ones)
    assert torch.equal(torch.autograd.grad(plain, y, upstream)[0], moe_permute(upstream, permutation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_any_float(dtype: torch.dtype) -> None:
    permutation = build_permutation(torch.tensor([[1, 0], [0, -1]]), 2)
    y = torch.randn(4, 5)
    weights = torch.tensor([[0.5, 0.25], [2.0, NAN]]).to(dtype).requires_grad_()
    tokens = moe_unpermute(y, permutation, weights)
    (gradient,) = torch.autograd.grad(tokens.sum(), weights)
    torch.testing.assert_close(tokens, torch.stack([0.5 * y[2] + 0.25 * y[0], 2.0 * y[1]]))
    assert gradient.dtype == dtype
    expected = torch.stack([torch.stack([y[2].sum(), y[0].sum()]), torch.stack([y[1].sum(), torch.zeros(())])])
    torch.testing.assert_close(gradient, expected.to(dtype))


def test_gradcheck() -> None:
    permutation = build_permutation(routes(5, 3, 4), 4, alignment=2)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b: moe_unpermute(moe_permute(a, permutation).sin(), permutation, b), (x, weights)
    )


def test_bf16_gradient_of_the_rows_does_not_grow_with_k() -> None:
    """32 slots: sums in bf16, one slot after another, lose whole digits; rounded once they keep theirs."""
    check_moves(torch.bfloat16, 96, 6, 32)


def test_views_are_read_where_they_lie() -> None:
    permutation = build_permutation(routes(9, 2, 5, 0.0), 5)
    base = torch.randn(9, 50)
    view = base[:, 3:40]
    assert torch.equal(moe_permute(view, permutation), moe_permute(view.contiguous(), permutation))
    rows = torch.randn(36, 50)[::2, 3:40]
    assert torch.equal(moe_unpermute(rows, permutation), moe_unpermute(rows.contiguous(), permutation))
    columns = torch.randn(37, 9).T
    assert torch.equal(moe_permute(columns, permutation), moe_permute(columns.contiguous(), permutation))
    one = torch.randn(1, 37).expand(9, 37)
    assert torch.equal(moe_permute(one, permutation), one[:1].expand(18, 37))


def test_special_values_are_copied_and_stay_where_they_are(backend: str) -> None:
    permutation = build_permutation(torch.tensor([[0, 1], [1, 0], [2, -1]]), 3)
    x = torch.randn(3, 8).bfloat16()
    x[0, 3], x[1, 2], x[2, 1] = NAN, float("inf"), -0.0
    rows = moe_permute(x, permutation)
    expected = x[permutation.inv_map[:5] // 2]
    torch.testing.assert_close(rows[:5], expected, rtol=0, atol=0, equal_nan=True)
    if backend == "native":
        assert torch.equal(rows[:5].view(torch.int16), expected.view(torch.int16))
    tokens = moe_unpermute(rows, permutation)
    assert tokens[0].isnan().tolist() == x[0].isnan().tolist()
    assert tokens[1:].isnan().sum() == 0
    assert tokens[1, 2] == float("inf")


@NATIVE
def test_a_token_does_not_depend_on_the_others() -> None:
    """Nor on the threads: bit for bit, in value and gradients."""
    ids = routes(400, 4, 16)
    y, weights, upstream = torch.randn(1600, 300), torch.rand(400, 4), torch.randn(400, 300)

    def run(tokens: slice, rows: Tensor) -> list[Tensor]:
        permutation = build_permutation(ids[tokens], 16)
        live = permutation.inv_map >= 0
        placed = torch.zeros(permutation.inv_map.shape[0], 300)
        placed[live] = rows[permutation.inv_map[live].long()]
        leaves = [placed.requires_grad_(), weights[tokens].clone().requires_grad_()]
        out = moe_unpermute(leaves[0], permutation, leaves[1])
        grad_y, grad_weights = torch.autograd.grad(out, leaves, upstream[tokens])
        by_slot = torch.zeros_like(rows[: permutation.row_id_map.numel()])
        by_slot[permutation.inv_map[live].long()] = grad_y[live]
        return [out.detach(), grad_weights, by_slot]

    whole = run(slice(None), y)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = run(slice(None), y)
    finally:
        torch.set_num_threads(threads)
    alone = run(slice(37, 38), y[37 * 4 : 38 * 4])
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert torch.equal(alone[0][0], whole[0][37])
    assert torch.equal(alone[1][0], whole[1][37])
    assert torch.equal(alone[2], whole[2][37 * 4 : 38 * 4])


def test_nothing_outside_the_tensors_is_touched() -> None:
    with guarded_allocations():
        check_moves(torch.float32, 1031, 50, 4, alignment=8)
        check_map(routes(300, 4, 50), 50, 8)


# --- around it -------------------------------------------------------------------------------------------------------


@NATIVE
def test_what_is_saved() -> None:
    """The two maps; the rows only for the gradient of the weights."""
    permutation = build_permutation(routes(8, 2, 4, 0.0), 4)
    maps = {permutation.row_id_map.data_ptr(), permutation.inv_map.data_ptr()}
    y, weights = torch.randn(16, 4, requires_grad=True), torch.rand(8, 2)

    def saved(leaf: Tensor | None, learned: bool) -> set[int]:
        found: set[int] = set()
        pack = lambda tensor: found.add(tensor.data_ptr()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            moe_unpermute(y, permutation, None if leaf is None else leaf.requires_grad_(learned))
        return found

    assert saved(None, False) == maps
    assert saved(weights, False) == {*maps, weights.data_ptr()}
    assert saved(weights, True) == {*maps, weights.data_ptr(), y.data_ptr()}
    with torch.no_grad():
        assert not moe_unpermute(y, permutation, weights).requires_grad
        assert not moe_permute(y[:8], permutation).requires_grad


@NATIVE
def test_checkpoint_and_compile_give_the_same_gradients() -> None:
    """No shape depends on the routes, and nothing is compiled for a length: neither a recomputation nor a graph meets
    another number of rows."""

    def layer(ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
        permutation = build_permutation(ids, 5, alignment=4)
        rows = moe_permute(a, permutation)
        return moe_unpermute(rows * rows.sigmoid(), permutation, b)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (12, 12, 17, 2, 30):
        ids = routes(tokens, 2, 5)
        x, weights = torch.randn(tokens, 9, requires_grad=True), torch.rand(tokens, 2, requires_grad=True)
        plain = torch.autograd.grad(layer(ids, x, weights).pow(2).sum(), (x, weights))
        for out in (compiled(ids, x, weights), checkpoint(layer, ids, x, weights, use_reentrant=False)):
            for a, b in zip(torch.autograd.grad(out.pow(2).sum(), (x, weights)), plain, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 2


def test_other_maps_of_the_right_shape_are_taken() -> None:
    """A Permutation is data: one that came through another process, or was cut, is as good."""
    permutation = build_permutation(routes(6, 2, 3, 0.0), 3)
    copy = Permutation(*(tensor.clone() for tensor in permutation))
    x = torch.randn(6, 4)
    assert torch.equal(moe_permute(x, copy), moe_permute(x, permutation))
