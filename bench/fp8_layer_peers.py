"""Layers of experts around other people's products of FP8 operands, where they are installed and the GPU has them.

Routes, moves and casts are ours where a peer has none: what competes is the product.
"""

from __future__ import annotations

from torch import Tensor

import grpo_kernels

from . import fp8_product_peers as products
from . import moe_definitions as definitions
from .bench_moe_router import routed
from .case import Inputs
from .fp8_product_peers import Peer
from .moe_definitions import Model, Values

_TILE = 128


def scaled_mm_loop(model: Model, device: str) -> Peer | None:
    """Around PyTorch's own product with scales of blocks."""
    return _forward(model, products.scaled_mm_loop(device))


def deep_gemm(model: Model, device: str) -> Peer | None:
    """Around DeepGEMM's."""
    return _forward(model, products.deep_gemm(device))


def wants_quantised_weights(device: str) -> bool:
    """Whether one of those two is there."""
    return any(peer(device) for peer in (products.scaled_mm_loop, products.deep_gemm))


def quantised_weights(inputs: Inputs) -> Inputs:
    """What they take beside a layer's inputs."""
    made: Inputs = {}
    for name in ("gate_up", "down"):
        scaled = grpo_kernels.fp8_quantize(inputs[name], (_TILE, _TILE))
        made |= {f"{name}_data": scaled.data, f"{name}_scale": scaled.scale}
    return made


def _forward(model: Model, product: Peer | None) -> Peer | None:
    """Forward alone. Segments are multiples of 128 rows, and their sizes are read on the host."""
    if product is None:
        return None

    def multiply(data: Tensor, scale: Tensor, sizes: Tensor, name: str, inputs: Inputs) -> Tensor:
        weight = {"weight_data": inputs[f"{name}_data"], "weight_scale": inputs[f"{name}_scale"]}
        return product({"data": data, "scale": scale, "sizes": sizes} | weight)[0]

    def run(inputs: Inputs) -> Values:
        routes = routed(definitions.router_logits(inputs), model, inputs)
        permutation = grpo_kernels.build_permutation(routes.topk_ids, len(inputs["gate_up"]), alignment=_TILE)
        sizes = permutation.offsets.diff(prepend=permutation.offsets.new_zeros(1))
        end = int(permutation.offsets[-1])
        rows = grpo_kernels.moe_permute_quantize(inputs["x"], permutation)
        preact = multiply(rows.data[:end], rows.scale[:end], sizes, "gate_up", inputs)
        activated = grpo_kernels.fp8_quantize(definitions.activation(preact, model))
        results = multiply(*activated, sizes, "down", inputs)
        return (definitions.unpermute(results, permutation.row_id_map, routes.topk_weights),)

    return run


def torchao(model: Model, device: str) -> Peer | None:
    """Around torchao's, which quantises everything itself, in both passes."""
    product = products.torchao(device)
    if product is None:
        return None

    def run(inputs: Inputs) -> Values:
        weights, ids = definitions.route(definitions.router_logits(inputs), model, inputs.get("correction"))
        row_id_map, inv_map, offsets, _ = definitions.maps(ids, len(inputs["gate_up"]))
        rows = definitions.permute(inputs["x"], inv_map, model.top_k)
        (preact,) = product({"x": rows, "weight": inputs["gate_up"], "offsets": offsets})
        activated = definitions.activation(preact, model)
        (results,) = product({"x": activated, "weight": inputs["down"], "offsets": offsets})
        return (definitions.unpermute(results, row_id_map, weights),)

    return run
