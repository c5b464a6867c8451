"""token_log_probs: memory layouts, the backward in place, what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import grpo_kernels
from grpo_kernels import token_log_probs
from grpo_kernels.token_log_probs import layout
from python_tests.test_token_log_probs import DTYPES, EVERY_OUTPUT, OPTIONS, needs_native, resolve_options, run_eager

# --- memory layouts --------------------------------------------------------------------------------------------------

VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "columns": lambda x: x[..., :40],
    "offset": lambda x: x[1:, 1:, 3:50],
    "transposed": lambda x: x.transpose(0, 1),
    "strided_rows": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
    "dead_axis": lambda x: x[:, 2:3],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_need_no_copy_and_change_nothing(view: str) -> None:
    base = torch.randn(3, 5, 64)
    x = VIEWS[view](base)
    assert layout.row_layout(x) is not None
    ids = torch.randint(x.shape[-1], x.shape[:-1])
    out = token_log_probs(x, ids, outputs=EVERY_OUTPUT)
    dense = token_log_probs(x.clone(memory_format=torch.contiguous_format), ids, outputs=EVERY_OUTPUT)
    assert all(torch.equal(a, b) for a, b in zip(out, dense, strict=True))
    leaves = [base.clone().requires_grad_(), base.clone().requires_grad_()]
    token_log_probs(VIEWS[view](leaves[0]), ids).log_probs.sum().backward()
    token_log_probs(VIEWS[view](leaves[1]).contiguous(), ids).log_probs.sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize(
    "make",
    [lambda x: x.transpose(1, 2), lambda x: x[..., ::2], lambda x: x[:, :, None].expand(3, 4, 2, 6)[:, ::2]],
    ids=["transposed_vocab", "strided_vocab", "three_strides"],
)
def test_other_layouts_are_copied(make: Any) -> None:
    x = make(torch.randn(3, 4, 6, dtype=torch.float64))
    ids = torch.randint(x.shape[-1], x.shape[:-1])
    ones = (torch.ones(ids.shape), torch.ones(ids.shape))
    expected = run_eager(x, ids, ones, torch.float64)
    leaf = x.detach().requires_grad_()
    out = token_log_probs(leaf, ids, outputs=("entropy",))
    gradient = torch.autograd.grad(out.log_probs.sum() + out.entropy.sum(), leaf)[0]
    torch.testing.assert_close(out.log_probs, expected[0])
    torch.testing.assert_close(gradient, expected[3])


@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    st.integers(1, 3),
    st.booleans(),
)
def test_row_layout_finds_every_row(axes: list[tuple[int, bool]], vocab: int, swap: bool) -> None:
    """Whatever the view, the layout's offsets are those of the rows, and overlap is noticed."""
    storage = torch.arange(4**5 * 9)
    stride, strides = vocab + 1, []
    for size, gap in reversed(axes):
        strides.insert(0, stride)
        stride *= size + gap
    x = storage.as_strided([size for size, _ in axes] + [vocab], [*strides, 1])
    if swap and len(axes) > 1:
        x = x.transpose(0, 1)
    rows = layout.row_layout(x)
    if rows is None:
        assert x.ndim > 3
        return
    expected = x[..., 0].reshape(-1).tolist()
    offsets = [r // rows.inner * rows.outer_stride + r % rows.inner * rows.inner_stride for r in range(rows.rows)]
    assert offsets == expected
    assert layout.overwritable(x)
    assert not layout.overwritable(x[:1].expand(2, *x.shape[1:]))


# --- in place --------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["dense", "shifted", "columns", "transposed"])
def test_inplace_backward_gives_the_same_bits_in_the_logits(dtype: torch.dtype, options: str, view: str) -> None:
    select = VIEWS.get(view, lambda x: x)
    base = (torch.randn(3, 5, 300) * 3).to(dtype)
    ids = torch.randint(40, select(base).shape[:-1])
    arguments = resolve_options(options, 1)
    if isinstance(arguments.get("temperature"), Tensor):
        arguments["temperature"] = torch.rand(ids.shape) + 0.5
    gradients, storage = [], []
    for inplace in (False, True):
        logits = select(base.clone()).detach().requires_grad_()
        out = token_log_probs(logits, ids, outputs=("entropy",), inplace_backward=inplace, **arguments)
        gradients.append(torch.autograd.grad(out.log_probs.sum() + out.entropy.sum(), logits)[0])
        storage.append(logits.detach())
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(storage[1], gradients[0])
    assert gradients[1].data_ptr() == storage[1].data_ptr()
    assert not torch.equal(storage[0], gradients[0])


@needs_native
def test_inplace_backward_makes_later_uses_raise() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    ids = torch.randint(16, (4,))
    logits = hidden @ weight.T
    squares = logits.pow(2).sum()  # saves the logits
    out = token_log_probs(logits, ids, inplace_backward=True)
    out.log_probs.sum().backward(retain_graph=True)
    assert hidden.grad is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.log_probs.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@needs_native
def test_inplace_backward_through_a_model() -> None:
    ids = torch.randint(16, (4,))
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 16)
        out = token_log_probs(layer(torch.randn(4, 8)), ids, outputs=("entropy",), inplace_backward=inplace)
        (out.log_probs.sum() + 0.1 * out.entropy.sum()).backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def test_second_backward_and_double_backward() -> None:
    leaf = torch.randn(3, 9, requires_grad=True)
    out = token_log_probs(leaf, torch.tensor([1, 2, 3]), outputs=("entropy",))
    loss = out.log_probs.sum() + out.entropy.sum()
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf, retain_graph=True)[0])
    with grpo_kernels.backend("native"):
        out = token_log_probs(leaf, torch.tensor([1, 2, 3]))
    upstream = torch.ones(3, requires_grad=True)
    gradient = torch.autograd.grad(out.log_probs, leaf, upstream, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_native
def test_nothing_but_row_statistics_is_saved() -> None:
    leaf = torch.randn(8, 1000, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_log_probs(leaf, torch.zeros(8, dtype=torch.int64), outputs=EVERY_OUTPUT)
        extra = [t for t in saved if t.data_ptr() != leaf.data_ptr()]
        assert sum(t.numel() for t in extra) <= 8 * 5
        saved.clear()
        token_log_probs(leaf.detach(), torch.zeros(8, dtype=torch.int64), outputs=EVERY_OUTPUT)
        assert saved == []
