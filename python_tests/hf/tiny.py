"""Tiny random models of transformers, alike for equal arguments."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from grpo_kernels.testing import assert_as_accurate

VOCAB, HIDDEN, EXPERTS, TOP_K, LAYERS = 67, 32, 8, 2, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
_MOE = {**_COMMON, "num_experts_per_tok": TOP_K}
MOE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": 16,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **_MOE,
            "num_local_experts": EXPERTS,
            "head_dim": 8,
            "sliding_window": 8,
            "swiglu_limit": 0.5,
            "swiglu_alpha": 1.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "mixtral": ("Mixtral", {**_MOE, "num_local_experts": EXPERTS}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_MOE, "num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    ),
    "qwen3_moe_raw_weights": (
        "Qwen3Moe",
        {**_MOE, "num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": False},
    ),
}
DENSE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "phi3": ("Phi3", {}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
}


@functools.cache
def _model(name: str) -> Any:
    family, options = MOE_MODELS.get(name) or DENSE_MODELS[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**{**_COMMON, **options})
    state = torch.get_rng_state()
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # so large that the experts differ and the routers decide
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                parameter.normal_(std=0.5 if "bias" in key or "embed" in key else parameter.shape[-1] ** -0.5)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    torch.set_rng_state(state)
    return model


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy, in training mode."""
    model: Any = copy.deepcopy(_model(name))
    if dtype == torch.float64 and name in MOE_MODELS:
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model.to(dtype).train()


def batch(seed: int = 0, rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Padded on the right; labels cover part of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([length, length - 3, length - 5][:rows])[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :2] = -100
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(ours: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Every gradient, relative to its largest value, is as accurate as those of the stock model in float32.

    Together, since through several layers the error of a single small one is a matter of luck.
    """
    assert ours.keys() == exact.keys() == eager.keys()
    scales = {key: gradient.double().abs().max() for key, gradient in exact.items()}
    assert all(scales.values())
    vectors = [torch.cat([(g[key] / scales[key]).flatten() for key in scales]) for g in (ours, exact, eager)]
    assert all(gradient.dtype == eager[key].dtype for key, gradient in ours.items())
    assert_as_accurate(*vectors, name="gradients")
