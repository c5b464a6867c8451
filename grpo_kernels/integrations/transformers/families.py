"""Routers and experts of the models that `replace_moe` serves, with another forward.

Each class derives from the one of transformers that it stands for. A module becomes one of them by its `__class__`, so
parameters, names, hooks, and what looks for the class of a router or of experts stay as they are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

from grpo_kernels.integrations._patch import check_signature
from grpo_kernels.integrations.transformers.experts import experts_forward
from grpo_kernels.moe_experts.router_logits import router_logits
from grpo_kernels.moe_router import moe_router
from grpo_kernels.moe_router.replay import RouterReplay


class FusedExperts(nn.Module):
    """Experts whose forward is `moe_experts`."""

    stock: ClassVar[type[nn.Module]]
    moe_options: dict[str, Any]

    def enter(self, options: dict[str, Any]) -> None:
        self.moe_options = options

    def leave(self) -> None:
        del self.moe_options

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights, **self.moe_options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.moe_options.items())


class FusedRouter(nn.Module):
    """A router whose forward is `moe_router` on float32 logits, along given routes if it has been told so."""

    stock: ClassVar[type[nn.Module]]
    moe_layer_id: int | None
    moe_replay: RouterReplay | None
    weight: Tensor
    top_k: int
    hidden_dim: int

    def enter(self, layer_id: int | None) -> None:
        self.moe_layer_id, self.moe_replay = layer_id, None

    def leave(self) -> None:
        del self.moe_layer_id, self.moe_replay

    def options(self) -> dict[str, Any]:
        """Of `moe_router`."""
        return {}

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights [T, K] and ids [T, K] int64, as the router that this stands for gives them."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        logits = router_logits(x, self.weight, getattr(self, "bias", None))
        if self.moe_replay is None:
            routes = moe_router(logits, self.top_k, **self.options())
        elif self.moe_layer_id is None:
            raise ValueError("replay_routes: the router is in no numbered layer of the model")
        else:
            routes = self.moe_replay.route(self.moe_layer_id, logits, self.top_k, **self.options())
        return logits, routes.topk_weights, routes.topk_ids.to(torch.int64)


class FusedDeepseekV3Router(FusedRouter, DeepseekV3TopkRouter):  # type: ignore[misc]
    stock = DeepseekV3TopkRouter
    e_score_correction_bias: Tensor

    def options(self) -> dict[str, Any]:
        bias = self.e_score_correction_bias
        return {
            "scoring_func": "sigmoid",
            # Rounded already, if model.to(torch.bfloat16) has done that: from_pretrained keeps it in float32.
            "e_score_correction_bias": bias.float() if bias.element_size() == 2 else bias,
            "n_group": self.num_group,
            "topk_group": self.topk_group,
            "norm_topk_prob": self.norm_topk_prob,
            "routed_scaling_factor": self.routed_scaling_factor,
        }


class FusedGptOssRouter(FusedRouter, GptOssTopKRouter):  # type: ignore[misc]
    stock = GptOssTopKRouter

    def options(self) -> dict[str, Any]:
        return {"scoring_func": "topk_softmax"}


class FusedMixtralRouter(FusedRouter, MixtralTopKRouter):  # type: ignore[misc]
    stock = MixtralTopKRouter


class FusedQwen3MoeRouter(FusedRouter, Qwen3MoeTopKRouter):  # type: ignore[misc]
    stock = Qwen3MoeTopKRouter

    def options(self) -> dict[str, Any]:
        return {"norm_topk_prob": self.norm_topk_prob}


class FusedDeepseekV3Experts(FusedExperts, DeepseekV3Experts):  # type: ignore[misc]
    stock = DeepseekV3Experts


class FusedGptOssExperts(FusedExperts, GptOssExperts):  # type: ignore[misc]
    stock = GptOssExperts


class FusedMixtralExperts(FusedExperts, MixtralExperts):  # type: ignore[misc]
    stock = MixtralExperts


class FusedQwen3MoeExperts(FusedExperts, Qwen3MoeExperts):  # type: ignore[misc]
    stock = Qwen3MoeExperts


ROUTERS: dict[type[nn.Module], type[FusedRouter]] = {
    cls.stock: cls for cls in (FusedDeepseekV3Router, FusedGptOssRouter, FusedMixtralRouter, FusedQwen3MoeRouter)
}
EXPERTS: dict[type[nn.Module], type[FusedExperts]] = {
    cls.stock: cls for cls in (FusedDeepseekV3Experts, FusedGptOssExperts, FusedMixtralExperts, FusedQwen3MoeExperts)
}


def check_families() -> None:
    """Raises IncompatibleVersion unless the classes that stand here are called as those of transformers 5.23."""
    for router in ROUTERS:
        check_signature("transformers", f"{router.__name__}.forward", router.forward, ("self", "hidden_states"))
    for experts in EXPERTS:
        names = ("top_k_index", "top_k_weights")
        if experts is GptOssExperts:
            names = ("router_indices", "routing_weights")
        check_signature(
            "transformers", f"{experts.__name__}.forward", experts.forward, ("self", "hidden_states", *names)
        )
