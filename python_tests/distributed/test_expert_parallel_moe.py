"""The MoE layer with its experts on several ranks, alone and under data parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from grpo_kernels import MoE, RouterReplay, moe_experts
from grpo_kernels.distributed import ExpertParallel
from python_tests.distributed.launch import run

WORLD, EXPERTS, TOP_K, WIDTH, INNER = 4, 8, 3, 6, 5
TOKENS = (5, 0, 7, 2)
MOST = max(TOKENS)


def _moe(parallel: ExpertParallel | None) -> MoE:
    """The same parameters everywhere; with `parallel`, its part of the experts."""
    torch.manual_seed(0)
    whole = MoE(WIDTH, INNER, EXPERTS, TOP_K, shared_intermediate_size=4, layer_id=0, dtype=torch.float64)
    if parallel is None:
        return whole
    part = MoE(
        WIDTH, INNER, EXPERTS, TOP_K,
        shared_intermediate_size=4, layer_id=0, expert_parallel=parallel, dtype=torch.float64,
    )  # fmt: skip
    first, last = parallel.local_range
    state = whole.state_dict()
    part.load_state_dict({k: v[first:last] if k.startswith("experts.") else v for k, v in state.items()})
    return part


def _tokens(rank: int) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of the outputs."""
    generator = torch.Generator().manual_seed(rank)
    x, grad = torch.randn(2, TOKENS[rank], WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), grad


def _gradients(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        gradient: Any = parameter.grad
        found[prefix + name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def _rank(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    results = {}
    for mode in ("alltoall", "allgather"):
        results[mode] = _plain(ExpertParallel(EXPERTS, mode=mode, max_tokens=MOST), rank)
        _check_empty_experts(ExpertParallel(EXPERTS, mode=mode, max_tokens=MOST), rank)
        parallel = ExpertParallel(EXPERTS, mesh["ep"].get_group(), mode, max_tokens=MOST)
        results[f"fsdp {mode}"] = _fsdp(parallel, mesh, rank)
        results[f"ddp {mode}"] = _ddp(parallel, mesh, rank)
    return results


def _plain(parallel: ExpertParallel, rank: int) -> dict[str, Tensor]:
    """Without data parallelism; a second time with the layer recomputed on the routes of the first pass."""
    moe = _moe(parallel)
    x, grad = _tokens(rank)
    y = moe(x).hidden
    y.backward(grad)
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad, **_gradients(moe)}
    moe.zero_grad()
    again, replay = x.detach().clone().requires_grad_(), RouterReplay()
    hidden: Any = checkpoint(lambda values: moe(values, replay=replay).hidden, again, use_reentrant=False)
    hidden.backward(grad)
    assert again.grad is not None
    repeated = {"y": hidden.detach(), "x": again.grad, **_gradients(moe)}
    assert all(repeated[name].equal(found[name]) for name in found)
    return found


def _check_empty_experts(parallel: ExpertParallel, rank: int) -> None:
    """All tokens go to experts 0 and 1, but for masked ones of NaN: other experts' gradients are zeros, not None."""
    first, last = parallel.local_range
    for save in ("preact", "input"):
        weights = torch.rand(TOKENS[rank], 2).requires_grad_()
        ids = torch.tensor([[1, 0]], dtype=torch.int32).repeat(TOKENS[rank], 1)
        ids[:1] = -1
        gate_up = torch.randn(last - first, 2 * INNER, WIDTH).requires_grad_()
        down = torch.randn(last - first, WIDTH, INNER).requires_grad_()
        x = _tokens(rank)[0].detach().float()
        x[:1] = float("nan")
        x.requires_grad_()
        sent = parallel.dispatch(x, (weights, ids))
        routes = (sent.topk_weights, sent.topk_ids)
        y = moe_experts(sent.x, gate_up, down, routes, expert_range=(first, last), num_experts=EXPERTS, save=save)
        y = parallel.combine(y, sent.handle)
        assert y[:1].count_nonzero() == 0
        y.sum().backward()
        for weight in (gate_up, down):
            assert weight.grad is not None
            assert (weight.grad.count_nonzero() > 0) == (first == 0)
        for leaf in (x, weights):
            assert leaf.grad is not None
            assert leaf.grad.shape == leaf.shape
            assert leaf.grad[:1].count_nonzero() == 0
            assert leaf.grad[1:].count_nonzero() == leaf[1:].numel()


def _fsdp(parallel: ExpertParallel, mesh: DeviceMesh, rank: int) -> dict[str, Tensor]:
    """Experts are sharded over the ranks with the same experts, all else over all ranks."""
    moe = _moe(parallel)
    fully_shard(moe.experts, mesh=mesh["dp"])
    moe.experts.set_gradient_divide_factor(WORLD)
    fully_shard(moe, mesh=mesh["dp", "ep"]._flatten("world"))
    x, grad = _tokens(rank)
    y = moe(x).hidden
    y.backward(grad)
    return {"y": y.detach(), **_gradients(moe)}


def _ddp(parallel: ExpertParallel, mesh: DeviceMesh, rank: int) -> dict[str, Tensor]:
    moe = _moe(parallel)
    names = [f"experts.{name}" for name, _ in moe.experts.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(moe, names)
    wrapped = DistributedDataParallel(moe)
    x, grad = _tokens(rank)
    y = wrapped(x).hidden
    y.backward(grad)
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=mesh["dp"].get_group())
        parameter.grad /= WORLD
    return {"y": y.detach(), **_gradients(moe)}


def test_moe_over_ranks_equals_one_process() -> None:
    results = run(WORLD, _rank)
    moe = _moe(None)
    x, grad = (torch.cat(parts) for parts in zip(*(_tokens(rank) for rank in range(WORLD)), strict=True))
    x = x.detach().requires_grad_()
    y = moe(x).hidden
    y.backward(grad)
    assert x.grad is not None
    expected = {"y": y.detach(), "x": x.grad, **_gradients(moe)}
    for mode in ("alltoall", "allgather"):
        found = [result[mode] for result in results]
        for name, value in expected.items():
            parts = [part[name] for part in found]
            mine = torch.cat(parts) if name in ("x", "y") or name.startswith("experts.") else torch.stack(parts).sum(0)
            torch.testing.assert_close(mine, value, rtol=0, atol=1e-13 * value.abs().max().item(), msg=f"{mode} {name}")
        for way in ("fsdp", "ddp"):
            found = [result[f"{way} {mode}"] for result in results]
            for name, value in found[0].items():
                whole = expected[name] if name == "y" else expected[name] / WORLD
                parts = [part[name] for part in found]
                if name == "y":
                    mine = torch.cat(parts)
                elif name.startswith("experts."):  # ranks 0 and 2, 1 and 3 have the same ones
                    assert parts[0].equal(parts[2])
                    assert parts[1].equal(parts[3])
                    mine = torch.cat(parts[:2])
                else:
                    mine = value
                    assert all(part.equal(value) for part in parts)
                torch.testing.assert_close(
                    mine, whole, rtol=0, atol=1e-13 * whole.abs().max().item(), msg=f"{way} {mode} {name}"
                )
