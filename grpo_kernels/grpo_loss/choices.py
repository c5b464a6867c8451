"""What the options of the GRPO loss may be. Kernels know them by their places in these tuples."""

from __future__ import annotations

SURROGATES = (
    "ppo_clip",
    "cispo",
    "sapo",
    "vespo",
    "reinforce",
    "gmpo",
    "dppo_tv",
    "dppo_kl",
    "dro",
    "clip_cov",
    "kl_cov",
)
RATIO_LEVELS = ("token", "sequence", "sequence_token")
REDUCTIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
    "none",
    "token_sum",
)
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
SAMPLER_CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
ENTROPY_REDUCTIONS = ("token_mean", "loss")

CLIPPING = ("ppo_clip", "cispo", "gmpo", "dppo_tv", "dppo_kl", "clip_cov")
"""Surrogates that read clip_low and clip_high."""
DIVERGENCES = ("dppo_tv", "dppo_kl")
"""Surrogates whose clip distances bound a divergence of the token's probability."""
SELECTING = ("clip_cov", "kl_cov")
"""Surrogates that treat some tokens, chosen from all of the batch, differently."""
WITHOUT_RATIO = ("vespo", "reinforce", "dro")
"""Surrogates that do not read the ratio; the KL may."""
