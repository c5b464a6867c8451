"""grpo_loss: edge rules by their values, in the kernels and the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch._dynamo.testing

import grpo_kernels
from grpo_kernels import GRPOLossConfig, grpo_loss
from grpo_kernels.grpo_loss.choices import REDUCTIONS
from grpo_kernels.grpo_loss.metrics import NAMES
from python_tests.samples.grpo_loss import VARIANTS, batch, config_of
from python_tests.test_grpo_loss import Inputs, assert_equal, cast, run

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("garbage", [NAN, INF])
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_tokens_may_hold_anything(variant: str, garbage: float, backend: str) -> None:
    clean = cast(batch(variant), torch.float32)
    mask = clean["mask"]
    dirty = {
        name: torch.where(mask, value, garbage) if value is not None and value.shape == mask.shape else value
        for name, value in clean.items()
        if name != "mask"
    }
    for reduction in REDUCTIONS:
        config = config_of(variant, reduction)
        actual = run({**dirty, "mask": mask}, config)
        assert_equal(actual, run(clean, config))
        assert not actual[1][~mask].any()
        assert not actual[2][~mask].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_live_gives_zero(variant: str, backend: str) -> None:
    inputs = cast(batch(variant), torch.float32)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    for reduction in REDUCTIONS:
        config = config_of(variant, reduction)
        loss, gradient, entropy_gradient, metrics = run(inputs, config)
        assert not loss.any()
        assert not gradient.any()
        assert not entropy_gradient.any()
        values = grpo_kernels.GRPOMetrics(metrics).to_dict()
        assert {k: v for k, v in values.items() if v} == {"masked_fraction": 1.0}


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches(shape: tuple[int, int], backend: str) -> None:
    inputs: Inputs = {name: torch.zeros(shape) for name in ("log_probs", "old_log_probs", "ref_log_probs", "entropy")}
    inputs |= {"sampler_log_probs": torch.zeros(shape), "token_weights": torch.zeros(shape[0]), "mask": None}
    inputs["advantages"] = torch.zeros(shape[0])
    for reduction in REDUCTIONS:
        config = config_of("everything", reduction)
        loss, gradient, entropy_gradient, _ = run(inputs, config)
        assert loss.shape == (shape if reduction == "none" else ())
        assert not loss.any()
        assert gradient.shape == entropy_gradient.shape == shape
    cu_seqlens = torch.zeros(shape[0] + 1, dtype=torch.int32)
    packed = {k: v.reshape(-1)[:0] if v is not None and v.ndim == 2 else v for k, v in inputs.items()}
    assert not run(packed, config_of("everything", "token_mean"), cu_seqlens=cu_seqlens)[0].any()


def _tokens(log_probs: list[float], old: list[float], advantages: list[float], config: GRPOLossConfig, **more: Any):
    """Per-token losses and gradients of one sequence."""
    lp = torch.tensor([log_probs], dtype=torch.float32, requires_grad=True)
    more = {name: torch.tensor([value]) for name, value in more.items()}
    loss = grpo_loss(lp, torch.tensor([old]), torch.tensor([advantages]), None, config, **more).loss
    return loss.tolist()[0], torch.autograd.grad(loss.sum(), lp)[0].tolist()[0]


NONE = GRPOLossConfig(reduction="none")


def test_gradient_is_full_on_the_clip_bounds(backend: str) -> None:
    for config in (GRPOLossConfig(reduction="none", clip_low=0.0), GRPOLossConfig(reduction="none", delta=1.0)):
        loss, gradient = _tokens([-1.0, -1.0], [-1.0, -1.0], [2.0, -2.0], config)
        assert loss == [-2.0, 2.0]
        assert gradient == [-2.0, 2.0]


def test_an_overflowing_ratio_behind_a_clip_is_finite(backend: str) -> None:
    loss, gradient = _tokens([-1.0, -1.0], [-500.0, -500.0], [1.0, 0.0], NONE)
    assert loss == pytest.approx([-1.2, 0.0])
    assert gradient == [0.0, 0.0]
    loss, gradient = _tokens([-1.0], [-500.0], [-1.0], NONE)  # the unclipped branch has no bound
    assert loss == [INF]
    assert gradient == [INF]
    dual = GRPOLossConfig(reduction="none", dual_clip=3.0)
    assert _tokens([-1.0], [-500.0], [-1.0], dual) == ([3.0], [0.0])
    sapo = GRPOLossConfig(reduction="none", surrogate="sapo")
    assert _tokens([-1.0], [-500.0], [1.0], sapo) == ([-4.0], [0.0])


def test_infinite_log_probs(backend: str) -> None:
    loss, gradient = _tokens([-INF, -INF, -1.0], [-1.0, -INF, -INF], [1.0, 1.0, 1.0], NONE)
    assert loss == pytest.approx([0.0, -1.0, -1.2])
    assert gradient == [0.0, 0.0, 0.0]
    reinforce = GRPOLossConfig(reduction="none", surrogate="reinforce")
    assert _tokens([-INF, -INF], [0.0, 0.0], [1.0, 0.0], reinforce) == ([INF, 0.0], [-1.0, 0.0])
    kl = GRPOLossConfig(reduction="none", kl_coef=1.0)
    loss, _ = _tokens([-INF, -INF, -1.0], [-INF] * 3, [0.0] * 3, kl, ref_log_probs=[-INF, -1.0, -INF])
    assert loss == [0.0, INF, INF]


def test_nan_stays_in_its_token_or_sequence(backend: str) -> None:
    inputs = cast(batch(lengths=(4, 4)), torch.float32)
    inputs["mask"] = None
    inputs["log_probs"][0, 1] = NAN
    token = torch.zeros(2, 4, dtype=torch.bool)
    token[0, 1] = True
    sequence = token.any(1, keepdim=True).expand(2, 4)
    for fields, bad in (({}, token), ({"ratio_level": "sequence"}, sequence), ({"surrogate": "sapo"}, token)):
        loss, gradient, _, metrics = run(inputs, GRPOLossConfig(reduction="none", **fields))
        assert torch.equal(loss.isnan(), bad)
        assert torch.equal(gradient.isnan(), bad)
        assert metrics[NAMES.index("nonfinite")] == bad.sum()
        assert run(inputs, GRPOLossConfig(**fields))[0].isnan()


@pytest.mark.parametrize("bounds", [{"log_ratio_min": -20.0, "log_ratio_max": 20.0}, {"log_ratio_max": 10.0}], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("surrogate", ["ppo_clip", "cispo", "sapo", "dppo_tv", "kl_cov"])
def test_nan_passes_the_bounds_of_the_log_ratio(
    surrogate: str, level: str, bounds: dict[str, float], backend: str
) -> None:
    config = GRPOLossConfig(surrogate=surrogate, ratio_level=level, reduction="none", **bounds)
    inputs = batch(lengths=(4, 4))
    inputs["mask"] = None
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 1 if level == "token" else slice(None)] = True
    inputs["log_probs"][0, 1] = NAN
    loss, gradient, *_ = run(inputs, config)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(gradient.isnan(), bad)


def test_opposite_infinities_in_a_sequence_are_nan(backend: str) -> None:
    config = GRPOLossConfig(reduction="none", ratio_level="sequence", log_ratio_max=20.0)
    loss, gradient = _tokens([-1.0, -INF, -2.0], [-1.0, -1.0, -INF], [1.0] * 3, config)
    assert [math.isnan(value) for value in (*loss, *gradient)] == [True] * 6


@pytest.mark.parametrize("clamps", [{"kl_log_ratio_clamp": 20.0}, {"kl_value_clamp": 10.0}, {}], ids=str)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k3+"])
def test_nan_passes_the_clamps_of_the_kl(estimator: str, clamps: dict[str, float], backend: str) -> None:
    config = GRPOLossConfig(reduction="none", kl_coef=1.0, kl_estimator=estimator, **clamps)
    loss, gradient = _tokens([-1.0, -1.0], [-1.0, -1.0], [0.0, 0.0], config, ref_log_probs=[NAN, -1.0])
    assert [math.isnan(value) for value in loss] == [True, False]
    if estimator == "k1":  # its derivative is 1, whatever the values
        assert gradient == [1.0, 1.0]
    else:
        assert [math.isnan(value) for value in gradient] == [True, False]


def test_a_weight_of_zero_removes_the_policy_term(backend: str) -> None:
    loss, gradient = _tokens([-1.0, -1.0], [-500.0, -1.0], [-1.0, 1.0], NONE, token_weights=[0.0, 0.5])
    assert loss == [0.0, -0.5]
    assert gradient == [0.0, -0.5]


def test_missing_sampler_log_probs_mean_no_correction(backend: str) -> None:
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        config = GRPOLossConfig(reduction="none", sampler_correction=mode, sampler_cap=1.5)
        loss, _ = _tokens([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], config, sampler_log_probs=[NAN, -1.25])
        weight = math.exp(0.25)
        assert loss == pytest.approx([-weight if mode.startswith("sequence") else -1.0, -weight])
        loss, _ = _tokens([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], config, sampler_log_probs=[-1.0, -9.0])
        capped = 1.5 if mode.endswith("truncate") else 0.0
        assert loss == pytest.approx([-capped if mode.startswith("sequence") else -1.0, -capped])


def test_a_kl_coefficient_of_zero_on_the_device_adds_nothing(backend: str) -> None:
    lp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ref = torch.tensor([[-1.0, INF]])
    output = grpo_loss(lp, None, torch.ones(1), None, NONE, ref_log_probs=ref, kl_coef=torch.tensor(0.0))
    assert output.loss.tolist() == [[-1.0, -1.0]]
    assert torch.autograd.grad(output.loss.sum(), lp)[0].tolist() == [[-1.0, -1.0]]
