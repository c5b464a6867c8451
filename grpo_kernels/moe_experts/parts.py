"""The parts of the MoE module: router, routed experts, shared expert. Each computes in its own forward, so that a
sharding library may make it a unit of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo_kernels.moe_experts.api import moe_experts
from grpo_kernels.moe_experts.fp8_weights import clear_fp8_weight_cache
from grpo_kernels.moe_experts.router_logits import router_logits
from grpo_kernels.moe_router import RouterOutput, moe_router
from grpo_kernels.moe_router.layer_replay import LayerReplay
from grpo_kernels.moe_router.replay import RouterReplay

_NAME = "MoE"


class Routes:
    """Opaque to the hooks of sharding libraries, which look into tuples and dataclasses and round what they find."""

    def __init__(self, topk_weights: Tensor, topk_ids: Tensor) -> None:
        self.topk_weights = topk_weights
        self.topk_ids = topk_ids


class MoERouter(nn.Module):
    """The router of `MoE`: float32 logits of every expert, and `moe_router`.

    Its parameters are those of Hugging Face's gates: `weight` [E, H], `bias` [E] (gpt-oss), and the buffer
    `e_score_correction_bias` [E] (DeepSeek-V3), which stays float32 in `.to(torch.bfloat16)`, `.half()` and when a
    checkpoint of 16 bits is loaded: rounded to them, it would send one token in four to other experts.
    """

    bias: nn.Parameter | None
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        e_score_correction_bias: bool = False,
        layer_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_experts, self.top_k, self.layer_id = hidden_size, num_experts, top_k, layer_id
        self.options = options
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        correction = torch.zeros(num_experts, device=device, dtype=torch.float32) if e_score_correction_bias else None
        self.register_buffer("e_score_correction_bias", correction)

    def reset_parameters(self) -> None:
        """Uniform as in `nn.Linear`; biases 0."""
        nn.init.uniform_(self.weight, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        for bias in (self.bias, self.e_score_correction_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        replay: RouterReplay | LayerReplay | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> RouterOutput:
        """Routes of x [T, H]; see `MoE.forward`."""
        logits = router_logits(x, self.weight, self.bias)
        options = {
            **self.options,
            "e_score_correction_bias": self.e_score_correction_bias,
            "token_mask": token_mask,
            "cu_seqlens": cu_seqlens,
        }
        if replay is None:
            return moe_router(logits, self.top_k, **options)
        if isinstance(replay, RouterReplay):
            if self.layer_id is None:
                raise ValueError(f"{_NAME}: replay needs the layer's number: MoE(..., layer_id=...)")
            replay = replay.layer(self.layer_id)
        elif not torch.compiler.is_compiling() and self.layer_id not in (None, replay.layer_id):
            # A compiled layer that looked would be compiled for its number alone.
            raise ValueError(f"{_NAME}: replay is of layer {replay.layer_id}, this is layer {self.layer_id}")
        return replay.route(logits, self.top_k, **options)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"bias={self.bias is not None}, e_score_correction_bias={self.e_score_correction_bias is not None}, "
            f"layer_id={self.layer_id}{options}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoERouter:
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.e_score_correction_bias
        if exact is not None and moved is not None and moved.dtype in (torch.bfloat16, torch.float16):
            self.e_score_correction_bias = exact.to(moved.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        name = f"{prefix}e_score_correction_bias"
        if (
            name in state_dict and self.e_score_correction_bias is not None
        ):  # load_state_dict(assign=True) would take it
            state_dict[name] = state_dict[name].to(self.e_score_correction_bias.dtype)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class MoEExperts(nn.Module):
    """The routed experts of `MoE`, or those of this rank: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]."""

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        bias: bool = False,
        expert_range: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_experts, self.expert_range, self.options = num_experts, expert_range, options
        start, end = expert_range or (0, num_experts)

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(end - start, *size, device=device, dtype=dtype))

        self.gate_up_proj = parameter(2 * intermediate_size, hidden_size)
        self.down_proj = parameter(hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(2 * intermediate_size) if bias else None
        self.down_proj_bias = parameter(hidden_size) if bias else None

    def reset_parameters(self) -> None:
        """Every expert uniform as in `nn.Linear`; biases 0."""
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """[T, H]: each token's weighted sum of its experts that are here."""
        return moe_experts(
            x,
            self.gate_up_proj,
            self.down_proj,
            (routes.topk_weights, routes.topk_ids),
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            expert_range=self.expert_range,
            num_experts=self.num_experts,
            **self.options,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEExperts:
        clear_fp8_weight_cache()  # weights that leave a GPU make room there; to be swapped they must not be referred to
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        clear_fp8_weight_cache()  # what is written into shards does not count as a change of the gathered weight
        super()._load_from_state_dict(*arguments)

    def extra_repr(self) -> str:
        _, rows, hidden_size = self.gate_up_proj.shape
        range_ = "" if self.expert_range is None else f", experts {self.expert_range[0]} to {self.expert_range[1]} here"
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"hidden_size={hidden_size}, intermediate_size={rows // 2}, num_experts={self.num_experts}, "
            f"bias={self.gate_up_proj_bias is not None}{range_}{options}"
        )


class SharedExpert(nn.Module):
    """An expert that every token passes: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output
