"""The stacked experts of a transformers model, computed by `moe_experts`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe as transformers_moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from grpo_kernels.integrations._patch import check_signature
from grpo_kernels.moe_experts import moe_experts
from grpo_kernels.moe_experts.arguments import check_plan


def register_experts(
    name: str = "grpo_kernels", *, recipe: str = "bf16", fp8_wgrad: bool = False, save: str = "preact"
) -> None:
    """Makes `moe_experts` an experts implementation of transformers.

    ::

        register_experts()
        model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="grpo_kernels")
        model.set_experts_implementation("grpo_kernels")  # or later

    Router, shared experts and everything else stay those of the model. Served are experts with the gate
    silu(gate) * up, whatever their layout, and those of gpt-oss; others raise at their first call.

    Args:
        name: by which it is chosen. The same name again replaces the options.
        recipe, fp8_wgrad, save: as in `moe_experts`.

    Raises:
        TypeError, ValueError: an option is of the wrong type or not one of its values.
        IncompatibleVersion: transformers calls experts otherwise.
    """
    if not isinstance(name, str) or name in ("", "eager", "grouped_mm", "batched_mm"):
        raise ValueError(f"register_experts: name must be a name of its own, got {name!r}")
    check_plan(recipe, save, None, fp8_wgrad)
    check_signature(
        "transformers",
        "transformers.integrations.moe.grouped_mm_experts_forward",
        transformers_moe.grouped_mm_experts_forward,
        ("self", "hidden_states", "top_k_index", "top_k_weights"),
    )
    function = functools.partial(_checked_forward, recipe=recipe, fp8_wgrad=fp8_wgrad, save=save)
    transformers_moe.ALL_EXPERTS_FUNCTIONS.register(name, function)


def check_experts(op: str, module: nn.Module) -> None:
    """Raises a ValueError that names the class and what of it is not served."""
    problem = _problem(module)
    if problem:
        raise ValueError(f"{op}: {type(module).__name__} is not served: {problem}")


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **options: Any
) -> Tensor:
    """[T, H] in the dtype of the tokens. What the experts' own forward returns.

    Args:
        module: experts with stacked parameters, [E, 2I, H] and [E, H, I] or transposed; they are read where they lie.
        hidden_states: [T, H] float.
        top_k_index: [T, K] int. Under transformers' expert parallelism, E marks an expert of another rank.
        top_k_weights: [T, K] float.
        options: recipe, fp8_wgrad, save of `moe_experts`.
    """
    gate_up, down = module.gate_up_proj, module.down_proj
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if module._is_expert_parallel:
        top_k_index = top_k_index.masked_fill(top_k_index >= gate_up.shape[0], -1)
    if isinstance(module, GptOssExperts):
        options |= {"activation": "clamped_swiglu", "swiglu_alpha": module.alpha, "swiglu_limit": module.limit}
    output = moe_experts(
        hidden_states,
        gate_up,
        down,
        (top_k_weights, top_k_index),
        gate_up_bias=module.gate_up_proj_bias if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        interleaved=not module.is_concatenated,
        **options,
    )
    return output.to(hidden_states.dtype)


def _checked_forward(module: nn.Module, *arguments: Tensor, **options: Any) -> Tensor:
    if not torch.compiler.is_compiling():
        check_experts("experts implementation", module)
    return experts_forward(module, *arguments, **options)


def _problem(module: Any) -> str:
    if not module.has_gate:
        return "its experts have no gate"
    if module.has_post_expert_norm:
        return "its experts are followed by a norm"
    if not isinstance(module, GptOssExperts):
        if type(module)._apply_gate is not transformers_moe._default_apply_gate:
            return "it has an activation of its own"
        if not isinstance(module.act_fn, (SiLUActivation, nn.SiLU)):
            return f"its activation is {type(module.act_fn).__name__}, not SiLU"
    if not module.gate_up_proj.dtype.is_floating_point or module.gate_up_proj.element_size() == 1:
        return f"its weights are {str(module.gate_up_proj.dtype).removeprefix('torch.')}"
    return ""
