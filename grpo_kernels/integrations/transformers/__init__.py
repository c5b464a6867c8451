"""Models of Hugging Face transformers: their MoE blocks, their loss, and their head without logits."""

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "grpo_kernels.integrations.transformers needs transformers 5.23: pip install 'transformers>=5.23,<6'",
        name=error.name,
    ) from error

from grpo_kernels.integrations._patch import IncompatibleVersion

try:
    from grpo_kernels.integrations.transformers.experts import register_experts
    from grpo_kernels.integrations.transformers.lm_head import fuse_lm_head, restore_lm_head
    from grpo_kernels.integrations.transformers.loss import causal_lm_loss
    from grpo_kernels.integrations.transformers.moe import replace_moe, replaced_moe, replay_routes, restore_moe
except ImportError as error:
    if not (error.name or "").startswith("transformers"):
        raise
    raise IncompatibleVersion(
        f"grpo_kernels.integrations.transformers needs transformers 5.23, got {_transformers.__version__}: {error}"
    ) from error

__all__ = [
    "causal_lm_loss",
    "fuse_lm_head",
    "register_experts",
    "replace_moe",
    "replaced_moe",
    "replay_routes",
    "restore_lm_head",
    "restore_moe",
]
