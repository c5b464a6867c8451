"""A layer whose experts compute in FP8, `moe_experts(recipe="fp8_block128")`, against the same layer in bfloat16.

What is right is the recipe itself in eager PyTorch (fp8_definitions.py): where a layer computes in bfloat16, the column
of accuracy says how far it is from that. "ours" finds FP8 copies of the weights that an earlier call made, as all
micro-batches of a step but the first do; a CUDA graph would not, so it is timed without one. Every other cast counts.
Rates count the products of both passes, 6 T K H I and 18 operations, those of bfloat16 among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from . import fp8_definitions, fp8_glu, fp8_layer_peers, limits
from . import moe_definitions as definitions
from .case import Case, Inputs, Provider
from .moe_definitions import DEEPSEEK, GPT_OSS_SMALL, QWEN, Model, Values
from .moe_layer import CPU_TOKENS, GPU_TOKENS, make, ours

_RECIPE = "fp8_block128"
_DTYPE = torch.bfloat16  # of tokens, parameters and results

Forward = Callable[[Inputs], Values]


def _make(model: Model, tokens: int, backward: bool, device: str, size: str) -> Inputs:
    """Parameters are trained in either case: FP8 copies of tensors that nobody trains are not kept."""
    made = make(model, tokens, _DTYPE, True, device, size)
    if backward:
        return made
    del made["upstream"]
    if model.clamped or not fp8_layer_peers.wants_quantised_weights(device):
        return made
    return made | fp8_layer_peers.quantised_weights(made)


def _anew(inputs: Inputs) -> Inputs:
    """With weights of which there are no copies yet."""
    return inputs | {name: inputs[name].detach().requires_grad_() for name in ("gate_up", "down")}


def _providers(model: Model, device: str, backward: bool, fp8_wgrad: bool) -> dict[str, tuple[str, Forward | None]]:
    """Kinds and functions by name; None stands for what is not installed."""
    recipe = partial(ours, model, recipe=_RECIPE, fp8_wgrad=fp8_wgrad)
    layer = partial(partial, definitions.layer)
    found: dict[str, tuple[str, Forward | None]] = {"ours": ("ours", recipe)}
    if backward and not fp8_wgrad:
        found["ours, save=input"] = ("ours", partial(recipe, save="input"))
    found["ours in bf16"] = ("peer", partial(ours, model))
    found["eager"] = ("eager", layer(definitions.experts_in_turn, model))
    at_once = layer(definitions.experts_at_once, model) if hasattr(F, "grouped_mm") else None
    found["F.grouped_mm"] = ("peer", at_once)
    if not model.clamped:  # the products of the others take no bias
        found["torchao"] = ("peer", fp8_layer_peers.torchao(model, device))
        if not backward:
            found["F.scaled_mm in a loop"] = ("peer", fp8_layer_peers.scaled_mm_loop(model, device))
            found["DeepGEMM"] = ("peer", fp8_layer_peers.deep_gemm(model, device))
    return found


def _case(device: str, model: Model, *, backward: bool = True, fp8_wgrad: bool = False, quick: bool = False) -> Case:
    def run(forward: Forward) -> Forward:
        if backward:
            return lambda inputs: definitions.with_gradients(forward(inputs), inputs, ("upstream",))
        return torch.no_grad()(forward)

    definition = run(partial(fp8_definitions.layer, model, _DTYPE, fp8_wgrad))
    given = _providers(model, device, backward, fp8_wgrad)
    providers = [
        Provider(name, run(forward), kind, capturable=kind != "ours")
        for name, (kind, forward) in given.items()
        if forward
    ]
    ours_run = providers[0].run
    providers.insert(1, Provider("ours, weights quantised anew", lambda inputs: ours_run(_anew(inputs)), "ours"))
    tokens, limit = GPU_TOKENS if device == "cuda" else CPU_TOKENS, limits.fp8_limit(device, _DTYPE)
    rows = tokens * model.top_k
    shape = f"T={tokens} E={model.experts} K={model.top_k} H={model.hidden} I={model.width}"
    parts = ("fwd+bwd" if backward else "fwd") + (", FP8 wgrad" if fp8_wgrad else "")
    return Case(
        op="moe_experts",
        name=f"{model.name} layer {shape} {_RECIPE} {parts}",
        make=partial(_make, model, tokens, backward),
        providers=tuple(providers),
        operations=(18 if backward else 6) * rows * model.hidden * model.width,
        matmul_dtype=limit,
        beside_bfloat16=limit == torch.float8_e4m3fn,
        definition=lambda inputs: definitions.sample(definition(inputs)),
        sample_outputs=definitions.sample,
        quick=quick,
        memory=2 * rows * model.hidden if backward and not fp8_wgrad else None,
        results_are_extra=False,
        absent=tuple(name for name, (_, forward) in given.items() if forward is None),
    )


def cases(device: str) -> list[Case]:
    """DeepSeek-V3's experts of one rank of 32 and of one of 8, and those of the others on a GPU; thinner ones on a
    CPU. A rank of 32 gets as many rows as four of the eight slots of 8192 tokens.
    """
    glu = fp8_glu.cases(device)
    if device == "cuda":
        eight = replace(DEEPSEEK.fewer(32), top_k=4, groups=1, kept_groups=1)
        models = (eight, DEEPSEEK.fewer(8), QWEN, GPT_OSS_SMALL)
        return [
            *glu,
            _case(device, models[0], backward=False),
            *(
                _case(device, model, fp8_wgrad=wgrad, quick=model is models[0])
                for model in models
                for wgrad in (False, True)
            ),
        ]
    models = (DEEPSEEK.fewer(8).thinner(8), QWEN.thinner(4), GPT_OSS_SMALL.thinner(8))
    return [
        *glu,
        _case(device, models[0], backward=False),
        *(_case(device, model, quick=model is models[0]) for model in models),
        _case(device, models[0], fp8_wgrad=True),
    ]
