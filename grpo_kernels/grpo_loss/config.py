"""Options of the GRPO loss: one frozen dataclass that every backend reads."""

from __future__ import annotations

import dataclasses
from typing import Any

from grpo_kernels.grpo_loss.choices import (
    CLIPPING,
    DIVERGENCES,
    ENTROPY_REDUCTIONS,
    KL_ESTIMATORS,
    RATIO_LEVELS,
    REDUCTIONS,
    SAMPLER_CORRECTIONS,
    SELECTING,
    SURROGATES,
)
from grpo_kernels.grpo_loss.config_checks import check_config

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
            "reinforce": -A log_prob. "gmpo": -R A, R the geometric mean of the sequence's ratios, each clipped where
            that keeps R A from growing (GMPO); clip distances are of the log-ratio. "dppo_tv", "dppo_kl":
            -stop_gradient(min(r, ratio_cap)) A log_prob, and 0 where the probability of the token has moved in the
            advantage's direction by more than the clip distance, measured as the difference of the probabilities or
            as the KL of "this token or another" (DPPO). "dro": -A log_prob + dro_beta / 2 (log-ratio)^2 (DRO).
            "clip_cov": "ppo_clip", and 0 on tokens drawn among those of high covariance. "kl_cov": -r A, plus
            kl_cov_coef |log-ratio| on the tokens of highest covariance; the covariance of a token is (A - mean A)
            (log_prob - mean log_prob) over the live tokens of the call. Default "ppo_clip".
        ratio_level: "token", "sequence" or "sequence_token". "sequence" (GSPO) is exp of the mean log-ratio over the
            sequence's live tokens, and its gradient reaches every one of them. "sequence_token" (GSPO-token) has the
            same value, and the gradient of a token's ratio: through its own log-prob alone. Default "token".
        reduction: "token_mean": sum over live tokens / their number, or / ``num_items`` (DAPO, BNPO; the
            default, as in TRL and verl).
            "sequence_mean_token_mean": mean over sequences of the mean over their live tokens; a sequence without
            live tokens counts as 0 (GRPO). "sequence_mean_token_sum": mean over sequences of the sum (LUSPO).
            "sequence_mean_token_sum_norm": the same divided by ``max_length`` (Dr. GRPO). "token_sum": sum over live
            tokens. "none": per-token losses.
        skip_empty_sequences: The mean over sequences is one over those with live tokens (verl); by default a sequence
            without them counts as 0 (TRL). Without an effect where ``num_items`` is given.
        clip_low: Lower clip distance, so the bound is 1 - clip_low; it may exceed 1, which means no lower bound
            (DeepSeek-R1: 10). Default 0.2. Used by "ppo_clip", "clip_cov", and "cispo" without ``ratio_cap``; "gmpo":
            distance of the log-ratio; "dppo_tv", "dppo_kl": bound of the divergence where A <= 0.
        clip_high: Upper clip distance, so the bound is 1 + clip_high. None, the default, means clip_low (TRL); DAPO:
            0.28. "dppo_tv", "dppo_kl": bound of the divergence where A > 0.
        ratio_cap: "cispo": absolute upper bound of r without a lower one (TRL and ScaleRL; 5.0 there). None, the
            default: the bounds 1 - clip_low and 1 + clip_high (verl). "dppo_tv", "dppo_kl": upper bound of r.
        log_ratio_min: The log-ratio (the sequence's mean at the sequence levels) is clamped to at least this before
            the ratio is formed; the gradient outside is 0 (verl: -20). Default None: off. Not for "gmpo".
        log_ratio_max: Likewise at most this (verl: 20; its GSPO: 10). Default None: off.
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
        dro_beta: "dro" only: weight of the squared log-ratio, > 0. Default 0.1 (ms-swift); verl has no default.
        clip_cov_ratio: "clip_cov" only: this share of the live tokens is drawn, at least one. Default 2e-4 (paper).
        clip_cov_low: "clip_cov" only: drawn are tokens that the clip does not hold and whose covariance lies above
            this. Default 1.0 (verl).
        clip_cov_high: "clip_cov" only: and below this. Default 5.0 (verl).
        kl_cov_ratio: "kl_cov" only: share of the live tokens with the penalty, at least one. Default 2e-4 (paper).
        kl_cov_coef: "kl_cov" only: weight of the penalty. Default 1.0 (paper); verl's actor: 0.1.
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
        entropy_reduction: "token_mean" (default, TRL): the mean over these tokens whatever the ``reduction``. "loss":
            their entropies go through the ``reduction`` of the loss (verl).
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
    skip_empty_sequences: bool = False
    clip_low: float = 0.2
    clip_high: float | None = None
    ratio_cap: float | None = None
    log_ratio_min: float | None = None
    log_ratio_max: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dro_beta: float = 0.1
    clip_cov_ratio: float = 2e-4
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    kl_cov_ratio: float = 2e-4
    kl_cov_coef: float = 1.0
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
    entropy_reduction: str = "token_mean"
    max_length: int | None = None
    _packed: tuple[tuple[int, ...], tuple[float, ...]] = dataclasses.field(init=False, repr=False, compare=False)
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_config(self)
        # Once: the loss needs them at every call.
        object.__setattr__(self, "_packed", self._pack())
        object.__setattr__(self, "_hash", hash((*self._packed, self.kl_coef, self.entropy_coef)))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GRPOLossConfig:
        """The published setting of a method: its surrogate, level, reduction and clip range. ``overrides`` replace
        fields.

        Names: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gspo", "gspo_token", "gmpo",
        "gpg", "dppo_tv", "dppo_kl", "dro", "clip_cov", "kl_cov", "reinforce". None of them sets a KL or an entropy
        coefficient.
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

    @classmethod
    def verl(cls, **options: Any) -> GRPOLossConfig:
        """The loss of verl 0.9's actor for these options of its ``ActorConfig`` and ``PolicyLossConfig``, flat;
        options not given take verl's defaults.

        ``loss_mode`` is any of verl's but "bypass_mode". Options that it ignores are ignored, as in verl: "sapo" and
        "geo_mean" reduce the policy term by "seq-mean-token-mean" whatever ``loss_agg_mode``, so that a KL or an
        entropy beside it must ask for the same. "geo_mean" divides its policy term by all sequences, and verl divides
        a KL or an entropy beside it by those with live tokens: here all are divided by all, so leave out sequences
        without live tokens. ``clip_ratio`` counts where ``clip_ratio_low`` or ``clip_ratio_high`` is None. verl's
        ``rollout_is_weights`` are ``token_weights``; "geo_mean" takes the geometric mean of a sequence's weights,
        exp(mean log(w + 1e-10)), as [B] ``token_weights``. verl's global counts divided by ``dp_size`` are
        ``num_items``.
        """
        from grpo_kernels.grpo_loss.verl_options import verl_fields

        return cls(**verl_fields(options))

    @property
    def ratio_bounds(self) -> tuple[float | None, float | None]:
        """Lower and upper bound of the ratio, None where there is none; of the log-ratio for "gmpo", of the signed
        divergence for "dppo_tv" and "dppo_kl"."""
        if self.surrogate not in CLIPPING:
            return None, None
        if self.surrogate == "cispo" and self.ratio_cap is not None:
            return None, self.ratio_cap
        high = self.clip_low if self.clip_high is None else self.clip_high
        if self.surrogate == "gmpo" or self.surrogate in DIVERGENCES:
            return -self.clip_low, high
        return 1.0 - self.clip_low, 1.0 + high

    @property
    def selects_tokens(self) -> bool:
        """Whether the loss begins by choosing tokens from all of the batch."""
        return self.surrogate in SELECTING

    def pack(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The fields as the kernels read them: 10 integers and 19 numbers in a fixed order.

        The eighth integer has bit i set when the i-th of the eleven optional numbers, which come first, is present.
        Absence is a bit and not an infinity, because an infinite constant does not survive every compiler's code
        generation. kl_coef, entropy_coef, max_length, top_entropy_quantile and what concerns the choice of tokens are
        missing: they reach the kernel as arguments of their own.
        """
        return self._packed

    def _pack(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        low, high = self.ratio_bounds
        optional = (
            low,
            high,
            self.ratio_cap if self.surrogate in DIVERGENCES else self.delta,
            self.dual_clip,
            self.kl_log_ratio_clamp,
            self.kl_value_clamp,
            self.sampler_cap,
            self.sampler_floor,
            self.off_policy_threshold,
            self.log_ratio_min,
            self.log_ratio_max,
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
            int(self.skip_empty_sequences),
            ENTROPY_REDUCTIONS.index(self.entropy_reduction),
        )
        parameters = (
            *(0.0 if value is None else float(value) for value in optional),
            float(self.sapo_temperature_pos),
            float(self.sapo_temperature_neg),
            float(self.vespo_k_pos),
            max(float(self.vespo_lambda_pos), _SMALLEST_VESPO_LAMBDA),
            float(self.vespo_k_neg),
            max(float(self.vespo_lambda_neg), _SMALLEST_VESPO_LAMBDA),
            float(self.dro_beta),
            float(self.kl_cov_coef),
        )
        return options, parameters
