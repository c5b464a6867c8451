"""linear_grpo_loss: which gradients it forms and when, what it saves, how its products are cast, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing

import grpo_kernels
from grpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss
from grpo_kernels.linear_log_probs import chunks
from python_tests.linear_grpo_problems import (
    EVERY,
    VOCAB,
    WIDTH,
    assert_close,
    call,
    cast,
    definition,
    judge,
    leaves_of,
    problem,
    run,
)
from python_tests.samples.grpo_loss import config_of

pytestmark = pytest.mark.usefixtures("native_cpu")


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end inside sequences."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 5)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_value_and_metrics_are_those_of_the_loss_bit_for_bit() -> None:
    for variant in ("kl_k3", "gspo", "sequence_mask"):
        p = cast(problem(variant)[0], torch.float32)
        config = config_of(variant, "token_mean")
        output = run(p, config)[0]
        expected = grpo_loss(
            output.log_probs, p["old_log_probs"], p["advantages"], p["mask"], config, entropy=output.entropy,
            **{name: p[name] for name in ("ref_log_probs", "sampler_log_probs", "token_weights")},
        )  # fmt: skip
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.metrics.values, expected.metrics.values)
        assert not output.log_probs.requires_grad
        assert not output.entropy.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice(dtype: torch.dtype) -> None:
    p = cast(problem()[0], torch.float32, half=dtype)
    leaves = leaves_of(p, EVERY)
    loss = call({**p, **leaves}, config_of("entropy_bonus", "token_mean")).loss
    wanted = list(leaves.values())
    upstream = torch.tensor(-0.3)
    first = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    third = torch.autograd.grad(loss * 2 - loss, wanted, upstream)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
        assert a.data_ptr() != b.data_ptr()


def test_a_parameter_that_changes_before_the_backward_raises() -> None:
    p, _ = problem()
    for name in ("weight", "hidden", "old_log_probs"):
        leaves = leaves_of(p, EVERY)
        inputs = {**p, **leaves, "old_log_probs": p["old_log_probs"].clone()}
        loss = call(inputs, GRPOLossConfig()).loss
        with torch.no_grad():
            inputs[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize(
    "trained", [("hidden",), ("weight",), ("bias",), ("a",), ("b",), ("a", "b"), ("hidden", "a", "b")]
)
def test_only_what_needs_a_gradient_gets_one(trained: tuple[str, ...]) -> None:
    p, _ = problem("entropy_bonus")
    config = config_of("entropy_bonus", "token_mean")
    actual = run(p, config, trained=trained)
    assert actual[0].metrics.passes == 1
    assert_close(actual, definition(p, config, torch.float64))


def test_without_gradient_only_the_value_is_computed() -> None:
    p, _ = problem()
    config = config_of("gspo", "token_mean")
    expected = run(p, config)[0]
    with torch.no_grad():
        found = call({**p, **leaves_of(p, EVERY)}, config)
    for output in (found, call(p, config)):
        assert not output.loss.requires_grad
        assert output.metrics.passes == 1
        torch.testing.assert_close(output.loss, expected.loss.detach())


def test_the_gradient_is_given_away_and_not_copied() -> None:
    p = cast(problem()[0], torch.float32)
    leaves = leaves_of(p, EVERY)
    loss = call({**p, **leaves}, GRPOLossConfig()).loss
    held = loss.grad_fn.gradients
    addresses = {name: gradient.data_ptr() for name, gradient in zip(EVERY, held, strict=True)}
    del held
    (loss * 3.0).backward()
    assert {name: leaf.grad.data_ptr() for name, leaf in leaves.items()} == addresses


@pytest.mark.parametrize("variant", ["ppo", "entropy_mask"])
@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
def test_weight_grad_accumulator(variant: str, half: torch.dtype) -> None:
    p = cast(problem(variant)[0], torch.float32, half=half)
    config = config_of(variant, "token_mean")
    expected = run(cast(p, torch.float32), config, upstream=1.0)[1]["weight"]
    leaves = leaves_of(p, EVERY)
    accumulator = torch.full((VOCAB, WIDTH), 0.5)
    loss = call({**p, **leaves}, config, weight_grad_accumulator=accumulator).loss
    assert torch.equal(accumulator, torch.full((VOCAB, WIDTH), 0.5))
    for step in (1, 2):
        (loss * -3).backward(retain_graph=True)
        torch.testing.assert_close(accumulator, 0.5 - 3 * step * expected, rtol=1e-5, atol=1e-6)
    assert leaves["weight"].grad is None
    assert leaves["hidden"].grad is not None


def test_float16_takes_two_passes() -> None:
    p = cast(problem()[0], torch.float32, half=torch.float16)
    config = config_of("ppo", "token_mean")
    actual = run(p, config)
    assert actual[0].metrics.passes == 2
    judge([actual], [definition(cast(p, torch.float64), config, torch.float64)],
          [definition(cast(p, torch.float32), config, torch.float32)])  # fmt: skip


@pytest.mark.parametrize("half", ["hidden", "weight"])
def test_gradients_of_float16_leaves_of_a_float32_head_are_rounded_after_the_loss_is_scaled(half: str) -> None:
    """Unscaled ones would vanish: they go as one over the number of tokens."""
    config = config_of("ppo", "token_mean")
    tiny = {"num_items": 1e6}
    actual, exact, eager = [], [], []
    for seed in range(8):
        p = cast(problem(seed=seed)[0], torch.float32)
        p[half] = p[half].half()
        actual.append(run(p, config, upstream=1e4, **tiny))
        exact.append(definition(cast(p, torch.float64), config, torch.float64, upstream=1e4, **tiny))
        eager.append(definition(cast(p, torch.float32), config, torch.float32, upstream=1e4, **tiny))
        assert actual[-1][0].metrics.passes == 1
        assert actual[-1][1][half].dtype == torch.float16
    judge(actual, exact, eager)


def test_log_probs_of_inference_mode() -> None:
    """As they come from a rollout; autograd itself would not save them."""
    p, _ = problem("kl_k3")
    config = config_of("kl_k3", "token_mean")
    expected = run(p, config)
    with torch.inference_mode():
        stored = {name: p[name].clone() for name in ("old_log_probs", "ref_log_probs", "advantages")}
    assert stored["old_log_probs"].is_inference()
    actual = run({**p, **stored}, config)
    assert actual[0].metrics.passes == 1
    assert_close(actual, expected)


def test_autocast_casts_the_products_and_keeps_the_parameters() -> None:
    p = cast(problem()[0], torch.float32)
    config = config_of("ppo", "token_mean")
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(p, config)
    expected = run(cast(cast(p, torch.float32, half=torch.bfloat16), torch.float32), config)
    assert actual[0].metrics.passes == 1
    for name, gradient in actual[1].items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-6)


def test_backends() -> None:
    p, _ = problem()
    config = config_of("kl_k3", "token_mean")
    expected = definition(p, config, torch.float64)
    with grpo_kernels.backend("reference"):
        actual = run(p, config)
    assert actual[0].metrics.passes == 2
    assert_close(actual, expected)
    with grpo_kernels.backend("native"):
        assert_close(run(p, config), expected)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["kl_k3", "gspo"])
def test_compiled_calls_do_not_recompile(variant: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    config = config_of(variant, "token_mean")
    p = cast(problem(variant)[0], torch.float32)
    weight, bias = p["weight"].requires_grad_(), p["bias"].requires_grad_()

    def loss(hidden, ids, old, ref, advantages, kl_coef, temperature):
        return linear_grpo_loss(
            hidden, weight, ids, old, advantages, None, config, bias=bias, ref_log_probs=ref, kl_coef=kl_coef,
            entropy_coef=kl_coef * 0.5, temperature=temperature,
        ).loss * 0.5  # fmt: skip

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for step in range(2, 8):
        shape = (step, 2 * step)
        hidden = torch.randn(*shape, WIDTH, requires_grad=True)
        ids, old, ref = torch.randint(VOCAB, shape), -torch.rand(shape) - 3, -torch.rand(shape) - 3
        arguments = (hidden, ids, old, ref, torch.randn(step), 0.01 * step, 0.5 + 0.1 * step)
        actual, expected = compiled(*arguments), loss(*arguments)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, weight, bias)) for x in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_a_compiled_backward_adds_to_the_accumulator() -> None:
    torch._dynamo.reset()
    p = cast(problem()[0], torch.float32)
    leaves = leaves_of(p, EVERY)
    config = config_of("ppo", "token_mean")

    def backward(accumulator: torch.Tensor, function: Any) -> torch.Tensor:
        for _ in range(2):
            (function(accumulator) * -3).backward()
        return accumulator

    def loss(accumulator: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = call({**p, **leaves}, config, weight_grad_accumulator=accumulator).loss
        return found

    expected = backward(torch.ones(VOCAB, WIDTH), loss)
    actual = backward(torch.ones(VOCAB, WIDTH), torch.compile(loss, backend="aot_eager", fullgraph=True))
    assert (expected != 1).any()
    torch.testing.assert_close(actual, expected)
    assert leaves["weight"].grad is None
