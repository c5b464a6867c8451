"""replace_moe: the routers and experts of a model computed by this package, with the model's own parameters."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from grpo_kernels.integrations.transformers.experts import check_experts
from grpo_kernels.integrations.transformers.families import (
    EXPERTS,
    ROUTERS,
    FusedExperts,
    FusedRouter,
    check_families,
)
from grpo_kernels.moe_experts.arguments import check_plan
from grpo_kernels.moe_router.options import MAX_EXPERTS
from grpo_kernels.moe_router.replay import RouterReplay

_OP = "replace_moe"
_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    fused: stock for table in (ROUTERS, EXPERTS) for stock, fused in table.items()
}


def replace_moe(
    model: nn.Module, *, recipe: str = "bf16", fp8_wgrad: bool = False, save: str = "preact"
) -> tuple[str, ...]:
    """Lets the MoE blocks of a model compute with `moe_router` and `moe_experts`, as `MoE` does.

    Blocks of DeepSeek-V3, Qwen3-MoE, Mixtral and gpt-oss are served. Nothing is copied and no parameter changes its
    name, its place or its identity: routers and experts get another forward. So optimizers, hooks, state dicts and
    `save_pretrained` are those of the model, and `copy.deepcopy` works.

    Args:
        model: a model of transformers, or what contains one.
        recipe, fp8_wgrad, save: as in `moe_experts`. Of a model that is replaced already, they are set anew.

    Returns:
        The names of its blocks, as in `model.named_modules()`.

    Raises:
        TypeError, ValueError: an option is wrong; the model has no MoE block, or one that is not served, or it has been
            wrapped, sharded or quantised in a way that would pass the new forward by. Nothing has been replaced.
        IncompatibleVersion: transformers calls these modules otherwise.

    Numerics:
        The router's logits are float32 products whatever the model's dtype is, and the weights stay float32.
        transformers rounds both to the model's dtype in Qwen3-MoE and gpt-oss and the logits in Mixtral, so that in 16
        bits some tokens take other experts here; in DeepSeek-V3 it does as this does.
    """
    check_plan(recipe, save, None, fp8_wgrad)
    check_families()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    routers, experts = _parts(model)
    options = {"recipe": recipe, "fp8_wgrad": fp8_wgrad, "save": save}
    for name, router in routers.items():
        if not isinstance(router, FusedRouter):
            router.__class__ = ROUTERS[type(router)]
            router.enter(_layer_id(name))
    for module in experts.values():
        module.__class__ = EXPERTS.get(type(module), type(module))
        module.enter(dict(options))
    return _blocks(experts)


def restore_moe(model: nn.Module) -> tuple[str, ...]:
    """Gives the blocks their own forward again.

    Returns:
        The names of the blocks that were replaced; none if there were none.

    Raises:
        ValueError: a part was wrapped after it was replaced, by fully_shard for one.
    """
    parts = [
        (name, module) for name, module in model.named_modules() if isinstance(module, (FusedRouter, FusedExperts))
    ]
    for name, module in parts:
        if type(module) not in _FUSED:
            raise ValueError(f"restore_moe: {name} was wrapped after it was replaced, as {type(module).__name__}")
    for _, module in parts:
        module.leave()
        module.__class__ = _FUSED[type(module)]  # type: ignore[assignment]
    return _blocks(name for name, _ in parts)


@contextlib.contextmanager
def replaced_moe(model: nn.Module, **options: Any) -> Iterator[tuple[str, ...]]:
    """`replace_moe` on entry, `restore_moe` on exit. The backward may come later where no layer is checkpointed."""
    names = replace_moe(model, **options)
    try:
        yield names
    finally:
        restore_moe(model)


@contextlib.contextmanager
def replay_routes(model: nn.Module, replay: RouterReplay) -> Iterator[RouterReplay]:
    """Every pass of a replaced model in this block takes the routes of `replay`; if it is the first, it records them.

    Layers have their number in the model, as in `model.layers.3.mlp`. With gradient checkpointing the backward belongs
    into the block, too: it runs the layers again.

    Args:
        model: a model after `replace_moe`.
        replay: of this micro-batch. Its tokens are those of the pass, padding included, in their order.

    Raises:
        TypeError, ValueError: not a RouterReplay; the model has not been replaced, or is in such a block already.
    """
    routers = [module for module in model.modules() if isinstance(module, FusedRouter)]
    if not isinstance(replay, RouterReplay):
        raise TypeError(f"replay_routes: replay must be a RouterReplay, got {type(replay).__name__}")
    if not routers:
        raise ValueError("replay_routes: model must have been given to replace_moe")
    if any(router.moe_replay is not None for router in routers):
        raise ValueError("replay_routes: model must not be in another replay_routes")
    for router in routers:
        router.moe_replay = replay
    try:
        yield replay
    finally:
        for router in routers:
            router.moe_replay = None


def _parts(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The routers and the experts, stock or replaced, by their names."""
    routers: dict[str, Any] = {}
    experts: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, tuple(ROUTERS)):
            _check_served(model, name, module, ROUTERS)
            routers[name] = module
            if routers[name].num_experts > MAX_EXPERTS:
                raise ValueError(f"{_OP}: {name} must have <= {MAX_EXPERTS} experts, got {routers[name].num_experts}")
        elif isinstance(module, tuple(EXPERTS)) or _looks_like_experts(module):
            _check_served(model, name, module, EXPERTS)
            check_experts(_OP, module)
            experts[name] = module
    if not experts:
        raise ValueError(f"{_OP}: {type(model).__name__} has no MoE block of {_served()}")
    return routers, experts


def _check_served(model: nn.Module, name: str, module: Any, table: dict[Any, Any]) -> None:
    where = f"{_OP}: {name} of {type(model).__name__}"
    if not isinstance(module, tuple(table)):
        raise ValueError(
            f"{where} is {type(module).__name__}, which is not served, only {_served()} are. "
            "register_experts serves the experts of other models"
        )
    if type(module) not in table and type(module) not in _FUSED:
        raise ValueError(f"{where} is {type(module).__name__}: replace first, then wrap or shard")
    if "forward" in vars(module):
        raise ValueError(f"{where} has a forward of its own (use_kernels, or a device map): replace first")
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(f"{where} is expert-parallel: register_experts serves it")


def _looks_like_experts(module: Any) -> bool:
    """Of a model that is not served: stacked experts as transformers has them."""
    return hasattr(module, "_apply_gate") or getattr(getattr(module, "gate_up_proj", None), "ndim", 0) == 3


def _served() -> str:
    return ", ".join(stock.__name__ for stock in EXPERTS)


def _layer_id(name: str) -> int | None:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _blocks(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in parts))
