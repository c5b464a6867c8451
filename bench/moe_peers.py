"""Other people's mixture-of-experts blocks and their parts, where they are installed.

A peer takes the inputs of a case, in the layout that its checkpoints have.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .case import Inputs
from .moe_definitions import Model, Values, activation, route, router_logits

Peer = Callable[[Inputs], Values]

_BLOCKS = {
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3", "DeepseekV3MoE"),
    "Qwen3-30B": ("qwen3_moe", "Qwen3Moe", "Qwen3MoeSparseMoeBlock"),
    "gpt-oss-120b": ("gpt_oss", "GptOss", "GptOssMLP"),
    "gpt-oss-20b": ("gpt_oss", "GptOss", "GptOssMLP"),
}


def attribute(module: str, name: str) -> Any:
    """What the module calls so; None where it is not installed, does not load, or has no such name."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return None


# --- transformers ----------------------------------------------------------------------------------------------------


class _Routed(torch.nn.Module):
    """Gate and experts of a block, without the shared expert that some have."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate = block.gate if hasattr(block, "gate") else block.router
        self.experts = block.experts

    def forward(self, x: Tensor) -> Tensor:
        _, weights, ids = self.gate(x)
        result: Tensor = self.experts(x, ids, weights)
        return result


def _parameters(inputs: Inputs, clamped: bool) -> dict[str, Tensor]:
    """The inputs by their names in `_Routed`."""
    names = {"gate.weight": "router", "experts.gate_up_proj": "gate_up", "experts.down_proj": "down"}
    if clamped:
        names |= {"gate.bias": "router_bias"}
        names |= {f"experts.{name}_proj_bias": f"{name}_bias" for name in ("gate_up", "down")}
    elif "correction" in inputs:
        names |= {"gate.e_score_correction_bias": "correction"}
    return {theirs: inputs[ours] for theirs, ours in names.items()}


def _configured(configuration: Any, model: Model, implementation: str) -> Any:
    groups = {"n_group": model.groups, "topk_group": model.kept_groups, "routed_scaling_factor": model.scale}
    made = configuration(
        hidden_size=model.hidden,
        moe_intermediate_size=model.width,
        intermediate_size=model.width,
        num_experts=model.experts,
        n_routed_experts=model.experts,
        num_local_experts=model.experts,
        num_experts_per_tok=model.top_k,
        norm_topk_prob=True,
        **(groups if model.biased else {}),
    )
    made._experts_implementation = implementation
    return made


def transformers_block(model: Model, implementation: str) -> Peer | None:
    """The block of the model in transformers: "eager" loops over the experts, "grouped_mm" sorts tokens by expert."""
    folder, prefix, name = _BLOCKS[model.name.partition(" 1/")[0]]
    package = f"transformers.models.{folder}"
    block = attribute(f"{package}.modeling_{folder}", name)
    configuration = attribute(f"{package}.configuration_{folder}", f"{prefix}Config")
    if block is None or configuration is None:
        return None

    @functools.cache
    def routed(experts: int, hidden: int) -> _Routed:
        configured = _configured(configuration, replace(model, experts=experts, hidden=hidden), implementation)
        with torch.device("meta"):  # parameters come with the inputs
            return _Routed(block(configured))

    def run(inputs: Inputs) -> Values:
        module = routed(*inputs["router"].shape)
        return (torch.func.functional_call(module, _parameters(inputs, model.clamped), (inputs["x"],)),)

    return run


# --- Liger, ScatterMoE, MegaBlocks -----------------------------------------------------------------------------------


def liger_experts(model: Model, device: str) -> Peer | None:
    """Liger's fused experts behind the baseline's router; its Triton kernels have no biases and no clamp."""
    function = attribute("liger_kernel.ops", "LigerFusedMoEFunction")
    if function is None or device != "cuda" or model.clamped:
        return None

    def run(inputs: Inputs) -> Values:
        weights, ids = route(router_logits(inputs), model, inputs.get("correction"))
        return (function.apply(inputs["x"], inputs["gate_up"], inputs["down"], ids.int(), weights),)

    return run


def scattermoe_experts(model: Model, device: str) -> Peer | None:
    """ScatterMoE's products of rows scattered by expert, behind the baseline's router."""
    linear = attribute("scattermoe.parallel_experts", "parallel_linear")
    count = attribute("scattermoe.parallel_experts", "flatten_sort_count")
    if linear is None or count is None or device != "cuda" or model.clamped:
        return None

    def run(inputs: Inputs) -> Values:
        weights, ids = route(router_logits(inputs), model, inputs.get("correction"))
        experts, rows, offsets = count(ids, num_experts=len(inputs["router"]))
        up, down = (inputs[name].transpose(1, 2) for name in ("gate_up", "down"))
        preact = linear(inputs["x"], up, model.top_k, experts, rows, offsets, grouped_out=True)
        gates = weights.to(preact.dtype)
        return (linear(activation(preact, model), down, 1, experts, rows, offsets, gates=gates, grouped_in=True),)

    return run


def megablocks_gemm(device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The grouped GEMM that MegaBlocks uses, which wants sizes on the host: rows, weights [E, N, K], sizes in."""
    function = attribute("grouped_gemm.ops", "gmm")
    if function is None or device != "cuda":
        return None
    return lambda x, weight, sizes: function(x, weight, sizes.cpu().long(), True)


# --- TransformerEngine -----------------------------------------------------------------------------------------------


def te_permute(device: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """TransformerEngine's map and move in one: tokens and ids in."""
    function = attribute("transformer_engine.pytorch", "moe_permute")
    if function is None or device != "cuda":
        return None
    return lambda x, ids: function(x, ids, ids.numel(), -1, map_type="index")[0]  # type: ignore[no-any-return]


def te_unpermute(device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """TransformerEngine's weighted sum; its map has all first slots, then all second ones."""
    function = attribute("transformer_engine.pytorch", "moe_unpermute")
    if function is None or device != "cuda":
        return None
    return lambda y, slots_first, weights: function(y, slots_first, weights, map_type="index")  # type: ignore[no-any-return]
