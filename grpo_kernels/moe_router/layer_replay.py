"""The part of a `RouterReplay` that one layer sees.

Nothing here is looked up by the layer's number, so layers that are compiled one by one share their graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _checks

from .api import RouterOutput, moe_router
from .arguments import check_logits

NAME = "RouterReplay"
_LIVE = -1
_WIRE_DTYPES = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8)


class Batch:
    """What the layers of one `RouterReplay` share: how many tokens the recorded ones routed."""

    def __init__(self) -> None:
        self.tokens: int | None = None


class LayerReplay:
    """The routes of one layer, recorded or given: what `RouterReplay.layer` returns.

    Attributes:
        layer_id: The layer's number in the model.
        routes: [T, K] int. None until the first pass records them.
        mismatch: 0-d int. Tokens whose live experts differed in the latest pass; None before any.
        num_experts: of the layer; None before any pass.
        passed: whether a pass has asked.
    """

    def __init__(self, layer_id: int, batch: Batch, routes: Tensor | None = None) -> None:
        self.layer_id = layer_id
        self.routes = routes
        self.mismatch: Tensor | None = None
        self.num_experts: int | None = None
        self.passed = False
        self._batch = batch

    def route(self, logits: Tensor, top_k: int, **options: Any) -> RouterOutput:
        """As `RouterReplay.route`, in this layer."""
        if "replay_ids" in options:
            raise TypeError(f"{NAME}: replay_ids is no option of route: the object holds the routes")
        check_logits(logits)
        routes = self.ids()
        if routes is None:
            # All slots live, rather than no replay: a checkpoint's recomputation must save the same tensors.
            routes = torch.full((logits.shape[0], top_k), _LIVE, dtype=torch.int32, device=logits.device)
        else:
            self._check_pass(routes, (logits.shape[0], top_k), logits.device)
        output = moe_router(logits, top_k, replay_ids=routes, **options)
        self.record(output.topk_ids, num_experts=logits.shape[1], mismatch=output.replay_mismatch)
        return output

    def ids(self) -> Tensor | None:
        """As `RouterReplay.ids`, of this layer."""
        routes = self.routes
        if routes is None or torch.compiler.is_compiling():
            return routes
        if routes.is_inference() and not torch.is_inference_mode_enabled():
            routes = self.routes = routes.clone()  # autograd may keep it
        return routes

    def record(self, topk_ids: Tensor, *, num_experts: int | None = None, mismatch: Tensor | None = None) -> None:
        """As `RouterReplay.record`, of this layer."""
        if self.routes is not None:
            self._check_pass(self.routes, topk_ids.shape, topk_ids.device)
        else:
            check_ids("topk_ids", topk_ids, "[T, K]")
            self._check_batch(topk_ids.shape[0])
            self.routes = topk_ids.detach().clone()  # the caller has the other one, and may write to it
        if num_experts is not None:
            self.num_experts = num_experts
        if mismatch is not None:
            self.mismatch = mismatch.detach()
        self.passed = True

    def _check_batch(self, tokens: int) -> None:
        if torch.compiler.is_compiling():  # it would be a graph of its own for the first layer; `pack` sees it as well
            return
        known = self._batch.tokens
        if known is None:
            self._batch.tokens = tokens
        elif tokens != known:
            raise ValueError(
                f"{NAME}: layer {self.layer_id} routes {tokens} tokens, the layers before it routed {known}: one "
                "object serves one micro-batch"
            )

    def _check_pass(self, routes: Tensor, shape: Sequence[int], device: torch.device) -> None:
        if tuple(routes.shape) != tuple(shape):
            raise ValueError(
                f"{NAME}: layer {self.layer_id} has routes of {routes.shape[0]} tokens with {routes.shape[1]} experts, "
                f"the pass has {shape[0]} and {shape[1]}: one object serves one micro-batch"
            )
        if routes.device != device:
            raise ValueError(
                f"{NAME}: the routes of layer {self.layer_id} are on {routes.device}, the pass is on {device}: use .to"
            )


def check_ids(name: str, ids: Tensor, shape: str) -> None:
    """Integers of the symbolic `shape`."""
    _checks.check_tensor(NAME, name, ids)
    _checks.check_dtype(NAME, name, ids, _WIRE_DTYPES)
    _checks.check_ndim(NAME, name, ids, shape)


def check_layer_id(layer_id: int) -> None:
    """An integer >= 0."""
    _checks.check_integer(NAME, "layer_id", layer_id, minimum=0)
