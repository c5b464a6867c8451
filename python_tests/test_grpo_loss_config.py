"""Options of grpo_loss: validation, presets, TRL's names, the packed form; and the metrics."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from grpo_kernels import GRPOLossConfig, GRPOMetrics
from grpo_kernels.grpo_loss.metrics import MAXIMA, MINIMA, NAMES, SUMS
from python_tests.samples.grpo_loss import batch, call, config_of

WRONG = [
    ({"surrogate": "ppo"}, ValueError, "surrogate must be one of 'ppo_clip', 'cispo'"),
    ({"surrogate": 3}, TypeError, "surrogate must be a string, got int"),
    ({"ratio_level": "batch"}, ValueError, "ratio_level must be one of"),
    ({"reduction": "mean"}, ValueError, "reduction must be one of"),
    ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of"),
    ({"sampler_correction": "mask"}, ValueError, "sampler_correction must be one of"),
    ({"kl_importance_weighted": 1}, TypeError, "kl_importance_weighted must be a bool, got int"),
    ({"clip_low": -0.1}, ValueError, "clip_low must be a finite number at least 0, got -0.1"),
    ({"clip_low": None}, TypeError, "clip_low must be a number, got NoneType"),
    ({"clip_high": "0.2"}, TypeError, "clip_high must be a number or None, got str"),
    ({"clip_high": math.inf}, ValueError, "clip_high must be a finite number"),
    ({"delta": 0.0}, ValueError, "delta must be a finite number greater than 0"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip must be a finite number greater than 1"),
    ({"delta": 2.0, "dual_clip": 3.0}, ValueError, "delta and dual_clip"),
    ({"surrogate": "sapo", "sapo_temperature_pos": 0}, ValueError, "sapo_temperature_pos must be"),
    ({"surrogate": "vespo", "vespo_k_neg": math.nan}, ValueError, "vespo_k_neg must be a finite number"),
    ({"kl_coef": True}, TypeError, "kl_coef must be a number, got bool"),
    ({"kl_log_ratio_clamp": 0}, ValueError, "kl_log_ratio_clamp must be"),
    ({"top_entropy_quantile": 1.5}, ValueError, "top_entropy_quantile must be in [0, 1], got 1.5"),
    ({"off_policy_threshold": math.inf}, ValueError, "off_policy_threshold must be a finite number, got inf"),
    ({"max_length": 4.0}, TypeError, "max_length must be an int, got float"),
    ({"reduction": "sequence_mean_token_sum_norm", "max_length": 0}, ValueError, "max_length must be at least 1"),
    ({"sampler_correction": "token_truncate", "sampler_cap": None}, ValueError, "needs sampler_cap or sampler_floor"),
    ({"sampler_correction": "token_mask", "sampler_floor": 3.0}, ValueError, "sampler_floor must be less than"),
    ({"surrogate": "vespo", "sampler_correction": "sequence_mask"}, ValueError, "surrogate='vespo', which folds"),
    ({"skip_empty_sequences": 1}, TypeError, "skip_empty_sequences must be a bool, got int"),
    ({"entropy_reduction": "mean"}, ValueError, "entropy_reduction must be one of 'token_mean', 'loss'"),
    ({"log_ratio_min": 1.0, "log_ratio_max": 1.0}, ValueError, "log_ratio_min must be less than log_ratio_max"),
    ({"log_ratio_max": math.inf}, ValueError, "log_ratio_max must be a finite number, got inf"),
    ({"surrogate": "dro", "dro_beta": 0.0}, ValueError, "dro_beta must be a finite number greater than 0"),
    ({"surrogate": "clip_cov", "clip_cov_ratio": 1.5}, ValueError, "clip_cov_ratio must be in (0, 1], got 1.5"),
    ({"surrogate": "kl_cov", "kl_cov_ratio": 0.0}, ValueError, "kl_cov_ratio must be a finite number greater than 0"),
    ({"surrogate": "clip_cov", "clip_cov_low": 6.0}, ValueError, "clip_cov_low must be less than clip_cov_high"),
    # set, but used by nothing
    ({"surrogate": "gmpo", "ratio_level": "sequence"}, ValueError, "no effect with surrogate='gmpo'"),
    ({"surrogate": "gmpo", "kl_importance_weighted": True}, ValueError, "no effect with surrogate='gmpo'"),
    ({"surrogate": "gmpo", "log_ratio_max": 20.0}, ValueError, "no effect with surrogate='gmpo'"),
    ({"surrogate": "dro", "log_ratio_min": -20.0}, ValueError, "no effect with surrogate='dro' without"),
    ({"surrogate": "reinforce", "log_ratio_max": 20.0}, ValueError, "no effect with surrogate='reinforce' without"),
    ({"surrogate": "kl_cov", "clip_low": 0.1}, ValueError, "no effect with surrogate='kl_cov'"),
    ({"surrogate": "gmpo", "ratio_cap": 5.0}, ValueError, "ratio_cap=5.0 has no effect with surrogate='gmpo'"),
    ({"dro_beta": 1.0}, ValueError, "dro_beta=1.0 has no effect with surrogate='ppo_clip'"),
    ({"surrogate": "clip_cov", "kl_cov_coef": 2.0}, ValueError, "kl_cov_coef=2.0 has no effect"),
    ({"surrogate": "kl_cov", "clip_cov_ratio": 0.1}, ValueError, "clip_cov_ratio=0.1 has no effect"),
    ({"skip_empty_sequences": True}, ValueError, "no effect with reduction='token_mean'"),
    ({"reduction": "none", "entropy_reduction": "loss"}, ValueError, "no effect with reduction='none'"),
    ({"surrogate": "sapo", "clip_low": 0.1}, ValueError, "clip_low=0.1 has no effect with surrogate='sapo'"),
    ({"surrogate": "cispo", "ratio_cap": 5.0, "clip_high": 0.3}, ValueError, "no effect with an absolute ratio_cap"),
    ({"surrogate": "cispo", "delta": 2.0}, ValueError, "delta=2.0 has no effect with surrogate='cispo'"),
    ({"surrogate": "vespo", "dual_clip": 2.0}, ValueError, "dual_clip=2.0 has no effect"),
    ({"ratio_cap": 5.0}, ValueError, "ratio_cap=5.0 has no effect with surrogate='ppo_clip'"),
    ({"sapo_temperature_neg": 2.0}, ValueError, "sapo_temperature_neg=2.0 has no effect"),
    ({"surrogate": "sapo", "vespo_k_pos": 1.0}, ValueError, "vespo_k_pos=1.0 has no effect"),
    ({"surrogate": "vespo", "ratio_level": "sequence"}, ValueError, "no effect with surrogate='vespo' without"),
    ({"surrogate": "reinforce", "ratio_level": "sequence"}, ValueError, "no effect with surrogate='reinforce'"),
    ({"sampler_cap": 2.0}, ValueError, "sampler_cap=2.0 has no effect with sampler_correction='none'"),
    ({"sampler_floor": 0.5}, ValueError, "sampler_floor=0.5 has no effect"),
    ({"max_length": 512}, ValueError, "max_length=512 has no effect with reduction='token_mean'"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG, ids=[str(fields) for fields, _, _ in WRONG])
def test_wrong_options_raise(fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        GRPOLossConfig(**fields)
    assert str(caught.value).startswith("GRPOLossConfig: ")
    assert message in str(caught.value)


def test_config_is_a_frozen_value() -> None:
    config = GRPOLossConfig(kl_coef=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kl_coef = 2.0
    assert hash(config) == hash(GRPOLossConfig(kl_coef=1))
    assert dataclasses.replace(config, reduction="none").kl_coef == 1


PRESETS = {
    "grpo": {"reduction": "sequence_mean_token_mean"},
    "bnpo": {},
    "dr_grpo": {"reduction": "sequence_mean_token_sum_norm"},
    "dapo": {"clip_high": 0.28},
    "luspo": {"reduction": "sequence_mean_token_sum", "ratio_level": "sequence"},
    "cispo": {"surrogate": "cispo", "ratio_cap": 5.0},
    "sapo": {"surrogate": "sapo", "reduction": "sequence_mean_token_mean"},
    "vespo": {"surrogate": "vespo"},
    "gspo": {
        "reduction": "sequence_mean_token_mean",
        "ratio_level": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "gspo_token": {
        "reduction": "sequence_mean_token_mean",
        "ratio_level": "sequence_token",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "gmpo": {"surrogate": "gmpo", "reduction": "sequence_mean_token_mean", "clip_low": 0.4, "clip_high": 0.4},
    "gpg": {"surrogate": "reinforce"},
    "dppo_tv": {"surrogate": "dppo_tv", "clip_low": 0.15, "clip_high": 0.15, "ratio_cap": 20.0},
    "dppo_kl": {"surrogate": "dppo_kl", "clip_low": 0.05, "clip_high": 0.05, "ratio_cap": 20.0},
    "dro": {"surrogate": "dro"},
    "clip_cov": {"surrogate": "clip_cov"},
    "kl_cov": {"surrogate": "kl_cov"},
    "reinforce": {"surrogate": "reinforce"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    assert GRPOLossConfig.preset(name) == GRPOLossConfig(**PRESETS[name])
    assert GRPOLossConfig.preset(name, kl_coef=0.1) == GRPOLossConfig(**PRESETS[name], kl_coef=0.1)


def test_unknown_preset_and_fields_raise() -> None:
    with pytest.raises(ValueError, match=r"GRPOLossConfig: preset must be one of 'grpo', .*, got 'ppo'"):
        GRPOLossConfig.preset("ppo")
    with pytest.raises(ValueError, match=r"GRPOLossConfig: preset must be one of 'grpo', .*, got \['grpo'\]"):
        GRPOLossConfig.preset(["grpo"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"GRPOLossConfig.*epsilon"):
        GRPOLossConfig.preset("grpo", epsilon=0.1)


TRL_BASE = {"kl_importance_weighted": True}
TRL = [
    ({}, {}),
    ({"loss_type": "grpo", "beta": 0.04}, {"reduction": "sequence_mean_token_mean", "kl_coef": 0.04}),
    ({"loss_type": "bnpo", "epsilon": 0.1, "epsilon_high": 0.3}, {"clip_low": 0.1, "clip_high": 0.3}),
    ({"loss_type": "dr_grpo"}, {"reduction": "sequence_mean_token_sum_norm", "max_length": 512}),
    ({"loss_type": "dr_grpo", "max_completion_length": 64}, {**PRESETS["dr_grpo"], "max_length": 64}),
    ({"loss_type": "grpo", "max_completion_length": 64}, PRESETS["grpo"]),
    ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, PRESETS["luspo"]),
    ({"loss_type": "cispo"}, {"surrogate": "cispo", "ratio_cap": 0.2}),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, PRESETS["cispo"]),
    (
        {"loss_type": "sapo", "sapo_temperature_neg": 2.0, "delta": 1.0},
        {**PRESETS["sapo"], "sapo_temperature_neg": 2.0},
    ),
    ({"loss_type": "vespo", "vespo_lambda_neg": 5.0}, {"surrogate": "vespo", "vespo_lambda_neg": 5.0}),
    ({"delta": 2.0}, {"delta": 2.0}),
    ({"use_bias_correction_kl": False}, {"kl_importance_weighted": False}),
    ({"entropy_coef": 0.1, "top_entropy_quantile": 0.2}, {"entropy_coef": 0.1, "top_entropy_quantile": 0.2}),
    ({"off_policy_mask_threshold": 0.5}, {"off_policy_threshold": 0.5}),
    ({"vllm_importance_sampling_mode": "token_mask"}, {}),  # nothing to correct without vLLM
    ({"use_vllm": True}, {"sampler_correction": "sequence_mask"}),
    ({"use_vllm": True, "vllm_importance_sampling_correction": False}, {}),
    (
        {
            "use_vllm": True,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": None,
            "vllm_importance_sampling_clip_min": 0.5,
        },
        {"sampler_correction": "token_truncate", "sampler_cap": None, "sampler_floor": 0.5},
    ),
]


@pytest.mark.parametrize(("options", "fields"), TRL, ids=[str(options) for options, _ in TRL])
def test_trl_options(options: dict[str, object], fields: dict[str, object]) -> None:
    assert GRPOLossConfig.trl(**options) == GRPOLossConfig(**{**TRL_BASE, **fields})


@pytest.mark.parametrize("option", ["learning_rate", "use_adaptive_entropy", "clip_low"])
def test_unknown_trl_options_raise(option: str) -> None:
    with pytest.raises(ValueError, match=rf"GRPOLossConfig.trl: options must be among .*, got {option}"):
        GRPOLossConfig.trl(**{option: 1})


def test_values_that_trl_rejects_raise() -> None:
    with pytest.raises(ValueError, match=r"GRPOLossConfig.trl: loss_type must be one of .*, got 'ppo'"):
        GRPOLossConfig.trl(loss_type="ppo")
    with pytest.raises(ValueError, match=r"GRPOLossConfig.trl: loss_type must be one of .*, got \['grpo'\]"):
        GRPOLossConfig.trl(loss_type=["grpo"])
    with pytest.raises(ValueError, match="vespo"):
        GRPOLossConfig.trl(loss_type="vespo", use_vllm=True)


CLAMPED = {"log_ratio_min": -20.0, "log_ratio_max": 20.0}
VERL_BASE = {"entropy_reduction": "loss"}
BY_SEQUENCE = {"reduction": "sequence_mean_token_mean", "skip_empty_sequences": True}
PPO = {"clip_high": 0.2, **CLAMPED, "dual_clip": 3.0}
SMALL = {"clip_low": 0.1, "clip_high": 0.3}
VERL = [
    ({}, PPO),
    ({"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 10.0}, {**PPO, **SMALL, "dual_clip": 10.0}),
    ({"clip_ratio": 0.3}, PPO),  # in verl 0.9 the two bounds have defaults of their own
    ({"clip_ratio": 0.3, "clip_ratio_low": None}, {**PPO, "clip_low": 0.3}),
    ({"loss_agg_mode": "token-sum"}, {**PPO, "reduction": "token_sum"}),
    ({"loss_agg_mode": "seq-mean-token-mean"}, {**PPO, **BY_SEQUENCE}),
    ({"loss_agg_mode": "seq-mean-token-sum"}, {**PPO, **BY_SEQUENCE, "reduction": "sequence_mean_token_sum"}),
    (
        {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 512},
        {**PPO, **BY_SEQUENCE, "reduction": "sequence_mean_token_sum_norm", "max_length": 512},
    ),
    ({"loss_scale_factor": 512}, PPO),
    ({"entropy_coeff": 0.01}, {**PPO, "entropy_coef": 0.01}),
    ({"kl_loss_coef": 0.5}, PPO),
    ({"use_kl_loss": True}, {**PPO, "kl_coef": 0.001, "kl_log_ratio_clamp": 20.0, "kl_value_clamp": 10.0}),
    ({"use_kl_loss": True, "kl_loss_type": "kl"}, {**PPO, "kl_coef": 0.001, "kl_estimator": "k1"}),
    ({"use_kl_loss": True, "kl_loss_type": "mse+"}, {**PPO, "kl_coef": 0.001, "kl_estimator": "k2+"}),
    (
        {"use_kl_loss": True, "kl_loss_type": "k3+"},
        {**PPO, "kl_coef": 0.001, "kl_estimator": "k3+", "kl_log_ratio_clamp": 20.0, "kl_value_clamp": 10.0},
    ),
    ({"loss_mode": "dppo_tv"}, {"surrogate": "dppo_tv", "clip_high": 0.2, "ratio_cap": 3.0, **CLAMPED}),
    (
        {"loss_mode": "dppo_kl", "clip_ratio_c": 20.0},
        {"surrogate": "dppo_kl", "clip_high": 0.2, "ratio_cap": 20.0, **CLAMPED},
    ),
    ({"loss_mode": "gspo"}, {"ratio_level": "sequence_token", "clip_high": 0.2, "log_ratio_max": 10.0}),
    (
        {"loss_mode": "sapo", "tau_neg": 2.0},
        {**BY_SEQUENCE, "surrogate": "sapo", "sapo_temperature_neg": 2.0, **CLAMPED},
    ),
    ({"loss_mode": "gpg"}, {"surrogate": "reinforce"}),
    ({"loss_mode": "clip_cov"}, {"surrogate": "clip_cov", "clip_high": 0.2}),
    ({"loss_mode": "clip_cov", "clip_cov_ub": 9.0}, {"surrogate": "clip_cov", "clip_high": 0.2, "clip_cov_high": 9.0}),
    ({"loss_mode": "kl_cov"}, {"surrogate": "kl_cov", "kl_cov_coef": 0.1}),
    ({"loss_mode": "kl_cov", "ppo_kl_coef": None}, {"surrogate": "kl_cov"}),
    ({"loss_mode": "geo_mean"}, {"surrogate": "gmpo", "reduction": "sequence_mean_token_mean", "clip_high": 0.2}),
    ({"loss_mode": "dro", "dro_beta": 0.5}, {"surrogate": "dro", "dro_beta": 0.5}),
    ({"loss_mode": "cispo"}, {"surrogate": "cispo", "clip_high": 0.2, **CLAMPED}),
]


@pytest.mark.parametrize(("options", "fields"), VERL, ids=[str(options) for options, _ in VERL])
def test_verl_options(options: dict[str, object], fields: dict[str, object]) -> None:
    assert GRPOLossConfig.verl(**options) == GRPOLossConfig(**{**VERL_BASE, **fields})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_mode": "bypass_mode"}, "loss_mode must be one of 'vanilla', .*, got 'bypass_mode'"),
        ({"loss_mode": ["vanilla"]}, r"loss_mode must be one of 'vanilla', .*, got \['vanilla'\]"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode must be one of 'token-mean', .*, got 'mean'"),
        ({"use_kl_loss": True, "kl_loss_type": "full"}, "kl_loss_type must be one of 'kl', .*, got 'full'"),
        ({"loss_mode": "dro"}, "dro_beta must be given with loss_mode='dro'"),
        ({"ppo_epochs": 2}, "options must be among loss_mode, .*, got ppo_epochs"),
        ({"loss_mode": "geo_mean", "use_kl_loss": True}, "loss_agg_mode must be 'seq-mean-token-mean'"),
        ({"loss_mode": "sapo", "entropy_coeff": 0.1}, "loss_agg_mode must be 'seq-mean-token-mean'"),
    ],
    ids=str,
)
def test_verl_options_that_are_no_config_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"GRPOLossConfig.verl: {message}"):
        GRPOLossConfig.verl(**options)


def test_packed_options() -> None:
    options, parameters = GRPOLossConfig().pack()
    assert options == (0, 0, 0, 2, 0, 0, 0, 0b00001000011, 0, 0)
    assert parameters == (0.8, 1.2, 0, 0, 0, 0, 3.0, 0, 0, 0, 0, 1.0, 1.05, 2.0, 3.0, 3.0, 2.0, 0.1, 1.0)
    options, parameters = GRPOLossConfig(
        surrogate="cispo",
        ratio_level="sequence",
        reduction="none",
        ratio_cap=5.0,
        kl_estimator="abs+",
        kl_importance_weighted=True,
        kl_log_ratio_clamp=20,
        kl_value_clamp=10,
        sampler_correction="sequence_mask",
        sampler_cap=None,
        sampler_floor=0.5,
        off_policy_threshold=-0.5,
    ).pack()
    assert options == (1, 1, 4, 3, 1, 1, 4, 0b00110110010, 0, 0)
    assert parameters[:9] == (0, 5.0, 0, 0, 20.0, 10.0, 0, 0.5, -0.5)
    vespo = GRPOLossConfig(surrogate="vespo", vespo_lambda_pos=0.0)
    assert vespo.pack()[1][13:17] == (2.0, 1e-4, 3.0, 2.0)
    options, parameters = GRPOLossConfig.verl(loss_mode="dppo_kl", loss_agg_mode="seq-mean-token-mean").pack()
    assert options == (7, 0, 1, 2, 0, 0, 0, 0b11001000111, 1, 1)
    assert parameters[:3] == (-0.2, 0.2, 3.0)
    assert parameters[9:11] == (-20.0, 20.0)


# --- metrics ---------------------------------------------------------------------------------------------------------


def _metrics(variant: str, rows: slice = slice(None)) -> GRPOMetrics:
    inputs = {name: None if value is None else value[rows] for name, value in batch(variant).items()}
    return call(inputs, config_of(variant, "token_mean")).metrics


def test_metrics_by_hand() -> None:
    inputs = batch("gspo_token_advantages")
    live, a = inputs["mask"], inputs["advantages"]
    gap = (inputs["log_probs"] - inputs["old_log_probs"])[live]
    metrics = call(inputs, GRPOLossConfig(sampler_correction="token_mask", sampler_cap=1.1, kl_coef=1.0)).metrics
    values, r = metrics.to_dict(), gap.exp()
    weight = (inputs["old_log_probs"] - inputs["sampler_log_probs"])[live].exp()
    kept = weight * (weight <= 1.1)
    kl = (inputs["ref_log_probs"] - inputs["log_probs"])[live]
    low, high = (r < 0.8) & (a[live] < 0), (r > 1.2) & (a[live] > 0)
    shares = [
        (((inputs["log_probs"] - inputs["old_log_probs"])[b].exp() > 1.2) & (a[b] > 0))[live[b]].double().mean().item()
        for b in range(len(live))
        if live[b].any()
    ]
    expected = {
        "tokens": len(gap),
        "sequences": 4,
        "masked_fraction": 1 - len(gap) / live.numel(),
        "kl": (kl.exp() - kl - 1).mean(),
        "entropy": inputs["entropy"][live].mean(),
        "policy_kl": -gap.mean(),
        "ratio_mean": r.mean(),
        "ratio_min": r.min(),
        "ratio_max": r.max(),
        "effective_sample_size": r.sum() ** 2 / (len(r) * (r**2).sum()),
        "clip_low_fraction": low.double().mean(),
        "clip_high_fraction": high.double().mean(),
        "clip_fraction": (low | high).double().mean(),
        "clip_high_max": max(shares),
        "clip_high_fraction_by_sequence": sum(shares) / 4,
        "sampler_weight_mean": kept.mean(),
        "sampler_weight_min": kept.min(),
        "sampler_weight_max": kept.max(),
        "sampler_gap_mean": weight.log().abs().mean(),
        "sampler_gap_max": weight.log().abs().max(),
        "zero_advantage_fraction": (a[live] == 0).double().mean(),
        "high_entropy_fraction": 1.0,
        "off_policy_dropped_fraction": 0.0,
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value), rel=1e-5), name
    assert metrics.values.shape == (30,) == (len(NAMES),)
    assert metrics.values.dtype == torch.float32


def test_merging_parts_gives_the_whole() -> None:
    whole = _metrics("off_policy").values
    with pytest.raises(TypeError, match=r"GRPOMetrics.merge: other must be GRPOMetrics, got NoneType"):
        _metrics("off_policy", slice(0, 2)).merge(None)  # type: ignore[arg-type]
    parts = _metrics("off_policy", slice(0, 2)).merge(_metrics("off_policy", slice(2, 3)))
    merged = parts.merge(_metrics("off_policy", slice(3, 4))).merge(_metrics("off_policy", slice(4, 5)))
    torch.testing.assert_close(merged.values, whole)
    assert merged.to_dict() == pytest.approx(GRPOMetrics(whole).to_dict())


def test_sums_minima_and_maxima_come_in_this_order() -> None:
    assert NAMES == SUMS + MINIMA + MAXIMA
    assert len(set(NAMES)) == 30
    assert all(name.endswith("_min") for name in MINIMA)
    assert all(name.endswith("_max") for name in MAXIMA)
