"""Small MoE layers like those of known models, for the tests of the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels import MoE

H, I, E, K = 8, 6, 8, 2
SHARED = 5
DEEPSEEK: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "e_score_correction_bias": True,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "shared_intermediate_size": SHARED,
}
GPT_OSS: dict[str, Any] = {
    "scoring_func": "topk_softmax",
    "router_bias": True,
    "expert_bias": True,
    "activation": "clamped_swiglu",
    "interleaved": True,
}
QWEN: dict[str, Any] = {"norm_topk_prob": False}
KINDS = {"deepseek": DEEPSEEK, "gpt-oss": GPT_OSS, "qwen": QWEN}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def layer_of(**options: Any) -> MoE:
    """A layer with parameters that are the same for the same options; correction biases differ from 0."""
    moe = MoE(H, I, E, K, **{"layer_id": 3, **options})
    with torch.no_grad():
        for seed, parameter in enumerate(moe.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=seed + 10))
        if moe.e_score_correction_bias is not None:
            moe.e_score_correction_bias.copy_(0.1 * normal(E, seed=30))
    return moe
