"""The MoE layer under FSDP2: two processes compute what one does, and routing stays in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from grpo_kernels import MoE, RouterReplay
from python_tests.distributed.launch import run

WORLD = 2
H, I, E, K = 8, 6, 5, 2  # 5 experts do not divide by 2: shards are padded
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _moe() -> MoE:
    torch.manual_seed(0)
    moe = MoE(H, I, E, K, scoring_func="sigmoid", e_score_correction_bias=True, shared_intermediate_size=4, layer_id=0)
    with torch.no_grad():
        moe.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, E))  # type: ignore[union-attr]
    return moe


def _tokens(rank: int) -> Tensor:
    return torch.randn(7, H, generator=torch.Generator().manual_seed(rank))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _rank(rank: int, world: int, parts: bool, narrow: bool) -> dict[str, Tensor]:
    moe = _moe()
    options = {"mp_policy": BF16} if narrow else {}
    for part in (moe.gate, moe.experts, moe.shared_experts) if parts else ():
        fully_shard(part, **options)  # type: ignore[arg-type]
    fully_shard(moe, **options)  # type: ignore[arg-type]
    replay = RouterReplay()
    hidden, router = moe(_tokens(rank), replay=replay)
    hidden.float().square().mean().backward()
    results = {name: _whole(parameter.grad) for name, parameter in moe.named_parameters()}  # type: ignore[arg-type]
    again = moe(_tokens(rank) + 0.1, replay=replay).router
    return results | {
        "hidden": hidden.detach(),
        "weights": router.topk_weights.detach(),
        "ids": router.topk_ids,
        "again": again.topk_ids,
        "bias": moe.e_score_correction_bias,  # type: ignore[dict-item]
    }


def _alone(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """What each rank computes, from one process."""
    results = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have
    for rank in range(WORLD):
        moe = _moe().to(dtype)
        hidden, router = moe(_tokens(rank).to(dtype))
        hidden.float().square().mean().backward()
        gradients = {name: parameter.grad.float() for name, parameter in moe.named_parameters()}  # type: ignore[union-attr]
        outputs = {"hidden": hidden.detach(), "weights": router.topk_weights.detach(), "ids": router.topk_ids}
        results.append(gradients | outputs)
    torch.set_num_threads(threads)
    return results


def _compare(results: list[dict[str, Tensor]], dtype: torch.dtype) -> None:
    alone = _alone(dtype)
    for actual, expected in zip(results, alone, strict=True):
        for name, value in expected.items():
            output = name in ("hidden", "weights", "ids")
            assert torch.equal(actual[name], value if output else (alone[0][name] + alone[1][name]) / WORLD), name
        assert torch.equal(actual["again"], actual["ids"])
        assert torch.equal(actual["bias"], torch.linspace(-0.2, 0.2, E))


def test_sharded_as_a_whole() -> None:
    _compare(run(WORLD, _rank, False, False), torch.float32)


def test_parts_as_units_in_bfloat16() -> None:
    """Weights of the experts pass the hooks of the experts unrounded: the output has the bits of one process."""
    _compare(run(WORLD, _rank, True, True), torch.bfloat16)
