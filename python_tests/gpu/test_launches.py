"""How many kernels a call launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import grpo_kernels

pytestmark = pytest.mark.gpu


def launches(work: Callable[[], Any]) -> list[str]:
    """Names of the kernels that `work` puts on the device, without copies and fills."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    names = [event.name for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


def test_the_count_sees_kernels() -> None:
    x = torch.randn(1024, device="cuda")
    assert len(launches(lambda: x + 1)) == 1


def test_group_advantages_of_equal_groups_is_one_launch() -> None:
    rewards = torch.randn(4096, device="cuda")
    assert len(launches(lambda: grpo_kernels.group_advantages(rewards, group_size=8))) == 1


@pytest.mark.parametrize(("preset", "most"), [("dapo", 1), ("cispo", 1), ("bnpo", 1), ("gspo", 3), ("grpo", 3)])
def test_grpo_loss(preset: str, most: int) -> None:
    log_probs = -torch.rand(64, 4096, device="cuda")
    old, advantages = log_probs - 0.01, torch.randn(64, device="cuda")
    mask = torch.rand(64, 4096, device="cuda") > 0.2
    leaf = log_probs.clone().requires_grad_()
    config = grpo_kernels.GRPOLossConfig.preset(preset)
    names = launches(lambda: grpo_kernels.grpo_loss(leaf, old, advantages, mask, config))
    assert len(names) <= most, names


