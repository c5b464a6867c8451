"""The options of verl's actor as fields of GRPOLossConfig."""

from __future__ import annotations

from typing import Any

_DEFAULTS: dict[str, Any] = {
    "loss_mode": "vanilla",
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "clip_ratio_c": 3.0,
    "loss_agg_mode": "token-mean",
    "loss_scale_factor": None,
    "entropy_coeff": 0.0,
    "use_kl_loss": False,
    "kl_loss_coef": 0.001,
    "kl_loss_type": "low_var_kl",
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "clip_cov_ratio": 2e-4,
    "clip_cov_lb": 1.0,
    "clip_cov_ub": 5.0,
    "kl_cov_ratio": 2e-4,
    "ppo_kl_coef": 0.1,
    "dro_beta": None,
}
_IF_NONE = {"clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0, "kl_cov_ratio": 2e-4, "ppo_kl_coef": 1.0}

_SURROGATES = {
    "vanilla": "ppo_clip",
    "dppo_tv": "dppo_tv",
    "dppo_kl": "dppo_kl",
    "gspo": "ppo_clip",
    "sapo": "sapo",
    "gpg": "reinforce",
    "clip_cov": "clip_cov",
    "kl_cov": "kl_cov",
    "geo_mean": "gmpo",
    "dro": "dro",
    "cispo": "cispo",
}
_OWN_REDUCTION = ("sapo", "geo_mean")  # modes that ignore loss_agg_mode
_CLAMPED = ("vanilla", "dppo_tv", "dppo_kl", "sapo", "cispo")  # modes that clamp a token's log-ratio to [-20, 20]

_REDUCTIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-mean": "sequence_mean_token_mean",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    "seq-mean-token-sum-norm": "sequence_mean_token_sum_norm",
}
_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def verl_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields for options of verl 0.9's ActorConfig and PolicyLossConfig.

    Raises:
        ValueError: an option is unknown, has a value that verl rejects, or asks for what no single config is.
    """
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise ValueError(f"GRPOLossConfig.verl: options must be among {', '.join(_DEFAULTS)}, got {', '.join(unknown)}")
    verl = {**_DEFAULTS, **options}
    verl.update({name: value for name, value in _IF_NONE.items() if verl[name] is None})
    mode, aggregation = verl["loss_mode"], verl["loss_agg_mode"]
    _check_choice("loss_mode", mode, _SURROGATES)
    _check_choice("loss_agg_mode", aggregation, _REDUCTIONS)
    if mode in _OWN_REDUCTION:
        if (verl["use_kl_loss"] or verl["entropy_coeff"]) and aggregation != "seq-mean-token-mean":
            raise ValueError(
                "GRPOLossConfig.verl: loss_agg_mode must be 'seq-mean-token-mean' where a KL or an entropy joins "
                f"loss_mode={mode!r}, which verl reduces so, got {aggregation!r}"
            )
        aggregation = "seq-mean-token-mean"
    fields = {
        "surrogate": _SURROGATES[mode],
        "reduction": _REDUCTIONS[aggregation],
        "skip_empty_sequences": aggregation.startswith("seq-mean") and mode != "geo_mean",
        "entropy_coef": verl["entropy_coeff"],
        "entropy_reduction": "loss",
        **_surrogate_fields(mode, verl),
        **_kl_fields(verl),
    }
    if aggregation == "seq-mean-token-sum-norm":
        fields["max_length"] = verl["loss_scale_factor"]
    return fields


def _check_choice(name: str, value: Any, choices: dict[str, str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"GRPOLossConfig.verl: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _surrogate_fields(mode: str, verl: dict[str, Any]) -> dict[str, Any]:
    low, high = (verl["clip_ratio"] if verl[name] is None else verl[name] for name in _CLIPS)
    fields: dict[str, Any] = {"clip_low": low, "clip_high": high}
    if mode in ("sapo", "gpg", "kl_cov", "dro"):
        fields = {}
    if mode in _CLAMPED:
        fields.update(log_ratio_min=-20.0, log_ratio_max=20.0)
    if mode == "vanilla":
        fields.update(dual_clip=verl["clip_ratio_c"])
    elif mode in ("dppo_tv", "dppo_kl"):
        fields.update(ratio_cap=verl["clip_ratio_c"])
    elif mode == "gspo":
        fields.update(ratio_level="sequence_token", log_ratio_max=10.0)
    elif mode == "sapo":
        fields.update(sapo_temperature_pos=verl["tau_pos"], sapo_temperature_neg=verl["tau_neg"])
    elif mode == "clip_cov":
        bounds = {"clip_cov_low": verl["clip_cov_lb"], "clip_cov_high": verl["clip_cov_ub"]}
        fields.update(clip_cov_ratio=verl["clip_cov_ratio"], **bounds)
    elif mode == "kl_cov":
        fields.update(kl_cov_ratio=verl["kl_cov_ratio"], kl_cov_coef=verl["ppo_kl_coef"])
    elif mode == "dro":
        if verl["dro_beta"] is None:
            raise ValueError("GRPOLossConfig.verl: dro_beta must be given with loss_mode='dro', got None")
        fields.update(dro_beta=verl["dro_beta"])
    return fields


_CLIPS = ("clip_ratio_low", "clip_ratio_high")


def _kl_fields(verl: dict[str, Any]) -> dict[str, Any]:
    if not verl["use_kl_loss"]:
        return {}
    kind = verl["kl_loss_type"]
    base = kind[:-1] if isinstance(kind, str) and kind.endswith("+") else kind
    _check_choice("kl_loss_type", base, _ESTIMATORS)
    estimator = _ESTIMATORS[base]
    fields = {"kl_coef": verl["kl_loss_coef"], "kl_estimator": estimator + ("+" if base != kind else "")}
    if estimator == "k3":
        fields.update(kl_log_ratio_clamp=20.0, kl_value_clamp=10.0)
    return fields
