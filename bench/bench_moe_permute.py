"""The map from tokens to the rows of their experts, the move there and the weighted sum back, against sorting and
indexing in eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grpo_kernels

from . import moe_definitions as definitions
from . import moe_peers as peers
from .case import Case, Inputs, Provider, compiled
from .moe_definitions import DEEPSEEK, GPT_OSS, QWEN, Model, Values
from .target import ALLOCATION, copy_bandwidth, device_time, host_cost, speedup

_MAP_TOKENS = 4096
_GPU_TOKENS, _CPU_TOKENS = 8192, 1024
_HOST_TOKENS, _HOST_EXPERTS = 24, 16  # those of the smoke size

Forward = Callable[[Inputs], Values]


def _ids(tokens: int, experts: int, top_k: int, device: str) -> Tensor:
    """Different experts for a token's slots, some experts liked better than others."""
    liking = torch.rand(tokens, experts, device=device) + 0.5 * torch.rand(experts, device=device)
    return liking.topk(top_k).indices.int()


# --- map -------------------------------------------------------------------------------------------------------------


def _make_map(model: Model, tokens: int, device: str, size: str) -> Inputs:
    if size == "smoke":
        return {"ids": _ids(24, 16, model.top_k, device)}
    return {"ids": _ids(tokens, model.experts, model.top_k, device)}


def map_case(device: str, model: Model, tokens: int) -> Case:
    """The map for the routes of a model."""

    def ours(inputs: Inputs) -> Values:
        return tuple(grpo_kernels.build_permutation(inputs["ids"], model.experts))

    def eager(inputs: Inputs) -> Values:
        return definitions.maps(inputs["ids"], model.experts)

    target = speedup(2)
    if device == "cuda":
        target = device_time(8)
    return Case(
        op="build_permutation",
        name=f"{model.name} T={tokens} E={model.experts} K={model.top_k}",
        make=partial(_make_map, model, tokens),
        providers=(
            Provider("ours", ours, "ours"),
            Provider("eager", eager, "eager"),
            Provider("torch.compile", compiled(eager), "compile"),
        ),
        bytes_moved=4 * (3 * tokens * model.top_k + 2 * model.experts),  # ids read, two maps written
        targets=(target,),
        definition=lambda inputs: definitions.sample(eager(inputs)),
        sample_outputs=definitions.sample,
        quick=model is DEEPSEEK,
    )


# --- moves -----------------------------------------------------------------------------------------------------------


def _permutation(inputs: Inputs) -> grpo_kernels.Permutation:
    return grpo_kernels.Permutation(*(inputs[name] for name in grpo_kernels.Permutation._fields))


