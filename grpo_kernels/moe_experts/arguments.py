"""Checks of the arguments of moe_experts."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels._autocast import autocast_dtype
from grpo_kernels.fp8_quantize.layout import TILE
from grpo_kernels.grouped_gemm.arguments import check_accumulator, check_present
from grpo_kernels.moe_experts.reference import Activation

OP = "moe_experts"
ACTIVATIONS = ("swiglu", "clamped_swiglu")
SAVES = ("preact", "input")
RECIPES = ("bf16", "fp8_block128")
_SHAPES = {"gate_up": "[E, 2I, H]", "down": "[E, H, I]"}


class Experts(NamedTuple):
    """The tokens [T, H] and the parameters of the experts."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def product_dtype(self) -> torch.dtype:
        """The operands' dtype of the products: autocast's, else the widest."""
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in self if t is not None))
        autocast = autocast_dtype(self.x.device.type)
        return autocast if autocast is not None and dtype != torch.float64 else dtype

    def of_dtype(self, dtype: torch.dtype) -> Tensor:
        """One of the tensors that stands for products of this dtype."""
        return next((t for t in self if t is not None and t.dtype == dtype), self.x)

    def to(self, dtype: torch.dtype) -> Experts:
        """All of one dtype."""
        return Experts(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]


def check_experts(experts: Experts) -> None:
    """Types, dtypes, devices and shapes of the tokens and the parameters."""
    x, gate_up, down, gate_up_bias, down_bias = experts
    for name, value in zip(experts._fields, experts, strict=True):
        if value is None and name.endswith("_bias"):
            continue
        _checks.check_tensor(OP, name, value)
        tensor = cast(Tensor, value)
        _checks.check_dtype(OP, name, tensor)
        _checks.check_same_device(OP, name, tensor, "x", x)
        check_present(OP, name, tensor, _SHAPES.get(name, ""))
    _checks.check_ndim(OP, "x", x, "[T, H]")
    _checks.check_ndim(OP, "gate_up", gate_up, "[E, 2I, H]")
    count, twice, hidden = gate_up.shape[0], gate_up.shape[1], x.shape[1]
    if count == 0 or twice == 0 or twice % 2 or hidden == 0 or gate_up.shape[2] != hidden:
        raise ValueError(
            f"{OP}: gate_up must have shape [E, 2I, H] = [E, 2I, {hidden}] with E, I and H >= 1, "
            f"got {list(gate_up.shape)}"
        )
    _checks.check_shape(OP, "down", down, ("[E, H, I]", (count, hidden, twice // 2)))
    if gate_up_bias is not None:
        _checks.check_shape(OP, "gate_up_bias", gate_up_bias, ("[E, 2I]", (count, twice)))
    if down_bias is not None:
        _checks.check_shape(OP, "down_bias", down_bias, ("[E, H]", (count, hidden)))


def check_routes(x: Tensor, router_output: Any) -> tuple[Tensor, Tensor]:
    """topk_weights [T, K] and topk_ids [T, K] of a router's output, or of a pair."""
    if not isinstance(router_output, tuple) or len(router_output) < 2:
        raise TypeError(
            f"{OP}: router_output must be what moe_router returned or a pair (topk_weights, topk_ids), "
            f"got {type(router_output).__name__}"
        )
    weights, ids = router_output[:2]
    for name, value in (("topk_weights", weights), ("topk_ids", ids)):
        _checks.check_tensor(OP, name, value)
        _checks.check_same_device(OP, name, value, "x", x)
    _checks.check_dtype(OP, "topk_weights", weights)
    _checks.check_dtype(OP, "topk_ids", ids, _checks.INTEGER)
    if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.shape[1] == 0:
        raise ValueError(
            f"{OP}: topk_ids must have shape [T, K] = [{x.shape[0]}, K] with K >= 1, got {list(ids.shape)}"
        )
    _checks.check_shape(OP, "topk_weights", weights, ("[T, K]", tuple(ids.shape)))
    return weights, ids


def check_activation(activation: str, alpha: float, limit: float, interleaved: bool) -> Activation:
    """The activation and its numbers."""
    _checks.check_choice(OP, "activation", activation, ACTIVATIONS)
    _checks.check_number(OP, "swiglu_alpha", alpha, above=0.0)
    _checks.check_number(OP, "swiglu_limit", limit, above=0.0)
    if not isinstance(interleaved, bool):
        raise TypeError(f"{OP}: interleaved must be a bool, got {type(interleaved).__name__}")
    return Activation(activation == "clamped_swiglu", float(alpha), float(limit), interleaved)


def check_plan(recipe: str, save: str, alignment: int | None, fp8_wgrad: bool) -> int:
    """How it is to be computed; returns the alignment."""
    _checks.check_choice(OP, "recipe", recipe, RECIPES)
    _checks.check_choice(OP, "save", save, SAVES)
    if not isinstance(fp8_wgrad, bool):
        raise TypeError(f"{OP}: fp8_wgrad must be a bool, got {type(fp8_wgrad).__name__}")
    if fp8_wgrad and recipe == "bf16":
        raise ValueError(f"{OP}: fp8_wgrad is for recipe 'fp8_block128', got recipe 'bf16'")
    unit = TILE if fp8_wgrad else 1
    if alignment is None:
        return unit
    _checks.check_integer(OP, "alignment", alignment, minimum=1)
    if alignment % unit:
        raise ValueError(f"{OP}: alignment must be a multiple of {unit} for fp8_wgrad, got {alignment}")
    return alignment


def check_recipe_dtype(recipe: str, dtype: torch.dtype) -> None:
    """The recipe takes products of this dtype."""
    if recipe != "bf16" and dtype == torch.float64:
        raise TypeError(f"{OP}: recipe {recipe!r} takes float32, bfloat16 and float16, got float64")


def check_range(count: int, expert_range: tuple[int, int] | None, num_experts: int | None) -> tuple[int, int]:
    """The first of the `count` experts whose parameters these are, and how many experts the ids count."""
    if num_experts is not None:
        _checks.check_integer(OP, "num_experts", num_experts, minimum=1)
    if expert_range is None:
        if num_experts is not None and num_experts != count:
            raise ValueError(
                f"{OP}: num_experts must be E = {count} without an expert_range, which would say which experts "
                f"gate_up and down hold, got {num_experts}"
            )
        return 0, count
    if not isinstance(expert_range, tuple) or len(expert_range) != 2:
        raise TypeError(f"{OP}: expert_range must be a pair (start, end), got {expert_range!r}")
    first, last = expert_range
    _checks.check_integer(OP, "expert_range[0]", first, minimum=0)
    _checks.check_integer(OP, "expert_range[1]", last, minimum=0)
    if num_experts is None:
        raise ValueError(f"{OP}: expert_range needs num_experts, the number of experts that the ids count")
    if last > num_experts or last - first != count:
        raise ValueError(
            f"{OP}: expert_range must be (start, start + E) = (start, start + {count}) within num_experts = "
            f"{num_experts}, got ({first}, {last})"
        )
    return first, num_experts


def check_accumulators(experts: Experts, accumulators: Any) -> tuple[Tensor | None, Tensor | None]:
    """The accumulators of gate_up and down."""
    if accumulators is None:
        return None, None
    if not isinstance(accumulators, tuple) or len(accumulators) != 2:
        raise TypeError(f"{OP}: weight_grad_accumulators must be a pair of tensors, got {accumulators!r:.80}")
    pairs = (("gate_up", "[E, 2I, H]", experts.gate_up), ("down", "[E, H, I]", experts.down))
    for index, (accumulator, (owner, shape, weight)) in enumerate(zip(accumulators, pairs, strict=True)):
        if accumulator is None:
            continue
        check_accumulator(OP, f"weight_grad_accumulators[{index}]", accumulator, owner, weight, shape)
    return accumulators


def raise_if_no_expert(ids: Tensor, num_experts: int) -> None:
    """On the CPU, where looking is free: raises where an id is >= `num_experts`. Not of tensors that only pretend."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or type(ids) is not Tensor:
        return
    outside = (ids >= num_experts).reshape(-1)
    if outside.any():
        slot = int(outside.to(torch.uint8).argmax())
        raise ValueError(
            f"{OP}: topk_ids must be < num_experts = {num_experts}, got {int(ids.reshape(-1)[slot])} "
            f"at {[slot // ids.shape[1], slot % ids.shape[1]]}"
        )
