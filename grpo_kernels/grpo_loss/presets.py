"""Published settings of the loss, and the options of TRL, as fields of GRPOLossConfig."""

from __future__ import annotations

from typing import Any

_PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300
    "grpo": {"reduction": "sequence_mean_token_mean"},
    # GRPO normalised by the batch's own token count (TRL)
    "bnpo": {"reduction": "token_mean"},
    # Understanding R1-Zero-like training, arXiv 2503.20783
    "dr_grpo": {"reduction": "sequence_mean_token_sum_norm"},
    # DAPO, arXiv 2503.14476
    "dapo": {"reduction": "token_mean", "clip_high": 0.28},
    # LUSPO, arXiv 2602.05261
    "luspo": {"reduction": "sequence_mean_token_sum", "ratio_level": "sequence"},
    # MiniMax-M1, arXiv 2506.13585, with the bound of ScaleRL, arXiv 2510.13786
    "cispo": {"surrogate": "cispo", "reduction": "token_mean", "ratio_cap": 5.0},
    # SAPO, arXiv 2511.20347
    "sapo": {"surrogate": "sapo", "reduction": "sequence_mean_token_mean"},
    # VESPO, arXiv 2602.10693
    "vespo": {"surrogate": "vespo", "reduction": "token_mean"},
    # GSPO, arXiv 2507.18071
    "gspo": {
        "reduction": "sequence_mean_token_mean",
        "ratio_level": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    # GSPO, arXiv 2507.18071, section 4.3
    "gspo_token": {
        "reduction": "sequence_mean_token_mean",
        "ratio_level": "sequence_token",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    # GMPO, arXiv 2507.20673
    "gmpo": {"surrogate": "gmpo", "reduction": "sequence_mean_token_mean", "clip_low": 0.4, "clip_high": 0.4},
    # GPG, arXiv 2504.02546
    "gpg": {"surrogate": "reinforce", "reduction": "token_mean"},
    # DPPO, arXiv 2602.04879
    "dppo_tv": {
        "surrogate": "dppo_tv",
        "reduction": "token_mean",
        "clip_low": 0.15,
        "clip_high": 0.15,
        "ratio_cap": 20.0,
    },
    "dppo_kl": {
        "surrogate": "dppo_kl",
        "reduction": "token_mean",
        "clip_low": 0.05,
        "clip_high": 0.05,
        "ratio_cap": 20.0,
    },
    # DRO, arXiv 2405.19107
    "dro": {"surrogate": "dro", "reduction": "token_mean"},
    # The entropy mechanism of RL for reasoning models, arXiv 2505.22617
    "clip_cov": {"surrogate": "clip_cov", "reduction": "token_mean"},
    "kl_cov": {"surrogate": "kl_cov", "reduction": "token_mean"},
    "reinforce": {"surrogate": "reinforce", "reduction": "token_mean"},
}

_TRL_DEFAULTS: dict[str, Any] = {
    "loss_type": "dapo",
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "use_bias_correction_kl": True,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "off_policy_mask_threshold": None,
    "max_completion_length": 512,
}

TRL_REDUCTIONS = {
    "grpo": "sequence_mean_token_mean",
    "sapo": "sequence_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "dr_grpo": "sequence_mean_token_sum_norm",
    "luspo": "sequence_mean_token_sum",
}
"""How TRL, and Liger after it, reduce each loss_type."""


def preset_fields(name: str) -> dict[str, Any]:
    """Fields that the preset sets; a copy.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(name, str) or name not in _PRESETS:
        raise ValueError(f"GRPOLossConfig: preset must be one of {', '.join(map(repr, _PRESETS))}, got {name!r}")
    return dict(_PRESETS[name])


def trl_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields for options of TRL 1.16's GRPOConfig.

    Raises:
        ValueError: an option is unknown or has a value that TRL rejects.
    """
    unknown = sorted(set(options) - set(_TRL_DEFAULTS))
    if unknown:
        raise ValueError(
            f"GRPOLossConfig.trl: options must be among {', '.join(_TRL_DEFAULTS)}, got {', '.join(unknown)}"
        )
    trl = {**_TRL_DEFAULTS, **options}
    loss_type = trl["loss_type"]
    if not isinstance(loss_type, str) or loss_type not in TRL_REDUCTIONS:
        raise ValueError(
            f"GRPOLossConfig.trl: loss_type must be one of {', '.join(map(repr, TRL_REDUCTIONS))}, got {loss_type!r}"
        )
    surrogate = loss_type if loss_type in ("cispo", "sapo", "vespo") else "ppo_clip"
    fields = {
        "surrogate": surrogate,
        "reduction": TRL_REDUCTIONS[loss_type],
        "kl_coef": trl["beta"],
        "kl_importance_weighted": trl["use_bias_correction_kl"],
        "off_policy_threshold": trl["off_policy_mask_threshold"],
        "top_entropy_quantile": trl["top_entropy_quantile"],
        "entropy_coef": trl["entropy_coef"],
    }
    if surrogate != "vespo" or trl["use_bias_correction_kl"]:  # vespo's own weight is of the sequence at either level
        fields["ratio_level"] = trl["importance_sampling_level"]
    fields.update(_surrogate_fields(surrogate, trl))
    if loss_type == "dr_grpo":
        fields["max_length"] = trl["max_completion_length"]
    if trl["use_vllm"] and trl["vllm_importance_sampling_correction"]:
        fields["sampler_correction"] = trl["vllm_importance_sampling_mode"]
        fields["sampler_cap"] = trl["vllm_importance_sampling_clip_max"]
        fields["sampler_floor"] = trl["vllm_importance_sampling_clip_min"]
    return fields


def _surrogate_fields(surrogate: str, trl: dict[str, Any]) -> dict[str, Any]:
    if surrogate == "ppo_clip":
        return {"clip_low": trl["epsilon"], "clip_high": trl["epsilon_high"], "delta": trl["delta"]}
    if surrogate == "cispo":  # TRL reads epsilon_high as the absolute bound, and falls back to epsilon as everywhere
        return {"ratio_cap": trl["epsilon"] if trl["epsilon_high"] is None else trl["epsilon_high"]}
    return {name: value for name, value in trl.items() if name.startswith(surrogate)}
