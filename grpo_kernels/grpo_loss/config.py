"""Options of the GRPO loss: one frozen dataclass that every backend reads."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

SURROGATES = ("ppo_clip", "cispo", "sapo", "vespo", "reinforce")
RATIO_LEVELS = ("token", "sequence")
REDUCTIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
    "none",
)
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
SAMPLER_CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

_SMALLEST_VESPO_LAMBDA = 1e-4


@dataclasses.dataclass(frozen=True)
class GRPOLossConfig:
    """What the loss computes. A field that the chosen surrogate or mode does not use raises when it is set.

    In the formulas r is the ratio exp(log_prob - old_log_prob) of a token or of its sequence (``ratio_level``), and A
    the advantage.

    Args:
        surrogate: The policy term. "ppo_clip": -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, GRPO, DAPO,
            GSPO). "cispo": -stop_gradient(clip(r)) A log_prob (MiniMax-M1). "sapo": the soft gate -4/tau sigmoid(tau
            (r - 1)) A. "vespo": -stop_gradient(phi) A log_prob with a gamma weighting of the sequence's ratio.
            "reinforce": -A log_prob. Default "ppo_clip".
        ratio_level: "token" or "sequence". "sequence" (GSPO) is exp of the mean log-ratio over the sequence's live
            tokens, and its gradient reaches every one of them. Default "token".
        reduction: "token_mean": sum over live tokens / their number, or / ``num_items`` (DAPO, BNPO; the
            default, as in TRL and verl).
            "sequence_mean_token_mean": mean over sequences of the mean over their live tokens; a sequence without
            live tokens counts as 0 (GRPO). "sequence_mean_token_sum": mean over sequences of the sum (LUSPO).
            "sequence_mean_token_sum_norm": the same divided by ``max_length`` (Dr. GRPO). "none": per-token losses.
        clip_low: Lower clip distance, so the bound is 1 - clip_low; it may exceed 1, which means no lower bound
            (DeepSeek-R1: 10). Default 0.2. Used by "ppo_clip", and by "cispo" without ``ratio_cap``.
        clip_high: Upper clip distance, so the bound is 1 + clip_high. None, the default, means clip_low (TRL); DAPO:
            0.28.
        ratio_cap: "cispo" only: absolute upper bound of r without a lower one (TRL and ScaleRL; 5.0 there). None, the
            default: the bounds 1 - clip_low and 1 + clip_high (verl).
        delta: "ppo_clip" only: r is replaced by min(r, delta) in the unclipped branch (INTELLECT-2). Default None:
            off.
        dual_clip: "ppo_clip" only: for A < 0 the loss of a token is at most -dual_clip A (dual-clip PPO; verl: 3.0).
            Default None: off.
        sapo_temperature_pos: "sapo" only: tau where A > 0. Default 1.0 (TRL).
        sapo_temperature_neg: "sapo" only: tau where A <= 0. Default 1.05 (TRL).
        vespo_k_pos: "vespo" only: power k of the weight where A >= 0. Default 2.0 (TRL).
        vespo_lambda_pos: "vespo" only: decay lambda where A >= 0; at least 1e-4 is used. Default 3.0 (TRL).
        vespo_k_neg: "vespo" only: power where A < 0. Default 3.0 (TRL).
        vespo_lambda_neg: "vespo" only: decay where A < 0; at least 1e-4 is used. Default 2.0 (TRL).
        kl_coef: Weight of the KL term to the reference policy. Default 0.0 (TRL); DeepSeekMath 0.04, DeepSeek-R1
            0.001. The ``kl_coef`` argument of the loss overrides it.
        kl_estimator: "k1" (log_prob - ref), "k2" (half its square), "k3" (exp(ref - log_prob) - (ref - log_prob) - 1;
            the default, DeepSeekMath) or "abs". With a "+" behind it the value is the estimator's and the gradient is
            k2's (verl).
        kl_importance_weighted: Multiply the KL by r, with r's gradient (DeepSeek-V3.2; on by default in TRL 1.16).
            Default False.
        kl_log_ratio_clamp: Clamp ref - log_prob to [-x, x] before the estimator; the gradient outside is 0 (verl:
            20). Default None: off.
        kl_value_clamp: Clamp the estimate to [-x, x]; the gradient outside is 0 (verl: 10). Default
            None: off.
        sampler_correction: What corrects for a sampler (inference engine) whose probabilities differ from
            ``old_log_probs``: "none", or "token" / "sequence" _ "truncate" / "mask". The weight exp(old - sampler),
            of the token or summed over the sequence, is clipped to [sampler_floor, sampler_cap], or set to 0 outside.
            Default "none"; TRL with vLLM: "sequence_mask". "vespo" takes the token modes only and folds the weight
            into phi.
        sampler_cap: Upper bound of the sampler weight. Default 3.0 (TRL). None: no upper bound.
        sampler_floor: Lower bound of the sampler weight. Default None (TRL): no lower bound.
        off_policy_threshold: Drop the policy term where A < 0 and the sequence's mean of (sampler - log_prob) exceeds
            this value, nats (DeepSeek-V3.2; old_log_probs stand in for absent sampler_log_probs). Default None: off.
        top_entropy_quantile: Keep in the policy term only this share of the live tokens, those of highest entropy
            ("Beyond the 80/20 rule": 0.2). Default 1.0: all. Needs ``entropy``.
        entropy_coef: Weight of the entropy bonus, subtracted from the loss: the mean entropy of the tokens that the
            policy term keeps. Default 0.0. The ``entropy_coef`` argument of the loss overrides it.
        max_length: "sequence_mean_token_sum_norm" only: the constant length in the denominator (TRL:
            max_completion_length). Default None: the padded length T. The ``max_length`` argument of the loss
            overrides it.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, contradicts another, or is set although nothing uses it.
    """

    surrogate: str = "ppo_clip"
    ratio_level: str = "token"
    reduction: str = "token_mean"
    clip_low: float = 0.2
    clip_high: float | None = None
    ratio_cap: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_importance_weighted: bool = False
    kl_log_ratio_clamp: float | None = None
    kl_value_clamp: float | None = None
    sampler_correction: str = "none"
    sampler_cap: float | None = 3.0
    sampler_floor: float | None = None
    off_policy_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    max_length: int | None = None
    _packed: tuple[tuple[int, ...], tuple[float, ...]] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_combinations()
        self._check_unused()
        object.__setattr__(self, "_packed", self._pack())  # once: the loss needs it at every call

    def _check_choices(self) -> None:
        estimators = (*KL_ESTIMATORS, *(f"{name}+" for name in KL_ESTIMATORS))
        for name, choices in (
            ("surrogate", SURROGATES),
            ("ratio_level", RATIO_LEVELS),
            ("reduction", REDUCTIONS),
            ("kl_estimator", estimators),
            ("sampler_correction", SAMPLER_CORRECTIONS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"GRPOLossConfig: {name} must be a string, got {type(value).__name__}")
            if value not in choices:
                raise ValueError(
                    f"GRPOLossConfig: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
                )
        if not isinstance(self.kl_importance_weighted, bool):
            kind = type(self.kl_importance_weighted).__name__
            raise TypeError(f"GRPOLossConfig: kl_importance_weighted must be a bool, got {kind}")

    def _check_numbers(self) -> None:
        self._check_number("clip_low", 0.0)
        self._check_number("clip_high", 0.0, optional=True)
        for name in ("ratio_cap", "delta", "kl_log_ratio_clamp", "kl_value_clamp", "sampler_cap"):
            self._check_number(name, 0.0, optional=True, exclusive=True)
        self._check_number("dual_clip", 1.0, optional=True, exclusive=True)
        self._check_number("sampler_floor", 0.0, optional=True)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            self._check_number(name, 0.0, exclusive=True)
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            self._check_number(name, 0.0)
        for name in ("kl_coef", "entropy_coef"):
            self._check_number(name, -math.inf)
        self._check_number("off_policy_threshold", -math.inf, optional=True)
        self._check_number("top_entropy_quantile", 0.0)
        if self.top_entropy_quantile > 1.0:
            raise ValueError(f"GRPOLossConfig: top_entropy_quantile must be in [0, 1], got {self.top_entropy_quantile}")
        if self.max_length is not None:
            if isinstance(self.max_length, bool) or not isinstance(self.max_length, int):
                raise TypeError(f"GRPOLossConfig: max_length must be an int, got {type(self.max_length).__name__}")
            if self.max_length < 1:
                raise ValueError(f"GRPOLossConfig: max_length must be at least 1, got {self.max_length}")

    def _check_number(self, name: str, low: float, *, optional: bool = False, exclusive: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            wanted = "a number or None" if optional else "a number"
            raise TypeError(f"GRPOLossConfig: {name} must be {wanted}, got {type(value).__name__}")
        if not math.isfinite(value) or value < low or (exclusive and value == low):
            bound = "" if low == -math.inf else f" {'greater than' if exclusive else 'at least'} {low:g}"
            raise ValueError(f"GRPOLossConfig: {name} must be a finite number{bound}, got {value}")

    def _check_combinations(self) -> None:
        if self.delta is not None and self.dual_clip is not None:
            raise ValueError("GRPOLossConfig: delta and dual_clip both bound the unclipped branch; set one of them")
        if self.sampler_correction.endswith("truncate") and self.sampler_cap is None and self.sampler_floor is None:
            raise ValueError(
                f"GRPOLossConfig: sampler_correction={self.sampler_correction!r} needs sampler_cap or sampler_floor"
            )
        if self.sampler_cap is not None and self.sampler_floor is not None and self.sampler_floor >= self.sampler_cap:
            raise ValueError(
                "GRPOLossConfig: sampler_floor must be less than sampler_cap, "
                f"got {self.sampler_floor} and {self.sampler_cap}"
            )
        if self.surrogate == "vespo" and self.sampler_correction.startswith("sequence"):
            raise ValueError(
                "GRPOLossConfig: sampler_correction must be 'none', 'token_truncate' or 'token_mask' with "
                f"surrogate='vespo', which folds the weight of each token into phi, got {self.sampler_correction!r}"
            )

    def _check_unused(self) -> None:
        surrogate = f"surrogate={self.surrogate!r}"
        unused: dict[str, str] = {}
        if self.surrogate != "ppo_clip":
            unused.update(delta=surrogate, dual_clip=surrogate)
        if self.surrogate != "cispo":
            unused.update(ratio_cap=surrogate)
        if self.surrogate not in ("ppo_clip", "cispo"):
            unused.update(clip_low=surrogate, clip_high=surrogate)
        elif self.ratio_cap is not None and self.surrogate == "cispo":
            unused.update(clip_low="an absolute ratio_cap", clip_high="an absolute ratio_cap")
        for prefix in ("sapo", "vespo"):
            if self.surrogate != prefix:
                unused.update({name: surrogate for name in _FIELDS if name.startswith(prefix)})
        if self.surrogate in ("vespo", "reinforce") and not self.kl_importance_weighted:
            unused.update(ratio_level=f"{surrogate} without kl_importance_weighted")
        if self.sampler_correction == "none":
            unused.update(sampler_cap="sampler_correction='none'", sampler_floor="sampler_correction='none'")
        if self.reduction != "sequence_mean_token_sum_norm":
            unused.update(max_length=f"reduction={self.reduction!r}")
        for name, reason in unused.items():
            if getattr(self, name) != _FIELDS[name]:
                raise ValueError(f"GRPOLossConfig: {name}={getattr(self, name)!r} has no effect with {reason}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GRPOLossConfig:
        """The published setting of a method: its surrogate, level, reduction and clip range. ``overrides`` replace
        fields.

        Names: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gspo", "reinforce". None of them
        sets a KL or an entropy coefficient.
        """
        from grpo_kernels.grpo_loss.presets import preset_fields

        return cls(**{**preset_fields(name), **overrides})

    @classmethod
    def trl(cls, **options: Any) -> GRPOLossConfig:
        """The loss of TRL 1.16's ``GRPOTrainer`` for these options of its ``GRPOConfig``; options not given take
        TRL's defaults.

        Options that the chosen ``loss_type`` ignores are ignored, as in TRL; names that are not options of the loss
        raise. The sampler correction is on when ``use_vllm`` and ``vllm_importance_sampling_correction`` both are.
        """
        from grpo_kernels.grpo_loss.presets import trl_fields

        return cls(**trl_fields(options))

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        """Lower and upper bound of the ratio, None where there is none."""
        if self.surrogate == "cispo" and self.ratio_cap is not None:
            return None, self.ratio_cap
        if self.surrogate in ("ppo_clip", "cispo"):
            return 1.0 - self.clip_low, 1.0 + (self.clip_low if self.clip_high is None else self.clip_high)
        return None, None

    def pack(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The fields as the kernels read them: 8 integers and 15 numbers in a fixed order.

        The last integer has bit i set when the i-th of the nine optional numbers is present. Absence is a bit and not
        an infinity, because an infinite constant does not survive every compiler's code generation. kl_coef,
        entropy_coef, max_length and top_entropy_quantile are missing: they reach the kernel as arguments of their
        own.
        """
        return self._packed

    def _pack(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        low, high = self.ratio_bounds
        optional = (
            low,
            high,
            self.delta,
            self.dual_clip,
            self.kl_log_ratio_clamp,
            self.kl_value_clamp,
            self.sampler_cap,
            self.sampler_floor,
            self.off_policy_threshold,
        )
        options = (
            SURROGATES.index(self.surrogate),
            RATIO_LEVELS.index(self.ratio_level),
            REDUCTIONS.index(self.reduction),
            KL_ESTIMATORS.index(self.kl_estimator.rstrip("+")),
            int(self.kl_estimator.endswith("+")),
            int(self.kl_importance_weighted),
            SAMPLER_CORRECTIONS.index(self.sampler_correction),
            sum(1 << bit for bit, value in enumerate(optional) if value is not None),
        )
        parameters = (
            *(0.0 if value is None else float(value) for value in optional),
            float(self.sapo_temperature_pos),
            float(self.sapo_temperature_neg),
            float(self.vespo_k_pos),
            max(float(self.vespo_lambda_pos), _SMALLEST_VESPO_LAMBDA),
            float(self.vespo_k_neg),
            max(float(self.vespo_lambda_neg), _SMALLEST_VESPO_LAMBDA),
        )
        return options, parameters


_FIELDS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(GRPOLossConfig)}