def _make_moves(
    model: Model, tokens: int, dtype: torch.dtype, back: bool, backward: bool, device: str, size: str
) -> Inputs:
    """Of a permutation the tokens, or the experts' rows and the weights; and the upstream gradient."""
    experts, width = (model.experts, model.hidden) if size == "full" else (16, 40)
    tokens = tokens if size == "full" else 24
    ids = _ids(tokens, experts, model.top_k, device)
    found = definitions.maps(ids, experts)
    short, long = (tokens, width), (tokens * model.top_k, width)

    def normal(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    made = {"rows": normal(long if back else short).requires_grad_(backward)}
    if back:
        made["weights"] = torch.rand(tokens, model.top_k, device=device).requires_grad_(backward)
    if backward:
        made["upstream"] = normal(short if back else long)
    made |= dict(zip(grpo_kernels.Permutation._fields, found, strict=True)) | {"ids": ids}
    return made | ({"slots_first": found[0].t().contiguous().flatten()} if back else {})


def _permute_providers(model: Model, device: str) -> dict[str, Forward | None]:
    te = peers.te_permute(device)

    def eager(inputs: Inputs) -> Values:
        return (definitions.permute(inputs["rows"], inputs["inv_map"], model.top_k),)

    return {
        "ours": lambda inputs: (grpo_kernels.moe_permute(inputs["rows"], _permutation(inputs)),),
        "eager": eager,
        "torch.compile": compiled(eager),
        "TransformerEngine, with its map": te and (lambda inputs: (te(inputs["rows"], inputs["ids"]),)),
    }


def _unpermute_providers(model: Model, device: str) -> dict[str, Forward | None]:
    te = peers.te_unpermute(device)

    def eager(inputs: Inputs) -> Values:
        return (definitions.unpermute(inputs["rows"], inputs["row_id_map"], inputs["weights"]),)

    def bag(inputs: Inputs) -> Values:
        return (definitions.unpermute_bag(inputs["rows"], inputs["row_id_map"], inputs["weights"]),)

    def ours(inputs: Inputs) -> Values:
        return (grpo_kernels.moe_unpermute(inputs["rows"], _permutation(inputs), inputs["weights"]),)

    return {
        "ours": ours,
        "eager": eager,
        "torch.compile": compiled(eager),
        "F.embedding_bag": bag,
        "TransformerEngine": te and (lambda inputs: (te(inputs["rows"], inputs["slots_first"], inputs["weights"]),)),
    }


_KINDS = {"ours": "ours", "eager": "eager", "torch.compile": "compile"}


def move_case(device: str, model: Model, tokens: int, dtype: torch.dtype, *, back: bool, backward: bool) -> Case:
    """The move to the experts, or back."""
    found = (_unpermute_providers if back else _permute_providers)(model, device)

    def run(forward: Forward) -> Forward:
        return (
            (lambda inputs: definitions.with_gradients(forward(inputs), inputs, ("upstream",))) if backward else forward
        )

    eager = found["eager"]
    assert eager is not None
    width = model.hidden * torch.empty((), dtype=dtype).element_size()
    once = tokens * width * (1 + model.top_k)  # each token once, each of its rows once
    again = once + (tokens * model.top_k * width if back else 0)  # the gradient of the weights reads the rows
    target = speedup(1)
    if device == "cuda":
        target = copy_bandwidth(85)
    parts = "fwd+bwd" if backward else "fwd"
    return Case(
        op="moe_unpermute" if back else "moe_permute",
        name=f"{model.name} T={tokens} H={model.hidden} K={model.top_k} {str(dtype).removeprefix('torch.')} {parts}",
        make=partial(_make_moves, model, tokens, dtype, back, backward),
        providers=tuple(Provider(n, run(forward), _KINDS.get(n, "peer")) for n, forward in found.items() if forward),
        bytes_moved=once + backward * again,
        targets=(target,),
        definition=lambda inputs: definitions.sample(run(eager)(inputs)),
        sample_outputs=definitions.sample,
        quick=model is DEEPSEEK,
        absent=tuple(name for name, forward in found.items() if forward is None),
    )


# --- host ------------------------------------------------------------------------------------------------------------


class _Maps(torch.autograd.Function):
    """The least that an op with the outputs of a map costs the host."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, experts: int) -> tuple[Tensor, ...]:
        shapes = (ids.shape, (ids.numel(),), (experts,), (experts,))
        outputs = tuple(ids.new_empty(shape, dtype=torch.int32) for shape in shapes)
        ctx.mark_non_differentiable(*outputs)
        return outputs


class _Moved(torch.autograd.Function):
    """The same of a move."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, number: int, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        return rows.new_empty(number, rows.shape[1])


def _host_case(
    device: str, op: str, make: Callable[[str, str], Inputs], ours: Forward, eager: Forward, allocate: Forward
) -> Case:
    return Case(
        op=op,
        name=f"host cost of a {'call' if op == 'build_permutation' else 'forward'}, {_HOST_TOKENS} tokens",
        make=lambda device, size: make(device, "smoke"),
        providers=(
            Provider("ours", ours, "ours"),
            Provider("eager", eager, "eager"),
            Provider(ALLOCATION, allocate, "part"),
        ),
        targets=(host_cost(device, native=op == "build_permutation"),),
        clock="host",
        definition=lambda inputs: definitions.sample(eager(inputs)),
        sample_outputs=definitions.sample,
    )


def _host_cases(device: str) -> list[Case]:
    """Of the map, and of the moves with a gradient to come."""
    experts = _HOST_EXPERTS

    def ours_map(inputs: Inputs) -> Values:
        return tuple(grpo_kernels.build_permutation(inputs["ids"], experts))

    def eager_map(inputs: Inputs) -> Values:
        return definitions.maps(inputs["ids"], experts)

    def allocate_map(inputs: Inputs) -> Values:
        return tuple(_Maps.apply(inputs["ids"], experts))

    def allocate_permuted(inputs: Inputs) -> Values:
        return (_Moved.apply(inputs["rows"], inputs["ids"].numel(), inputs["row_id_map"]),)

    def allocate_unpermuted(inputs: Inputs) -> Values:
        saved = (inputs["rows"], inputs["row_id_map"], inputs["inv_map"], inputs["weights"])
        return (_Moved.apply(inputs["rows"], len(inputs["ids"]), *saved),)

    found = [
        _host_case(
            device, "build_permutation", partial(_make_map, QWEN, _HOST_TOKENS), ours_map, eager_map, allocate_map
        )
    ]
    for back, op, allocate in (
        (False, "moe_permute", allocate_permuted),
        (True, "moe_unpermute", allocate_unpermuted),
    ):
        forwards = (_unpermute_providers if back else _permute_providers)(QWEN, device)
        ours, eager = forwards["ours"], forwards["eager"]
        assert ours is not None
        assert eager is not None
        make = partial(_make_moves, QWEN, _HOST_TOKENS, torch.float32, back, True)
        found.append(_host_case(device, op, make, ours, eager, allocate))
    return found


def cases(device: str) -> list[Case]:
    """The map of each model; the moves in bf16, and in float32 on a CPU; and what calls cost the host."""
    maps = [map_case(device, model, _MAP_TOKENS) for model in (DEEPSEEK, QWEN, GPT_OSS)]
    tokens = _GPU_TOKENS if device == "cuda" else _CPU_TOKENS
    second = torch.bfloat16 if device == "cuda" else torch.float32
    wanted = [(DEEPSEEK, torch.bfloat16, False), (DEEPSEEK, torch.bfloat16, True), (QWEN, second, True),
              (GPT_OSS, torch.bfloat16, True)]  # fmt: skip
    moves = [
        move_case(device, model, tokens, dtype, back=back, backward=backward)
        for back in (False, True)
        for model, dtype, backward in wanted
    ]
    return [*maps, *moves, *_host_cases(device)]
