"""`GRPOLossConfig.verl` against verl's own functions: policy term, aggregation, entropy and KL, value and gradient."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import GRPOLossConfig, grpo_loss

core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
pytestmark = pytest.mark.slow

MODES: list[dict[str, Any]] = [
    {},
    {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5},
    {"loss_mode": "dppo_tv", "clip_ratio_low": 0.03, "clip_ratio_high": 0.05},
    {"loss_mode": "dppo_kl", "clip_ratio_low": 0.004, "clip_ratio_high": 0.01, "clip_ratio_c": 1.2},
    {"loss_mode": "gspo", "clip_ratio_low": 0.05, "clip_ratio_high": 0.1},
    {"loss_mode": "sapo", "tau_neg": 2.0},
    {"loss_mode": "gpg"},
    {"loss_mode": "clip_cov", "clip_cov_lb": 0.1, "clip_cov_ub": 0.8, "clip_cov_ratio": 1.0},
    {"loss_mode": "kl_cov", "kl_cov_ratio": 0.2},
    {"loss_mode": "geo_mean"},
    {"loss_mode": "dro", "dro_beta": 0.7},
    {"loss_mode": "cispo"},
]
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
DEFAULTS = (
    "clip_ratio",
    "clip_ratio_low",
    "clip_ratio_high",
    "clip_ratio_c",
    "loss_agg_mode",
    "loss_scale_factor",
    "entropy_coeff",
    "use_kl_loss",
    "kl_loss_coef",
    "kl_loss_type",
    "tau_pos",
    "tau_neg",
)


def batch(seed: int) -> dict[str, Tensor]:
    """[6, 11] float64, ragged; a row is empty, and log-ratios of 30 stand where verl clamps them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 11)

    def normal(scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    lp = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = torch.arange(11) < torch.tensor([11, 4, 1, 0, 7, 10])[:, None]
    old = torch.minimum(lp + normal(0.3), torch.tensor(-1e-3, dtype=torch.float64))
    if seed % 2:
        old[0, 3], old[4, 2] = lp[0, 3] - 30, lp[4, 2] - 30
    entropy = torch.rand(shape, generator=generator, dtype=torch.float64)
    return {"lp": lp, "old": old, "a": normal(1.0), "mask": mask, "ref": lp + normal(0.4), "entropy": entropy}


POLICY = ("loss_mode", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta")


def actor(options: dict[str, Any]) -> Any:
    config = importlib.import_module("verl.workers.config")
    policy = config.PolicyLossConfig(**{name: value for name, value in options.items() if name in POLICY})
    others = {name: value for name, value in options.items() if name not in POLICY}
    made = config.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **others
    )
    made.global_batch_info["loss_scale_factor"] = made.loss_scale_factor
    return made


def verls(x: dict[str, Tensor], options: dict[str, Any], weights: Tensor | None) -> Tensor:
    """What verl's `ppo_loss` puts together."""
    config = actor(options)
    mode, aggregation = config.policy_loss.loss_mode, config.loss_agg_mode
    policy_loss = core.get_policy_loss_fn(mode)
    # a copy: some of verl's losses write into what they get
    loss, _ = policy_loss(x["old"], x["lp"] + 0, x["a"] + 0, x["mask"], aggregation, config, weights)
    info = config.global_batch_info
    if config.entropy_coeff:
        loss = loss - config.entropy_coeff * core.agg_loss(x["entropy"], x["mask"], aggregation, **info)
    if config.use_kl_loss:
        kl = core.kl_penalty(x["lp"], x["ref"], config.kl_loss_type)
        loss = loss + config.kl_loss_coef * core.agg_loss(kl, x["mask"], aggregation, **info)
    return loss


def ours(x: dict[str, Tensor], options: dict[str, Any], weights: Tensor | None) -> Tensor:
    config = GRPOLossConfig.verl(**options)
    others = {"ref_log_probs": x["ref"], "entropy": x["entropy"], "token_weights": weights}
    return grpo_loss(x["lp"], x["old"], x["a"], x["mask"], config, **others).loss


def assert_same(options: dict[str, Any], seed: int, weights: Tensor | None = None) -> None:
    results = []
    for function in (ours, verls):
        x = batch(seed)
        leaves = x["lp"].requires_grad_(), x["entropy"].requires_grad_()
        loss = function(x, options, weights)
        results.append((loss, *torch.autograd.grad(loss, leaves, materialize_grads=True)))
    # verl adds 1e-8 to the length of a sequence
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-10)
    assert results[0][1].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("options", MODES, ids=str)
def test_every_mode_and_aggregation(options: dict[str, Any], aggregation: str) -> None:
    for seed in range(4):
        if options.get("loss_mode") in ("dro", "kl_cov", "geo_mean") and seed % 2:
            continue  # no clamp: a log-ratio of 30 leaves nothing else to see
        for scale in (None, 77) if aggregation.endswith("norm") else (None,):
            assert_same({**options, "loss_agg_mode": aggregation, "loss_scale_factor": scale}, seed)


@pytest.mark.parametrize("options", [mode for mode in MODES if mode.get("loss_mode") != "geo_mean"], ids=str)
def test_rollout_weights(options: dict[str, Any]) -> None:
    weights = 0.5 + torch.rand(6, 11, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert_same({**options, "loss_agg_mode": "seq-mean-token-mean"}, 2, weights)


@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "mse+", "k3+"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_kl_and_entropy(aggregation: str, kind: str) -> None:
    terms = {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": kind, "entropy_coeff": 0.2}
    for seed in range(2):
        assert_same({**terms, "loss_agg_mode": aggregation}, seed)
    if aggregation == "seq-mean-token-mean":
        for mode in ("gspo", "sapo"):
            assert_same({**terms, "loss_mode": mode, "loss_agg_mode": aggregation}, 0)


def test_the_defaults_are_verls() -> None:
    assert GRPOLossConfig.verl() == GRPOLossConfig.verl(
        **{name: getattr(actor({}), name) for name in DEFAULTS},
        **{name: getattr(actor({}).policy_loss, name) for name in POLICY},
    )
