"""grouped_gemm, the first product of the experts, against a loop over them and PyTorch's own grouped product.

Rates count what the rows take: 2 R N K operations forward, three times that with both gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_kernels

from . import fp8_products
from . import moe_definitions as definitions
from . import moe_peers as peers
from .case import Case, Inputs, Provider
from .moe_definitions import Model, Values
from .target import speedup

_GPU_TOKENS, _CPU_TOKENS = 4096, 512

Forward = Callable[[Inputs], Values]


def _make(model: Model, tokens: int, dtype: torch.dtype, backward: bool, device: str, size: str) -> Inputs:
    """Segments of all sizes, some empty; a bias where the model has one."""
    model, tokens = (model, tokens) if size == "full" else (definitions.tiny(model), 24)
    rows, columns = tokens * model.top_k, 2 * model.width
    cuts = (torch.rand(model.experts - 1) * (rows + 1)).int().clamp(max=rows).sort().values
    even = torch.arange(1, model.experts) * rows // model.experts
    offsets = torch.cat([(cuts + 3 * even) // 4, torch.tensor([rows])]).int()
    offsets[0] = 0  # an expert without rows

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    made = {
        "x": normal(rows, model.hidden),
        "weight": normal(model.experts, columns, model.hidden, scale=model.hidden**-0.5),
    }
    if model.clamped:
        made["bias"] = normal(model.experts, columns)
    for value in made.values():
        value.requires_grad_(backward)
    if backward:
        made["upstream"] = normal(rows, columns)
    sizes = offsets.diff(prepend=offsets.new_zeros(1))
    return made | {"offsets": offsets.to(device), "sizes": sizes.to(device)}


def _ours(inputs: Inputs) -> Values:
    return (grpo_kernels.grouped_gemm(inputs["x"], inputs["weight"], inputs["offsets"], bias=inputs.get("bias")),)


def _eager(inputs: Inputs) -> Values:
    """The experts in turn; their sizes have to be known on the host."""
    parts = inputs["x"].split(inputs["sizes"].tolist())
    biases = inputs["bias"].unbind(0) if "bias" in inputs else [None] * len(parts)
    return (torch.cat([F.linear(*group) for group in zip(parts, inputs["weight"].unbind(0), biases, strict=True)]),)


def _grouped_mm(inputs: Inputs) -> Values:
    product = F.grouped_mm(inputs["x"], inputs["weight"].transpose(1, 2), offs=inputs["offsets"])
    if "bias" not in inputs:
        return (product,)
    expert = torch.bucketize(torch.arange(len(product), device=product.device), inputs["offsets"], right=True)
    return (product + inputs["bias"].index_select(0, expert),)


def _bare(backward: bool, inputs: Inputs) -> Values:
    """Batched products of segments that are all equal."""
    x, weight = inputs["x"].detach(), inputs["weight"].detach()
    rows = x.view(len(weight), -1, x.shape[1])
    product = torch.bmm(rows, weight.transpose(1, 2))
    if not backward:
        return (product,)
    upstream = inputs["upstream"].view_as(product)
    return product, torch.bmm(upstream, weight), torch.bmm(upstream.transpose(1, 2), rows)


def _case(device: str, model: Model, dtype: torch.dtype, *, backward: bool = True) -> Case:
    tokens = _GPU_TOKENS if device == "cuda" else _CPU_TOKENS
    megablocks = None if model.clamped else peers.megablocks_gemm(device)
    others: dict[str, Forward | None] = {
        "F.grouped_mm": _grouped_mm if hasattr(F, "grouped_mm") else None,
        "grouped_gemm of MegaBlocks": megablocks
        and (lambda inputs: (megablocks(inputs["x"], inputs["weight"], inputs["sizes"]),)),
    }

    def run(forward: Forward) -> Forward:
        if not backward:
            return forward
        return lambda inputs: definitions.with_gradients(forward(inputs), inputs, ("upstream",))

    rows, columns = tokens * model.top_k, 2 * model.width
    shape = f"E={model.experts} {rows}x{model.hidden}x{columns}"
    parts = "fwd+bwd" if backward else "fwd"
    return Case(
        op="grouped_gemm",
        name=f"{model.name} {shape} {str(dtype).removeprefix('torch.')} {parts}",
        make=partial(_make, model, tokens, dtype, backward),
        providers=(
            Provider("ours", run(_ours), "ours"),
            Provider("eager", run(_eager), "eager"),
            *(Provider(name, run(forward), "peer") for name, forward in others.items() if forward),
            Provider("the bare GEMMs", partial(_bare, backward), "part"),
        ),
        operations=(6 if backward else 2) * rows * columns * model.hidden,
        matmul_dtype=dtype,
        targets=(speedup(1),) if backward else (),
        definition=lambda inputs: definitions.sample(run(_eager)(inputs)),
        sample_outputs=definitions.sample,
        quick=model.name.startswith("DeepSeek"),
        absent=tuple(name for name, forward in others.items() if forward is None),
    )


def cases(device: str) -> list[Case]:
    """With their gradients, the first without; then products of FP8."""
    timed = definitions.expert_cases(device)
    trained = [_case(device, model, dtype) for model, dtype in timed]
    return [_case(device, *timed[0], backward=False), *trained, *fp8_products.cases(device)]
