"""The MoE module: what its constructor and its forward refuse, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from grpo_kernels import MoE, RouterReplay
from python_tests.moe_layers import E, H, I, K, layer_of, normal
from python_tests.test_moe_module import OneOfTwo

X = normal(3, 5, H)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MoE(0, I, E, K), ValueError, "MoE: hidden_size must be >= 1, got 0"),
        (lambda: MoE(H, I, E, 9), ValueError, "top_k must be <= num_experts = 8, got 9"),
        (lambda: MoE(H, I, E, K, shared_intermediate_size=-1), ValueError, "shared_intermediate_size must be >= 0"),
        (lambda: MoE(H, I, E, K, layer_id=-1), ValueError, "layer_id must be >= 0"),
        (lambda: MoE(H, I, 6, K, expert_parallel=OneOfTwo(0)), ValueError, "for 8 experts, the layer has 6"),  # type: ignore[arg-type]
        (lambda: layer_of()([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: layer_of()(torch.zeros(2, H).int()), TypeError, "x must have dtype"),
        (lambda: layer_of()(torch.zeros(2, H + 1)), ValueError, r"\[..., H\] with H = 8, got \[2, 9\]"),
        (lambda: layer_of()(X, token_mask=torch.ones(3)), ValueError, r"token_mask must have shape \[...\] = \[3, 5\]"),
        (
            lambda: layer_of()(X, token_mask=torch.ones(3, 5, device="meta")),
            ValueError,
            "token_mask must be on cpu like x",
        ),
        (lambda: layer_of()(X, replay=[]), TypeError, "replay must be a RouterReplay, got list"),
        (
            lambda: layer_of(layer_id=None)(X, replay=RouterReplay()),
            ValueError,
            r"replay needs the layer's number: MoE\(",
        ),
        (lambda: layer_of()(X, replay=RouterReplay().layer(4)), ValueError, "replay is of layer 4, this is layer 3"),
        (lambda: MoE(H, I, 1025, K), ValueError, "MoE: num_experts must be <= 1024, got 1025"),
        (lambda: MoE(H, I, 64, 33), ValueError, "moe_router: top_k must be <="),
        (lambda: layer_of(scoring_func="relu"), ValueError, "moe_router: scoring_func must be one of"),
        (lambda: layer_of(group_score="sum"), ValueError, "moe_router: group_score must be one of"),
        (lambda: layer_of(n_group=3), ValueError, "moe_router: n_group must divide E = 8, got 3"),
        (lambda: layer_of(n_group=2, topk_group=3), ValueError, "moe_router: topk_group must be <= n_group = 2"),
        (lambda: layer_of(n_group=8), ValueError, "of 8 groups leave 1 experts, fewer than top_k = 2"),
        (lambda: layer_of(norm_topk_prob=1), TypeError, "moe_router: norm_topk_prob must be a bool, got int"),
        (lambda: layer_of(routed_scaling_factor=0.0), ValueError, "routed_scaling_factor must be finite and > 0"),
        (lambda: layer_of(z_loss_coef=float("nan")), ValueError, "MoE: z_loss_coef must be finite, got nan"),
        (lambda: layer_of(aux_loss_coef="0.1"), TypeError, "MoE: aux_loss_coef must be a number, got str"),
        (lambda: layer_of(seq_aux_loss_coef=torch.ones(1)), ValueError, r"or a 0-d tensor, got shape \[1\]"),
        (lambda: layer_of(activation="relu"), ValueError, "moe_experts: activation must be one of"),
        (lambda: layer_of(swiglu_limit=0.0), ValueError, "moe_experts: swiglu_limit must be finite and > 0"),
        (lambda: layer_of(interleaved=1), TypeError, "moe_experts: interleaved must be a bool, got int"),
        (lambda: layer_of(recipe="fp8"), ValueError, "moe_experts: recipe must be one of"),
        (lambda: layer_of(save="all"), ValueError, "moe_experts: save must be one of"),
        (lambda: layer_of(e_score_correction_bias=torch.zeros(E)), TypeError, "must be a bool, got Tensor"),
        (lambda: layer_of(expert_bias=1), TypeError, "MoE: expert_bias must be a bool, got int"),
    ],
)
def test_faults_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
