"""MoE: router, routed experts and shared expert as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_kernels import _checks
from grpo_kernels.moe_experts.arguments import check_activation, check_plan
from grpo_kernels.moe_experts.parts import MoEExperts, MoERouter, Routes, SharedExpert
from grpo_kernels.moe_router import RouterOutput
from grpo_kernels.moe_router.arguments import check_options
from grpo_kernels.moe_router.layer_replay import LayerReplay
from grpo_kernels.moe_router.options import MAX_EXPERTS, RouterOptions
from grpo_kernels.moe_router.replay import RouterReplay

if TYPE_CHECKING:
    from grpo_kernels.distributed import ExpertParallel

_NAME = "MoE"


class MoEOutput(NamedTuple):
    """What the layer gives.

    Attributes:
        hidden: [..., H]. The tokens' experts' weighted sum plus the shared expert; 0 for masked tokens.
        router: `RouterOutput`: losses to add to the trainer's, loads for `update_expert_bias`, routes, mismatches.
    """

    hidden: Tensor
    router: RouterOutput


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer: y = sum_k w_k E_k(x) + Shared(x).

    Parameters have the names of Hugging Face's blocks: `gate.weight`, `gate.e_score_correction_bias`,
    `experts.gate_up_proj`, `experts.down_proj`, `shared_experts.gate_proj.weight` and so on. The layer keeps no
    counts: what a pass found out is in its output, so recomputing it in the backward counts nothing twice.

    Args:
        hidden_size: H.
        intermediate_size: I, the width of an expert.
        num_experts: E, up to 1024.
        top_k: K, experts a token.
        scoring_func, n_group, topk_group, group_score, norm_topk_prob, routed_scaling_factor: as in `moe_router`.
        z_loss_coef, aux_loss_coef, seq_aux_loss_coef: likewise. They may be changed later, in `gate.options`.
        e_score_correction_bias: whether there is such a buffer, [E] float32, 0 at first, for `update_expert_bias`.
        shared_intermediate_size: Width of the shared expert; 0: none.
        router_bias: The router has a bias (gpt-oss).
        expert_bias: The experts have biases (gpt-oss).
        activation, swiglu_alpha, swiglu_limit, interleaved, recipe, fp8_wgrad, save: as in `moe_experts`.
        expert_parallel: `distributed.ExpertParallel` of the same num_experts: this rank's experts only.
        layer_id: The layer's number in the model, which `RouterReplay` knows its routes by: no two layers share one.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring_func: str = "softmax",
        e_score_correction_bias: bool = False,
        n_group: int = 1,
        topk_group: int = 1,
        group_score: str = "top2_sum",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        z_loss_coef: Tensor | float = 0.0,
        aux_loss_coef: Tensor | float = 0.0,
        seq_aux_loss_coef: Tensor | float = 0.0,
        shared_intermediate_size: int = 0,
        router_bias: bool = False,
        expert_bias: bool = False,
        activation: str = "swiglu",
        swiglu_alpha: float = 1.702,
        swiglu_limit: float = 7.0,
        interleaved: bool = False,
        recipe: str = "bf16",
        fp8_wgrad: bool = False,
        save: str = "preact",
        expert_parallel: ExpertParallel | None = None,
        layer_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, intermediate_size, num_experts, top_k, shared_intermediate_size)
        _check_places(num_experts, layer_id, expert_parallel)
        router = RouterOptions(
            top_k, scoring_func, n_group, topk_group, group_score, norm_topk_prob, routed_scaling_factor,
            z_loss=False, aux_loss=False, seq_aux_loss=False,
        )  # fmt: skip
        check_options(0, num_experts, router)
        check_activation(activation, swiglu_alpha, swiglu_limit, interleaved)
        check_plan(recipe, save, None, fp8_wgrad)
        _check_coefficients(z_loss_coef=z_loss_coef, aux_loss_coef=aux_loss_coef, seq_aux_loss_coef=seq_aux_loss_coef)
        _check_flags(e_score_correction_bias=e_score_correction_bias, router_bias=router_bias, expert_bias=expert_bias)
        self.hidden_size = hidden_size
        self.expert_parallel = expert_parallel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = MoERouter(
            hidden_size, num_experts, top_k,
            bias=router_bias, e_score_correction_bias=e_score_correction_bias, layer_id=layer_id,
            scoring_func=scoring_func, n_group=n_group, topk_group=topk_group, group_score=group_score,
            norm_topk_prob=norm_topk_prob, routed_scaling_factor=routed_scaling_factor, z_loss_coef=z_loss_coef,
            aux_loss_coef=aux_loss_coef, seq_aux_loss_coef=seq_aux_loss_coef, **factory,
        )  # fmt: skip
        self.experts = MoEExperts(
            hidden_size, intermediate_size, num_experts,
            bias=expert_bias, expert_range=None if expert_parallel is None else expert_parallel.local_range,
            activation=activation, swiglu_alpha=swiglu_alpha, swiglu_limit=swiglu_limit, interleaved=interleaved,
            recipe=recipe, fp8_wgrad=fp8_wgrad, save=save, **factory,
        )  # fmt: skip
        shared = SharedExpert(hidden_size, shared_intermediate_size, **factory) if shared_intermediate_size else None
        self.shared_experts = shared
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh parameters, in place; the correction bias is 0."""
        for part in (self.gate, self.experts, self.shared_experts):
            if part is not None:
                part.reset_parameters()

    @property
    def e_score_correction_bias(self) -> Tensor | None:
        """The router's buffer, for `update_expert_bias`."""
        return self.gate.e_score_correction_bias

    def extra_repr(self) -> str:
        return "" if self.expert_parallel is None else f"expert_parallel={self.expert_parallel!r}"

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        replay: RouterReplay | LayerReplay | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> MoEOutput:
        """The layer.

        Args:
            x: [..., H] float. The tokens. Of [B, S, H], seq_aux_loss takes every row for a sequence.
            token_mask: [...] bool, or numbers of which non-zero counts. Other tokens are routed nowhere, not counted,
                and give 0; they may hold NaN.
            replay: The routes of this micro-batch, recorded or taken again, for which the layer needs its `layer_id`;
                or `RouterReplay.layer` of them, for layers that are compiled one by one.
            cu_seqlens: [B+1] int. Bounds of sequences among all tokens, for seq_aux_loss.

        Returns:
            `MoEOutput(hidden, router)`.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device; a replay has no routes for
                this layer or those of other tokens.
        """
        self._check_input(x, token_mask, replay)
        tokens = x.reshape(-1, self.hidden_size)
        if token_mask is not None:
            token_mask = token_mask.reshape(-1)
            tokens = tokens.masked_fill((token_mask == 0).unsqueeze(1), 0.0)
        if cu_seqlens is None and x.ndim == 3:
            cu_seqlens = self._rows(x)
        router = self.gate(tokens, token_mask=token_mask, replay=replay, cu_seqlens=cu_seqlens)
        hidden = self._routed(tokens, router)
        if self.shared_experts is not None:
            hidden = hidden + self.shared_experts(tokens)
        # Not a view: an operation in place on one would lose the hooks that FSDP2 puts on outputs.
        return MoEOutput(torch.ops.aten._unsafe_view(hidden, x.shape), router)

    def _routed(self, tokens: Tensor, router: RouterOutput) -> Tensor:
        if self.expert_parallel is None:
            hidden: Tensor = self.experts(tokens, Routes(router.topk_weights, router.topk_ids))
            return hidden
        sent = self.expert_parallel.dispatch(tokens, router)
        here = self.experts(sent.x, Routes(sent.topk_weights, sent.topk_ids))
        return self.expert_parallel.combine(here, sent.handle)

    def _rows(self, x: Tensor) -> Tensor | None:
        """The bounds of the rows of x [B, S, H], if a loss asks for sequences."""
        coefficient = self.gate.options["seq_aux_loss_coef"]
        if not isinstance(coefficient, Tensor) and coefficient == 0:
            return None
        return torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]

    def _check_input(self, x: Tensor, token_mask: Tensor | None, replay: RouterReplay | LayerReplay | None) -> None:
        _checks.check_tensor(_NAME, "x", x)
        _checks.check_dtype(_NAME, "x", x)
        if x.ndim == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"{_NAME}: x must have shape [..., H] with H = {self.hidden_size}, got {list(x.shape)}")
        if token_mask is not None:
            _checks.check_tensor(_NAME, "token_mask", token_mask)
            _checks.check_shape(_NAME, "token_mask", token_mask, ("[...]", x.shape[:-1]))
            _checks.check_same_device(_NAME, "token_mask", token_mask, "x", x)
        if replay is not None and not isinstance(replay, (RouterReplay, LayerReplay)):
            raise TypeError(f"{_NAME}: replay must be a RouterReplay, got {type(replay).__name__}")


