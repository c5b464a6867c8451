"""Fused kernels for reinforcement learning of language models with GRPO.

The ops run on NVIDIA GPUs (CUDA C++ and Triton), on CPUs (C++), and anywhere else through plain PyTorch. See
`grpo-kernels env` for what this installation can use.
"""

from grpo_kernels._dispatch import BackendUnavailable, backend
from grpo_kernels._version import __version__
from grpo_kernels.fp8_quantize import ScaledTensor, fp8_dequantize, fp8_quantize
from grpo_kernels.group_advantages import (
    BestOfGroupOutput,
    GroupAdvantagesOutput,
    best_of_group,
    group_advantages,
    informative_groups,
)
from grpo_kernels.grouped_gemm import grouped_gemm
from grpo_kernels.grpo_loss import GRPOLossConfig, GRPOLossOutput, GRPOMetrics, grpo_loss
from grpo_kernels.linear_log_probs import (
    LoRAFactors,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_token_log_probs,
)
from grpo_kernels.linear_log_probs.module import FusedLMHead
from grpo_kernels.moe_experts import moe_experts
from grpo_kernels.moe_experts.fp8_weights import clear_fp8_weight_cache
from grpo_kernels.moe_experts.module import MoE, MoEOutput
from grpo_kernels.moe_permute import (
    Permutation,
    build_permutation,
    moe_permute,
    moe_permute_quantize,
    moe_unpermute,
)
from grpo_kernels.moe_router import RouterOutput, moe_router
from grpo_kernels.moe_router.balance import update_expert_bias
from grpo_kernels.moe_router.replay import RouterReplay
from grpo_kernels.multi_token_prediction import MTPLossOutput, PolicyTerms, mtp_linear_cross_entropy
from grpo_kernels.multi_token_prediction.module import MultiTokenPrediction
from grpo_kernels.speculative_sampling import VerifyDraftOutput, verify_draft
from grpo_kernels.token_log_probs import TokenLogProbsOutput, token_log_probs

__all__ = [
    "BackendUnavailable",
    "BestOfGroupOutput",
    "FusedLMHead",
    "GRPOLossConfig",
    "GRPOLossOutput",
    "GRPOMetrics",
    "GroupAdvantagesOutput",
    "LoRAFactors",
    "MTPLossOutput",
    "MoE",
    "MoEOutput",
    "MultiTokenPrediction",
    "Permutation",
    "PolicyTerms",
    "RouterOutput",
    "RouterReplay",
    "ScaledTensor",
    "TokenLogProbsOutput",
    "VerifyDraftOutput",
    "__version__",
    "backend",
    "best_of_group",
    "build_permutation",
    "clear_fp8_weight_cache",
    "fp8_dequantize",
    "fp8_quantize",
    "group_advantages",
    "grouped_gemm",
    "grpo_loss",
    "informative_groups",
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_token_log_probs",
    "moe_experts",
    "moe_permute",
    "moe_permute_quantize",
    "moe_router",
    "moe_unpermute",
    "mtp_linear_cross_entropy",
    "token_log_probs",
    "update_expert_bias",
    "verify_draft",
]
