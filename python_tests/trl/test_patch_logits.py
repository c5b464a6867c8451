"""TRL's functions of logits on the kernels: values and gradients against float64, what stays with TRL's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs TRL")

from trl.trainer import utils

from grpo_kernels import backend
from grpo_kernels.integrations.trl import head, logits
from grpo_kernels.testing import assert_as_accurate

pytestmark = [pytest.mark.trl, pytest.mark.slow]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = [(3, 5, 37), (7, 1000), (2, 3, 2, 11), (1, 0, 9)]


class Counted:
    """TRL's module with its own functions counted."""

    def __init__(self) -> None:
        self.calls = 0
        for name in ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"):
            setattr(self, name, self._counted(getattr(utils, name)))
        self.is_triton_available = utils.is_triton_available
        self._supports_trl_loss_kernel = utils._supports_trl_loss_kernel

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return function(*arguments, **options)

        return call


@pytest.fixture
def trl(native_cpu: None) -> Counted:
    return Counted()


def make(*shape: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    return (torch.randn(shape) * 3).to(dtype).requires_grad_(), torch.randint(shape[-1], shape[:-1])


def definition(x: Tensor, ids: Tensor, temperature: float, row_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    log_p = (x / temperature).log_softmax(-1)
    log_probs = log_p.gather(-1, ids[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    if row_mask is None:
        return log_probs, entropy
    return log_probs.masked_fill(row_mask == 0, 0), entropy.masked_fill(row_mask == 0, 0)


def gradient(log_probs: Tensor, entropy: Tensor, x: Tensor) -> Tensor:
    """That of a loss with another derivative for every row's log-prob and entropy."""
    slopes = torch.linspace(-1, 1, 2 * log_probs.numel(), dtype=F64).view(2, *log_probs.shape)
    return torch.autograd.grad((log_probs * slopes[0]).sum() + (entropy * slopes[1]).sum(), x)[0]


@pytest.mark.parametrize("mask", [None, torch.bool, torch.int64])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_formulas(
    shape: tuple[int, ...], dtype: torch.dtype, mask: torch.dtype | None, trl: Counted
) -> None:
    x, ids = make(*shape, dtype=dtype)
    row_mask = None if mask is None else (torch.rand(shape[:-1]) < 0.6).to(mask)
    options: dict[str, Any] = {"temperature": 0.8, "row_mask": row_mask}
    log_probs, entropy = logits.selective_log_softmax_and_entropy(trl)(x, ids, **options)
    assert log_probs.dtype == entropy.dtype == dtype
    assert torch.equal(logits.selective_log_softmax(trl)(x, ids, **options), log_probs)
    actual = gradient(log_probs, entropy, x)
    assert actual.dtype == dtype
    assert trl.calls == 0
    exact_x, eager_x = (x.detach().to(wide).requires_grad_() for wide in (F64, F64 if dtype == F64 else F32))
    exact, eager = (definition(leaf, ids, 0.8, row_mask) for leaf in (exact_x, eager_x))
    if x.numel():
        assert_as_accurate(log_probs.detach(), exact[0].detach(), eager[0].detach(), name="log_probs")
        assert_as_accurate(entropy.detach(), exact[1].detach(), eager[1].detach(), name="entropy")
        assert_as_accurate(actual, gradient(*exact, exact_x), gradient(*eager, eager_x), name="gradient")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_entropy_alone(dtype: torch.dtype, trl: Counted) -> None:
    x, ids = make(3, 5, 37, dtype=dtype)
    entropy = logits.entropy_from_logits(trl)(x, chunk_size=4)
    assert entropy.dtype == dtype
    exact_x, eager_x = (x.detach().to(wide).requires_grad_() for wide in (F64, F32))
    exact, eager = (definition(leaf, ids, 1.0, None)[1] for leaf in (exact_x, eager_x))
    assert_as_accurate(entropy.detach(), exact.detach(), eager.detach())
    grads = [torch.autograd.grad(e.sum(), leaf)[0] for e, leaf in ((entropy, x), (exact, exact_x), (eager, eager_x))]
    assert_as_accurate(*grads, name="gradient")
    assert trl.calls == 0


def test_equal_to_trl_in_value_and_gradient(trl: Counted) -> None:
    x, ids = make(4, 6, 50)
    row_mask = torch.rand(4, 6) < 0.6
    for options in ({}, {"temperature": 0.7}, {"temperature": 2, "row_mask": row_mask}):
        ours = logits.selective_log_softmax_and_entropy(trl)(x, ids, **options)
        stock = utils.selective_log_softmax_and_entropy(x, ids, **options)
        torch.testing.assert_close(ours, stock)
        torch.testing.assert_close(gradient(*ours, x), gradient(*stock, x))
    assert trl.calls == 0


def test_an_entropy_that_is_only_logged_has_no_gradient(trl: Counted) -> None:
    x, ids = make(4, 50)
    log_probs, entropy = logits.selective_log_softmax_and_entropy(trl)(x, ids, False)
    assert log_probs.requires_grad
    assert not entropy.requires_grad
    with torch.no_grad():
        again = logits.selective_log_softmax_and_entropy(trl)(x, ids)
    assert not again[0].requires_grad
    assert not again[1].requires_grad
    assert torch.equal(again[1], entropy)


def test_views_are_read_and_never_written(trl: Counted) -> None:
    whole = torch.randn(3, 9, 40)
    before = whole.clone()
    for view in (whole[:, 2:-1], whole.transpose(0, 1), whole[..., ::2]):
        ids = torch.randint(view.shape[-1], view.shape[:-1])
        x = view.detach().requires_grad_()
        ours = logits.selective_log_softmax(trl)(x, ids)
        torch.testing.assert_close(ours, utils.selective_log_softmax(x, ids))
        ours.sum().backward()
    assert torch.equal(whole, before)
    assert trl.calls == 0


def test_what_is_behind_the_mask_reaches_nothing(trl: Counted) -> None:
    x, ids = make(2, 4, 30)
    row_mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    with torch.no_grad():
        x[row_mask == 0] = float("nan")
    wrong = ids.masked_fill(row_mask == 0, -100)
    log_probs, entropy = logits.selective_log_softmax_and_entropy(trl)(x, wrong, row_mask=row_mask)
    assert not log_probs[row_mask == 0].any()
    assert not entropy[row_mask == 0].any()
    grad = gradient(log_probs, entropy, x)
    assert not grad[row_mask == 0].any()
    assert grad.isfinite().all()


def several_ids(x: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"index": torch.stack([ids, ids.roll(1)], -1)}


def short_mask(x: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"index": ids, "row_mask": torch.ones(ids.shape[-1:])}


@pytest.mark.parametrize("case", [several_ids, short_mask])
def test_what_the_kernels_do_not_compute_stays_with_trl(case: Callable[..., dict[str, Any]], trl: Counted) -> None:
    x, ids = make(2, 4, 30)
    options = case(x, ids)
    ours = logits.selective_log_softmax(trl)(x, **options)
    assert torch.equal(ours, utils.selective_log_softmax(x, **options))
    assert trl.calls == 1


def test_without_kernels_trl_computes(trl: Counted) -> None:
    x, ids = make(2, 4, 30)
    with backend("reference"):
        logits.selective_log_softmax(trl)(x, ids)
        logits.entropy_from_logits(trl)(x)
        logits.selective_log_softmax_and_entropy(trl)(x, ids)
    assert trl.calls == 3
    assert not head.has_kernels("token_log_probs", x.to("meta"))


@pytest.mark.parametrize("function", [logits.selective_log_softmax, logits.selective_log_softmax_and_entropy])
def test_faults_raise_as_in_trl(function: Callable[..., Any], trl: Counted) -> None:
    x, ids = make(2, 4, 30)
    for temperature in (0, -1.0):
        with pytest.raises(ValueError, match=r"^temperature must be positive$"):
            function(trl)(x, ids, temperature=temperature)
    ids[1, 2] = -1
    with pytest.raises(ValueError, match="token_ids"):
        function(trl)(x, ids)
