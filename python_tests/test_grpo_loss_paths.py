"""grpo_loss on the CPU: the short ways through its kernel give what the long one does, and gradients that are returned
as they were stored belong to the caller alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig
from grpo_kernels.grpo_loss import upstream as upstream_module
from grpo_kernels.grpo_loss.metrics import NAMES
from python_tests.samples.grpo_loss import batch, call, config_of
from python_tests.test_grpo_loss import Inputs, assert_equal, assert_results_as_accurate, cast, run

NAN, INF = math.nan, math.inf
LENGTHS = (1500, 1024, 5, 0, 2047)  # around a segment of 1024 tokens
TAME = ("ppo", "ppo_on_policy", "ppo_token_advantages", "cispo_cap", "cispo_bounds", "reinforce", "kl_k3")
UNIFORM = ("gspo", "sapo_sequence")
pytestmark = pytest.mark.usefixtures("native_cpu")


def long_batch(variant: str) -> Inputs:
    return {**cast(batch(variant, lengths=LENGTHS), torch.float32), "sampler_log_probs": None, "entropy": None}


def outcome(inputs: Inputs, config: GRPOLossConfig, **options: Any) -> list[Tensor]:
    """Loss, gradient of log_probs, that of an entropy which nobody gave, and metrics."""
    loss, gradient, metrics = run(inputs, config, **options)
    return [loss, gradient, torch.zeros(1), metrics]


def by_stages(inputs: Inputs, config: GRPOLossConfig, **options: Any) -> list[Tensor]:
    """The same by the long way, which weights of one ask for."""
    return outcome({**inputs, "token_weights": torch.ones_like(inputs["log_probs"])}, config, **options)


def spoiled(inputs: Inputs, log_prob: float, old: float, ref: float = -1.0) -> Inputs:
    """The batch with one wild live token in the second segment of its first row, whose advantage is 1."""
    inputs = {name: None if value is None else value.clone() for name, value in inputs.items()}
    inputs["mask"][0, 1100] = True
    inputs["advantages"][0] = 1.0
    for name, value in (("log_probs", log_prob), ("old_log_probs", old), ("ref_log_probs", ref)):
        if inputs[name] is not None:
            inputs[name][0, 1100] = value
    return inputs


# --- long rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean_token_mean"])
@pytest.mark.parametrize("variant", TAME + UNIFORM)
def test_segments_are_as_accurate_as_float32_allows(variant: str, reduction: str) -> None:
    config = config_of(variant, reduction)
    inputs = long_batch(variant)
    results = []
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "reference"), (torch.float32, "reference")):
        with grpo_kernels.backend(backend):
            results.append([outcome(cast(inputs, dtype), config)])
    assert_results_as_accurate(*results)


@pytest.mark.parametrize(
    ("log_prob", "old"),
    [(-301.0, -1.0), (-1.0, -301.0), (-INF, -INF), (-INF, -1.0), (NAN, -1.0), (-1.0, NAN), (INF, 0.0)],
)
@pytest.mark.parametrize("variant", TAME + UNIFORM)
def test_wild_tokens_take_the_long_way_and_leave_others_alone(variant: str, log_prob: float, old: float) -> None:
    config = config_of(variant, "token_sum")  # so that no count of tokens reaches a gradient
    clean = spoiled(long_batch(variant), -1.0, -1.25)
    inputs = spoiled(clean, log_prob, old)
    plain, actual = outcome(clean, config), outcome(inputs, config)
    assert_equal(actual, by_stages(inputs, config), rtol=1e-6, atol=1e-6)
    others = torch.ones_like(plain[1], dtype=torch.bool)
    others[0, slice(None) if variant in UNIFORM else slice(1100, 1101)] = False
    assert torch.equal(actual[1][others], plain[1][others])


@pytest.mark.parametrize("ref", [NAN, INF, -INF])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5, NAN])
def test_a_wild_reference_takes_the_long_way(kl_coef: float, ref: float) -> None:
    config = config_of("kl_k3", "token_mean")
    inputs, options = spoiled(long_batch("kl_k3"), -1.0, -1.25, ref), {"kl_coef": torch.tensor(kl_coef)}
    assert_equal(outcome(inputs, config, **options), by_stages(inputs, config, **options), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", UNIFORM)
def test_a_row_at_once_equals_its_tokens(variant: str) -> None:
    inputs = cast(long_batch(variant), torch.float64)
    inputs["log_probs"][0, 7] = inputs["old_log_probs"][0, 7] = -INF  # no slope
    inputs["log_probs"][1, 7] = NAN
    for reduction in ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"):
        config = config_of(variant, reduction)
        assert_equal(outcome(inputs, config), by_stages(inputs, config), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", ["ppo", "kl_k3", *UNIFORM])
def test_threads_change_no_bit(variant: str) -> None:
    config, inputs = config_of(variant, "sequence_mean_token_mean"), long_batch(variant)
    inputs = {
        name: None if value is None else value.repeat(4, *[1] * (value.ndim - 1)) for name, value in inputs.items()
    }
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outcome(inputs, config))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_equal(result, results[0])


# --- gradients that are returned as they were stored ------------------------------------------------------------------


def _loss(variant: str = "ppo") -> tuple[Tensor, Tensor]:
    inputs: dict[str, Any] = long_batch(variant)
    leaf = inputs["log_probs"].requires_grad_()
    return leaf, call(inputs, config_of(variant, "token_mean")).loss


def test_an_upstream_of_one_returns_what_was_stored() -> None:
    for variant in ("ppo", "gspo"):
        leaf, loss = _loss(variant)
        stored = loss.grad_fn.saved_tensors[0]
        address, value = stored.data_ptr(), stored.clone()
        del stored
        loss.backward()
        assert leaf.grad.data_ptr() == address
        assert torch.equal(leaf.grad, value)
        leaf, loss = _loss(variant)
        torch.testing.assert_close(torch.autograd.grad(2 * loss, leaf)[0], 2 * value)


def test_a_kept_graph_gives_every_caller_a_gradient_of_its_own() -> None:
    leaf, loss = _loss()
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    value = first.clone()
    first.zero_()  # as an optimiser that reuses gradients would
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, value)
    leaf.grad.mul_(-1)
    loss.backward()
    assert torch.equal(leaf.grad, torch.zeros_like(value))


def test_gradients_accumulate_over_losses() -> None:
    leaf, loss = _loss()
    value = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    doubled = leaf * 1.0  # a node between, which sums what two losses send
    inputs: dict[str, Any] = {**long_batch("ppo"), "log_probs": doubled}
    losses = [call(inputs, config_of("ppo", "token_mean")).loss for _ in range(2)]
    leaf.register_hook(lambda grad: grad.mul_(0.5))
    (losses[0] + losses[1]).backward()
    assert torch.equal(leaf.grad, value)
    losses = [call({**inputs, "log_probs": leaf}, config_of("ppo", "token_mean")).loss for _ in range(2)]
    for one in losses:
        one.backward()
    assert torch.equal(leaf.grad, 2 * value)


def test_torch_without_the_private_name_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    leaf, loss = _loss()
    value = torch.autograd.grad(loss, leaf)[0]
    monkeypatch.setattr(upstream_module, "_keeps_graph", lambda: True)
    leaf, loss = _loss()
    address = loss.grad_fn.saved_tensors[0].data_ptr()
    gradient = torch.autograd.grad(loss, leaf)[0]
    assert gradient.data_ptr() != address
    assert torch.equal(gradient, value)


def test_scale_is_what_is_left_to_multiply_by() -> None:
    for variant in ("ppo", "gspo", "everything", "skip_empty"):
        inputs, config = cast(batch(variant), torch.float32), config_of(variant, "sequence_mean_token_mean")
        inputs["log_probs"].requires_grad_()
        inputs["entropy"].requires_grad_()
        output = call(inputs, config)
        assert output.loss.grad_fn.saved_tensors[2][0] == 1.0
        assert output.metrics.values[NAMES.index("tokens")] == inputs["mask"].sum()


class _WithoutGradient(torch.autograd.Function):
    """Passes the loss on and sends nothing back."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("reduction", ["token_mean", "none"])
def test_a_loss_that_gets_no_gradient_sends_none(reduction: str) -> None:
    inputs: dict[str, Any] = long_batch("ppo")
    leaf = inputs["log_probs"].requires_grad_()
    passed = _WithoutGradient.apply(call(inputs, config_of("ppo", reduction)).loss)
    (passed.sum() + leaf.sum()).backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
