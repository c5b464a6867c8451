"""A whole layer, router and experts, forward and backward, against eager PyTorch, which takes the experts in turn, and
other people's layers.

Rates count 6 T K H I operations forward and 18 with the backward, the products of a layer that keeps what its backward
needs; who computes some twice does more. "the bare GEMMs" are these products alone, of equal segments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from . import fp8_layers
from . import moe_definitions as definitions
from . import moe_peers as peers
from .case import Case, Inputs, Provider, compiled
from .moe_definitions import Model, Values
from .moe_layer import CPU_TOKENS, GPU_TOKENS, make, ours
from .target import speedup

Forward = Callable[[Inputs], Values]


def _bare(model: Model, backward: bool, inputs: Inputs) -> Values:
    """Every expert gets as many rows, without a gather: E / K experts at a time take all tokens once."""
    x, up, down = (inputs[name].detach() for name in ("x", "gate_up", "down"))
    if not model.clamped:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    share = len(up) // model.top_k
    rows = x.view(share, -1, x.shape[1])
    upstream = inputs["upstream"].view_as(rows) if backward else rows
    found: Values = ()
    for w1, w2 in zip(up.split(share), down.split(share), strict=True):
        preact = torch.bmm(rows, w1)
        activated = preact[..., : w2.shape[1]]
        found = (torch.bmm(activated, w2),)
        if backward:
            found = (torch.bmm(upstream, w2.transpose(1, 2)), torch.bmm(activated.transpose(1, 2), upstream))
            found += (torch.bmm(preact, w1.transpose(1, 2)), torch.bmm(rows.transpose(1, 2), preact))
    return found


def _others(model: Model, device: str, backward: bool) -> dict[str, Forward | None]:
    """Peers by name; None stands for what is not installed. Behind the loop of transformers' "eager", autograd writes
    the gradient of all experts once for each of them: on a CPU that alone would take minutes.
    """
    at_once = partial(definitions.layer, definitions.experts_at_once, model)
    found: dict[str, Forward | None] = {"F.grouped_mm": at_once if hasattr(F, "grouped_mm") else None}
    if device == "cuda":
        found["transformers"] = peers.transformers_block(model, "eager")
        if not model.clamped:
            found["Liger"] = peers.liger_experts(model, device)
            found["ScatterMoE"] = peers.scattermoe_experts(model, device)
    elif not backward:
        found["transformers"] = peers.transformers_block(model, "eager")
    return found | {"transformers, grouped_mm": peers.transformers_block(model, "grouped_mm")}


def _providers(model: Model, device: str, backward: bool, others: dict[str, Forward | None]) -> tuple[Provider, ...]:
    def run(forward: Forward) -> Forward:
        if not backward:
            return forward
        return lambda inputs: definitions.with_gradients(forward(inputs), inputs, ("upstream",))

    at_once = partial(definitions.layer, definitions.experts_at_once, model)
    found = [Provider("ours", run(partial(ours, model)), "ours")]
    if backward:
        found.append(Provider("ours, save=input", run(partial(ours, model, save="input")), "ours"))
    found.append(Provider("eager", run(_eager(model)), "eager"))
    if device == "cuda":  # PyTorch does not compile its grouped product for CPUs
        found.append(Provider("torch.compile", run(compiled(at_once)), "compile"))
    found += [Provider(name, run(forward), "peer") for name, forward in others.items() if forward]
    return (*found, Provider("the bare GEMMs", partial(_bare, model, backward), "part"))


def _eager(model: Model) -> Forward:
    return partial(definitions.layer, definitions.experts_in_turn, model)


def case(device: str, model: Model, tokens: int, dtype: torch.dtype, *, backward: bool = True) -> Case:
    """A layer of a model."""
    others = _others(model, device, backward)
    providers = _providers(model, device, backward, others)
    eager = next(provider for provider in providers if provider.kind == "eager")
    rows = tokens * model.top_k
    shape = f"T={tokens} E={model.experts} K={model.top_k} H={model.hidden} I={model.width}"
    parts = "fwd+bwd" if backward else "fwd"
    return Case(
        op="moe_experts",
        name=f"{model.name} layer {shape} {str(dtype).removeprefix('torch.')} {parts}",
        make=partial(make, model, tokens, dtype, backward),
        providers=providers,
        operations=(18 if backward else 6) * rows * model.hidden * model.width,
        matmul_dtype=dtype,
        targets=(speedup(1),),
        definition=lambda inputs: definitions.sample(eager.run(inputs)),
        sample_outputs=definitions.sample,
        quick=model.name.startswith("Qwen"),
        memory=rows * model.hidden * torch.empty((), dtype=dtype).element_size() if backward else None,
        results_are_extra=False,
        absent=tuple(name for name, forward in others.items() if forward is None),
    )


def cases(device: str) -> list[Case]:
    """Layers with their gradients, the first without; then layers in FP8."""
    tokens = GPU_TOKENS if device == "cuda" else CPU_TOKENS
    timed = definitions.expert_cases(device)
    trained = [case(device, model, tokens, dtype) for model, dtype in timed]
    first, dtype = timed[0]
    return [case(device, first, tokens, dtype, backward=False), *trained, *fp8_layers.cases(device)]