def _check_sizes(hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, shared: int) -> None:
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts}
    for name, value in {**sizes, "top_k": top_k}.items():
        _checks.check_integer(_NAME, name, value, minimum=1)
    _checks.check_integer(_NAME, "shared_intermediate_size", shared, minimum=0)
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"{_NAME}: num_experts must be <= {MAX_EXPERTS}, got {num_experts}")
    if top_k > num_experts:
        raise ValueError(f"{_NAME}: top_k must be <= num_experts = {num_experts}, got {top_k}")


def _check_coefficients(**coefficients: Tensor | float) -> None:
    for name, value in coefficients.items():
        if not isinstance(value, Tensor):
            _checks.check_number(_NAME, name, value)
        elif value.ndim != 0:
            raise ValueError(f"{_NAME}: {name} must be a number or a 0-d tensor, got shape {list(value.shape)}")


def _check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{_NAME}: {name} must be a bool, got {type(value).__name__}")


def _check_places(num_experts: int, layer_id: int | None, expert_parallel: ExpertParallel | None) -> None:
    if layer_id is not None:
        _checks.check_integer(_NAME, "layer_id", layer_id, minimum=0)
    if expert_parallel is not None and expert_parallel.num_experts != num_experts:
        raise ValueError(
            f"{_NAME}: expert_parallel is for {expert_parallel.num_experts} experts, the layer has {num_experts}"
        )
