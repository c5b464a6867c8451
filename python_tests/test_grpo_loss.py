"""grpo_loss: kernels against the float64 definition, forms of the inputs, gradients, properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig, grpo_loss
from grpo_kernels.grpo_loss.choices import REDUCTIONS
from grpo_kernels.grpo_loss.metrics import NAMES
from grpo_kernels.testing import assert_as_accurate
from python_tests.samples.grpo_loss import LENGTHS, VARIANTS, batch, call, config_of, pack

NAN, INF = math.nan, math.inf
LEAVES = ("log_probs", "entropy")
Inputs = dict[str, Tensor | None]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in inputs.items()}


def run(inputs: Inputs, config: GRPOLossConfig, **options: Any) -> list[Tensor]:
    """Loss, gradients of log_probs and entropy for an uneven upstream gradient, and metrics."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in LEAVES if inputs[name] is not None}
    output = call({**inputs, **leaves}, config, **options)
    upstream = torch.linspace(0.5, 1.5, output.loss.numel()).to(output.loss).view(output.loss.shape)
    gradients = torch.autograd.grad(output.loss, list(leaves.values()), upstream, materialize_grads=True)
    return [output.loss.detach(), *gradients, output.metrics.values]


def assert_equal(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


def assert_results_as_accurate(
    actual: list[list[Tensor]], expected: list[list[Tensor]], eager: list[list[Tensor]]
) -> None:
    """What `run` gave for several batches, judged together: the error of one number would be luck."""
    for part, name in enumerate(("loss", "grad_log_probs", "grad_entropy")):
        a, e, plain = (torch.cat([r[part].flatten() for r in results]) for results in (actual, expected, eager))
        assert a.dtype == torch.float32
        assert_as_accurate(a, e, plain, name=name)
    a, e, plain = (torch.stack([r[3] for r in results]) for results in (actual, expected, eager))
    for column, name in enumerate(NAMES):
        assert_as_accurate(a[:, column], e[:, column].double(), plain[:, column], name=name)


# --- the kernels against the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel_is_as_accurate_as_float32_allows(variant: str, reduction: str, native_cpu: None) -> None:
    config = config_of(variant, reduction)
    results: dict[str, list[list[Tensor]]] = {"actual": [], "expected": [], "eager": []}
    for seed in range(4):
        inputs, options = batch(variant, seed=seed), {}
        if seed % 2:
            inputs, cu_seqlens = pack(inputs)
            options["cu_seqlens"] = cu_seqlens.int() if seed == 1 else cu_seqlens
        with grpo_kernels.backend("native"):
            results["actual"].append(run(cast(inputs, torch.float32), config, **options))
        with grpo_kernels.backend("reference"):
            results["expected"].append(run(inputs, config, **options))
            results["eager"].append(run(cast(inputs, torch.float32), config, **options))
    assert_results_as_accurate(**results)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel_equals_the_definition_in_float64(variant: str, native_cpu: None) -> None:
    for reduction in REDUCTIONS:
        inputs, config = batch(variant), config_of(variant, reduction)
        with grpo_kernels.backend("reference"):
            expected = run(inputs, config)
        with grpo_kernels.backend("native"):
            actual = run(inputs, config)
        assert actual[0].dtype == actual[1].dtype == torch.float64
        assert_equal(actual, expected, rtol=1e-12, atol=1e-14)


def _extreme(inputs: Inputs, seed: int) -> Inputs:
    """Infinite, overflowing and equal log-probs, missing sampler log-probs, zero and huge weights in live tokens."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-INF, -2000.0, -800.0, -30.0, -1.0, -0.5, 0.0], dtype=torch.float64)

    def spoil(value: Tensor | None, choices: Tensor, share: float) -> Tensor | None:
        if value is None:
            return None
        pick = choices[torch.randint(len(choices), value.shape, generator=generator)]
        return torch.where(torch.rand(value.shape, generator=generator) < share, pick, value)

    spoiled = {name: spoil(inputs[name], values, 0.3) for name in ("log_probs", "old_log_probs", "ref_log_probs")}
    missing = torch.tensor([NAN, -INF, -800.0, -1.0], dtype=torch.float64)
    spoiled["sampler_log_probs"] = spoil(inputs["sampler_log_probs"], missing, 0.3)
    spoiled["token_weights"] = spoil(inputs["token_weights"], torch.tensor([0.0, 0.0, 1e300]).double(), 0.3)
    spoiled["advantages"] = spoil(inputs["advantages"], torch.zeros(1).double(), 0.3)
    return {**inputs, **spoiled}


@pytest.mark.parametrize("variant", VARIANTS)
def test_edge_rules_are_the_same_in_kernel_and_definition(variant: str, native_cpu: None) -> None:
    for seed in range(8):
        config = config_of(variant, REDUCTIONS[seed % len(REDUCTIONS)])
        inputs = _extreme(batch(variant, seed=seed), seed)
        with grpo_kernels.backend("reference"):
            expected = run(inputs, config)
        with grpo_kernels.backend("native"):
            actual = run(inputs, config)
        for part in (1, 2):  # where a gradient overflows, autograd may subtract infinities that the kernel never forms
            assert torch.equal(actual[part].isfinite(), expected[part].isfinite())
            actual[part], expected[part] = (values[part].nan_to_num(0, 0, 0) for values in (actual, expected))
        assert_equal(actual, expected, rtol=1e-12, atol=1e-14)


SMOOTH = [
    name
    for name, fields in VARIANTS.items()
    if fields.get("surrogate") not in ("cispo", "vespo", "dppo_tv", "dppo_kl")  # coefficients without a gradient
    and fields.get("ratio_level") != "sequence_token"
    and not str(fields.get("kl_estimator", "")).endswith("+")
    and fields.get("_old_log_probs", 0) is not None
]


@pytest.mark.parametrize("reduction", ["sequence_mean_token_mean", "none"])
@pytest.mark.parametrize("variant", SMOOTH)
def test_gradcheck(variant: str, reduction: str, native_cpu: None) -> None:
    inputs, config = batch(variant, lengths=(3, 2, 0), seed=1), config_of(variant, reduction)
    leaves = tuple(inputs[name].requires_grad_() for name in LEAVES)

    def function(*values: Tensor) -> Tensor:
        return call({**inputs, **dict(zip(LEAVES, values, strict=True))}, config).loss

    with grpo_kernels.backend("native"):
        assert torch.autograd.gradcheck(function, leaves, atol=1e-7)


# --- forms of the inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, backend: str) -> None:
    inputs = cast(batch("everything"), dtype)
    for reduction in REDUCTIONS:
        config = config_of("everything", reduction)
        actual, expected = run(inputs, config), run(cast(inputs, torch.float32), config)
        assert actual[0].dtype == torch.float32
        assert actual[1].dtype == actual[2].dtype == dtype
        assert_equal(actual, [expected[0], expected[1].to(dtype), expected[2].to(dtype), expected[3]])


def test_views_need_not_be_contiguous(backend: str) -> None:
    inputs = cast(batch("everything"), torch.float32)
    config = config_of("everything", "sequence_mean_token_mean")
    expected = run(inputs, config)
    shape = inputs["log_probs"].shape
    for view in (
        lambda t: torch.cat([torch.full_like(t[:, :2], 9), t], 1)[:, 2:],
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.stack([t, t], 1)[:, 1],
    ):
        viewed = {k: view(v) if v is not None and v.shape == shape else v for k, v in inputs.items()}
        leaves = [viewed[name].requires_grad_() for name in LEAVES]
        output = call(viewed, config)
        actual = [output.loss.detach(), *torch.autograd.grad(output.loss, leaves, torch.tensor(0.5))]
        torch.testing.assert_close([*actual, output.metrics.values], expected)


def test_masks_of_any_type(backend: str) -> None:
    inputs, config = cast(batch(), torch.float32), config_of("ppo", "sequence_mean_token_mean")
    mask = inputs["mask"]
    expected = run(inputs, config)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.bfloat16):
        assert_equal(run({**inputs, "mask": mask.to(dtype) * 2}, config), expected)
    everything = {**inputs, "mask": torch.ones_like(mask)}
    assert_equal(run({**inputs, "mask": None}, config), run(everything, config))


def test_per_sequence_arguments_spread_over_tokens(backend: str) -> None:
    inputs, config = cast(batch(), torch.float32), config_of("gspo", "token_mean")
    rows = torch.rand(len(LENGTHS), 1)
    full = rows.expand(inputs["log_probs"].shape)
    expected = run({**inputs, "token_weights": full.contiguous(), "advantages": (full - 0.5).contiguous()}, config)
    for weights in (rows, rows[:, 0], full):
        for advantages in ((rows - 0.5)[:, 0], full - 0.5):
            actual = run({**inputs, "token_weights": weights, "advantages": advantages}, config)
            assert_equal(actual, expected, rtol=1e-6, atol=1e-8)


def test_bad_cu_seqlens_raise_on_the_cpu(native_cpu: None) -> None:
    x = torch.zeros(6)
    with grpo_kernels.backend("native"):
        for bad in ([0, 4, 2], [-1, 2, 6], [0, 2, 7]):
            with pytest.raises(ValueError, match="grpo_loss: cu_seqlens must"):
                grpo_loss(x, None, torch.ones(2), None, cu_seqlens=torch.tensor(bad))


def test_backward_twice_and_with_any_upstream(backend: str) -> None:
    for reduction in ("token_mean", "none"):
        inputs = cast(batch("everything"), torch.float32)
        lp = inputs["log_probs"].requires_grad_()
        loss = call(inputs, config_of("everything", reduction)).loss
        upstream = torch.full_like(loss, -3.0)
        first = torch.autograd.grad(loss, lp, upstream, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, lp, upstream, retain_graph=True)[0], first)
        once = torch.autograd.grad(loss.sum(), lp)[0]
        torch.testing.assert_close(first, -3 * once)


def test_only_what_needs_a_gradient_gets_one(backend: str) -> None:
    for reduction in ("token_mean", "none"):
        inputs, config = cast(batch("everything"), torch.float32), config_of("everything", reduction)
        expected = run(inputs, config)
        assert not call(inputs, config).loss.requires_grad
        with torch.no_grad():
            assert torch.equal(
                call({**inputs, "log_probs": inputs["log_probs"].requires_grad_()}, config).loss, expected[0]
            )
        inputs["log_probs"].requires_grad_(False)
        entropy = inputs["entropy"].requires_grad_()
        output = call(inputs, config)
        assert not output.metrics.values.requires_grad
        upstream = torch.linspace(0.5, 1.5, output.loss.numel()).view(output.loss.shape)
        assert torch.equal(torch.autograd.grad(output.loss, entropy, upstream)[0], expected[2])


def test_compiled_calls_do_not_recompile(backend: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    config = config_of("kl_k3", "token_mean")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(lp, old, ref, advantages, kl_coef, num_items):
        return grpo_loss(
            lp, old, advantages, None, config, ref_log_probs=ref, kl_coef=kl_coef, num_items=num_items
        ).loss

    for step in range(2, 12):
        lp, old, ref = (-torch.rand(3, 2 * step) for _ in range(3))
        arguments = (lp.requires_grad_(), old, ref, torch.randn(3), 0.01 * step, float(7 * step))
        actual = compiled(*arguments)
        expected = grpo_loss(
            lp, old, arguments[3], None, config, ref_log_probs=ref, kl_coef=0.01 * step, num_items=7.0 * step
        ).loss
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, lp)[0] for loss in (actual, expected)))
    assert counter.frame_count <= 2


# --- properties ------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**16)


@given(SIZES, SEEDS, st.sampled_from(["ppo", "sapo", "cispo_bounds", "reinforce", "ppo_dual_clip"]))
def test_on_policy_gradient_is_the_advantage(lengths: list[int], seed: int, variant: str) -> None:
    inputs = batch(variant, lengths=(*lengths, 2), seed=seed)
    inputs |= {"old_log_probs": None, "token_weights": torch.rand(inputs["mask"].shape).double()}
    gradient = run(inputs, config_of(variant, "none"))[1]
    upstream = torch.linspace(0.5, 1.5, gradient.numel()).double().view(gradient.shape)
    expected = torch.where(inputs["mask"], -inputs["advantages"][:, None] * inputs["token_weights"] * upstream, 0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@given(SIZES, SEEDS)
def test_clipped_tokens_have_no_gradient(lengths: list[int], seed: int) -> None:
    inputs = batch(lengths=(*lengths, 2), seed=seed)
    gradient = run(inputs, config_of("ppo", "token_mean"))[1]
    ratio, advantage = (inputs["log_probs"] - inputs["old_log_probs"]).exp(), inputs["advantages"][:, None]
    clipped = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0)) | (advantage == 0)
    assert torch.equal(gradient == 0, clipped | ~inputs["mask"])


@given(SIZES, SEEDS, st.sampled_from(list(VARIANTS)), st.sampled_from(REDUCTIONS))
def test_packed_equals_padded(lengths: list[int], seed: int, variant: str, reduction: str) -> None:
    inputs, config = batch(variant, lengths=(*lengths, 2), seed=seed), config_of(variant, reduction)
    live = inputs["mask"]
    options = {"max_length": live.shape[1]} if reduction == "sequence_mean_token_sum_norm" else {}
    padded = run(inputs, config, **options)
    packed = {k: v[live] if v is not None and v.shape == live.shape else v for k, v in inputs.items()}
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), live.sum(1).cumsum(0)])
    leaves = [packed[name].requires_grad_() for name in LEAVES]
    output = call(packed, config, cu_seqlens=cu_seqlens, **options)
    shape = padded[0].shape
    upstream = torch.linspace(0.5, 1.5, padded[0].numel()).double().view(shape)
    upstream = upstream[live] if reduction == "none" else upstream
    gradients = torch.autograd.grad(output.loss, leaves, upstream, materialize_grads=True)
    expected = [value[live] if value.shape == live.shape else value for value in padded[:3]]
    assert_equal([output.loss.detach(), *gradients], expected, rtol=1e-12, atol=1e-14)
    kept = [index for index, name in enumerate(NAMES) if name != "total_tokens"]
    torch.testing.assert_close(output.metrics.values[kept], padded[3][kept], rtol=1e-6, atol=1e-6)


@given(SIZES, SEEDS, st.sampled_from(list(VARIANTS)))
def test_masked_tokens_have_no_gradient(lengths: list[int], seed: int, variant: str) -> None:
    inputs = batch(variant, lengths=(*lengths, 2), seed=seed)
    _, gradient, entropy_gradient, _ = run(inputs, config_of(variant, REDUCTIONS[seed % len(REDUCTIONS)]))
    assert not gradient[~inputs["mask"]].any()
    assert not entropy_gradient[~inputs["mask"]].any()