@pytest.mark.parametrize("outputs", [(), ("entropy", "sum_squared_probs", "top1_ids")], ids=["log_probs", "everything"])
def test_token_log_probs_is_one_launch_each_way(outputs: tuple[str, ...]) -> None:
    logits = torch.randn(64, 32000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(32000, (64,), device="cuda")
    upstream = torch.ones(64, device="cuda")
    forward = launches(lambda: grpo_kernels.token_log_probs(logits, ids, outputs=outputs))
    assert len(forward) == 1, forward
    both = launches(
        lambda: torch.autograd.grad(grpo_kernels.token_log_probs(logits, ids, outputs=outputs)[0], logits, upstream)
    )
    assert len([name for name in both if "fill" not in name.lower()]) == 2, both


_VERIFY: dict[str, tuple[dict[str, Any], int]] = {
    "token": ({"mode": "token"}, 4),  # statistics, decision, race and its end
    "filters": ({"mode": "token", "top_k": torch.full((16,), 40)}, 5),  # and their thresholds
    "block": ({"mode": "block"}, 6),  # products, sums and decision
    "greedy": ({"mode": "greedy"}, 2),
}


@pytest.mark.parametrize("kind", _VERIFY)
def test_verify_draft(kind: str) -> None:
    options, most = _VERIFY[kind]
    options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    target = torch.randn(16, 4, 32000, device="cuda", dtype=torch.bfloat16)
    draft, ids = target[:, :3] + 0.5, target[:, :3].argmax(-1)
    seeds = torch.arange(16, device="cuda")
    names = launches(lambda: grpo_kernels.verify_draft(target, ids, draft_logits=draft, seeds=seeds, **options))
    assert len([name for name in names if "fill" not in name.lower()]) <= most, names


def test_the_targets_of_all_depths_are_one_launch() -> None:
    ids = torch.randint(1000, (8192,), device="cuda")
    positions, mask = torch.arange(8192, device="cuda") % 700, torch.rand(8192, device="cuda") < 0.9
    names = launches(lambda: torch.ops.grpo_kernels.mtp_targets(ids, positions, mask, 3, 1, 0, -100, "triton"))
    assert len([name for name in names if "fill" not in name.lower()]) == 1, names


@pytest.mark.parametrize("replay", [False, True], ids=["live", "replayed"])
def test_moe_router_is_two_launches_each_way(replay: bool) -> None:
    """The second one sums the losses."""
    logits = torch.randn(4096, 256, device="cuda", requires_grad=True)
    options: dict[str, Any] = {"replay_ids": torch.rand(4096, 256, device="cuda").topk(8).indices} if replay else {}
    cu_seqlens = torch.tensor([0, 1000, 4096], device="cuda", dtype=torch.int32)
    losses = {"z_loss_coef": 1e-3, "aux_loss_coef": 1e-3, "seq_aux_loss_coef": 1e-4, "cu_seqlens": cu_seqlens}
    sigmoid = {"scoring_func": "sigmoid", "n_group": 8, "topk_group": 4}
    upstream = torch.randn(4096, 8, device="cuda")

    def forward() -> Any:
        return grpo_kernels.moe_router(logits, 8, **sigmoid, **options)

    names = launches(forward)
    assert len(names) <= 2, names
    names = launches(lambda: torch.autograd.grad(forward().topk_weights, logits, upstream))
    assert len([name for name in names if "fill" not in name.lower()]) <= 4, names
    names = launches(lambda: grpo_kernels.moe_router(logits, 8, **sigmoid, **options, **losses))
    own = [name for name in names if "elementwise" not in name]  # each loss is multiplied by its coefficient
    assert len(own) <= 2, names


@pytest.mark.parametrize("alignment", [1, 128])
def test_build_permutation_is_two_launches(alignment: int) -> None:
    ids = torch.rand(4096, 256, device="cuda").topk(8).indices.int()
    names = launches(lambda: grpo_kernels.build_permutation(ids, 256, alignment=alignment))
    assert len(names) <= 2, names


@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
@pytest.mark.parametrize("transpose", [False, True, "both"])
def test_quantisation_is_one_launch(transpose: Any, block: tuple[int, int]) -> None:
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    assert len(launches(lambda: grpo_kernels.fp8_quantize(x, block, transpose=transpose))) == 1
    scaled = grpo_kernels.fp8_quantize(x, block)
    assert len(launches(lambda: grpo_kernels.fp8_dequantize(scaled))) == 1


def test_moves_of_rows_are_one_launch_each_way() -> None:
    permutation = grpo_kernels.build_permutation(torch.rand(512, 64, device="cuda").topk(8).indices, 64)
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(512, 8, device="cuda", requires_grad=True)
    works: list[tuple[Callable[[], torch.Tensor], list[torch.Tensor]]] = [
        (lambda: grpo_kernels.moe_permute(x, permutation), [x]),
        (lambda: grpo_kernels.moe_unpermute(y, permutation, weights), [y, weights]),
    ]
    for forward, leaves in works:
        assert len(launches(forward)) == 1
        upstream = torch.randn_like(forward())
        both = launches(lambda forward=forward, leaves=leaves, g=upstream: torch.autograd.grad(forward(), leaves, g))
        assert len([name for name in both if "fill" not in name.lower()]) == 2, both


def test_the_activation_that_quantises() -> None:
    """One launch; backward one for what lies in rows, one for the transposes."""
    preact = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(512, device="cuda", dtype=torch.int32)
    glu, back = torch.ops.grpo_kernels.moe_glu_quantize, torch.ops.grpo_kernels.moe_glu_backward_quantize
    kind = (False, 1.0, 1.0, False)
    assert len(launches(lambda: glu(preact, slots, *kind, True, 1e-12, "triton"))) == 1
    scaled = grpo_kernels.fp8_quantize(preact)
    operands = (*scaled, preact[:, :512].contiguous(), slots, torch.rand(512, 1, device="cuda"), None, *kind)
    every = (True,) * 6
    for needs, count in (((True, False, True, False, True, True), 1), (every, 2)):
        names = launches(lambda needs=needs: back(*operands, *needs, 1e-12, 1e-30, torch.bfloat16, "triton"))
        assert len([name for name in names if "fill" not in name.lower()]) == count, names


def test_experts_in_fp8_forward() -> None:
    """Maps, rows, two products with a table of tiles each, the activation, the sum; weights are quantised once."""
    gate_up, down = (
        torch.nn.Parameter(torch.randn(8, *shape, device="cuda", dtype=torch.bfloat16))
        for shape in ((512, 384), (384, 256))
    )
    x, ids = (
        torch.randn(256, 384, device="cuda", dtype=torch.bfloat16),
        torch.rand(256, 8, device="cuda").topk(2).indices,
    )
    weights = torch.rand(256, 2, device="cuda")

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return grpo_kernels.moe_experts(x, gate_up, down, (weights, ids), recipe="fp8_block128")

    names = launches(forward)
    assert len(names) <= 9, names


def test_moving_and_quantising_is_one_launch() -> None:
    ids = torch.rand(512, 64, device="cuda").topk(8).indices
    permutation = grpo_kernels.build_permutation(ids, 64, alignment=128)
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    for transpose in (False, "both"):
        names = launches(
            lambda transpose=transpose: grpo_kernels.moe_permute_quantize(x, permutation, transpose=transpose)
        )
        assert len(names) == 1, names
