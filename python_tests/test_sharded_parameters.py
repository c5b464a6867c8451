"""What FSDP2, FSDP1 and ZeRO-3 leave of a parameter between forwards is an error of every op that takes parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import grpo_kernels

X = torch.ones(4, 6)
IDS = torch.zeros(4, 1, dtype=torch.int64)
GATE_UP, DOWN = torch.ones(2, 10, 6), torch.ones(2, 6, 5)


def _experts(**parameters: Tensor) -> Any:
    return grpo_kernels.moe_experts(X, router_output=(torch.ones(4, 1), IDS), **parameters)


TAKERS: dict[str, tuple[tuple[int, ...], str, str, Callable[[Any], Any]]] = {
    "linear_token_log_probs: weight": (
        (3, 6), "V, H", "FusedLMHead", lambda weight: grpo_kernels.linear_token_log_probs(X, weight, IDS[:, 0])
    ),
    "grouped_gemm: weight": (
        (2, 5, 6), "E, N, K", "MoE", lambda weight: grpo_kernels.grouped_gemm(X, weight, torch.tensor([2, 4]))
    ),
    "moe_experts: gate_up": ((2, 10, 6), "E, 2I, H", "MoE", lambda weight: _experts(gate_up=weight, down=DOWN)),
    "moe_experts: down": ((2, 6, 5), "E, H, I", "MoE", lambda weight: _experts(gate_up=GATE_UP, down=weight)),
}  # fmt: skip
"""An argument; its shape, in numbers and in letters; the module that the message sends the caller to; a call."""


@pytest.fixture(params=TAKERS)
def taker(request: pytest.FixtureRequest) -> tuple[str, nn.Parameter, str, str, Callable[[Any], Any]]:
    shape, letters, module, call = TAKERS[request.param]
    who, _, name = request.param.partition(": ")
    return f"{who}: {{}}{name} ", nn.Parameter(torch.ones(shape)), letters, module, call


def _message(call: Callable[[Any], Any], parameter: Any, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        call(parameter)
    return str(caught.value)


def test_memory_that_is_freed(taker: Any) -> None:
    start, parameter, _, module, call = taker
    parameter.untyped_storage().resize_(0)
    said = _message(call, parameter, ValueError)
    assert said.startswith(start.format("the memory of ") + f"{list(parameter.shape)} is freed, as FSDP does")
    assert f"grpo_kernels.{module}" in said


@pytest.mark.parametrize("size", [0, 7])
def test_one_axis_is_what_is_left(size: int, taker: Any) -> None:
    start, _, letters, module, call = taker
    said = _message(call, nn.Parameter(torch.ones(size)), ValueError)
    assert said.startswith(start.format("") + f"must have shape [{letters}], got [{size}], which is what ZeRO-3 and")
    assert f"grpo_kernels.{module}" in said


def test_partitioned_by_zero_3(taker: Any) -> None:
    start, parameter, _, module, call = taker
    parameter.ds_status = SimpleNamespace(name="AVAILABLE")
    call(parameter)
    parameter.ds_status = SimpleNamespace(name="INFLIGHT")
    said = _message(call, parameter, ValueError)
    assert said.startswith(start.format("") + "is partitioned by ZeRO-3 (ds_status namespace(name='INFLIGHT')): ")
    assert f"grpo_kernels.{module}" in said


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensor(taker: Any, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    start, parameter, _, module, call = taker
    said = _message(call, distribute_tensor(parameter.detach(), mesh, [Shard(0)]), TypeError)
    assert said.startswith(start.format("") + "must not be a DTensor, got one with placements (S(0)): ")
    assert f"grpo_kernels.{module}" in said
    assert ("VocabShard.from_dtensor(weight, mesh_dim)" in said) == (module == "FusedLMHead")
