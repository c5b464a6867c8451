"""RouterReplay: the routes of one micro-batch, recorded once and taken again in every later pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _checks

from .api import RouterOutput, moe_router

_NAME = "RouterReplay"
_WIRE_DTYPES = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8)
MISSING = -1
_INVALID = -2  # what an id that no expert has becomes: the router makes the row NaN instead of taking a wrong expert


class RouterReplay:
    """The routes that one micro-batch took through the MoE layers of a model.

    A token that is sent to other experts in training than in the rollout gets log-probs of another function, and a
    checkpointed layer that routes anew in the backward gets gradients of another forward. So one object goes with a
    micro-batch through all its passes, as an argument, and no global says what mode it is in:

    - A new object records: the first pass through a layer routes live and is remembered. Any later pass of the same
      object through that layer, be it the recomputation of a checkpoint, the old log-probs, the reference or an
      optimiser step, takes the remembered experts.
    - One of `from_packed`, of a slice or of `cat` was given its routes: every pass takes those. A slot that holds -1
      has no route and is routed live.

    Weights always come from the live logits at the replayed experts, so gradients reach the router.

    ::

        replay = RouterReplay()                          # one a micro-batch
        hidden = model(tokens, replay=replay)            # MoE layers do replay.route(layer_id, logits, top_k, ...)
        packed = replay.pack()                           # [T, layers, K] int8, int16 or int32
        replay = RouterReplay.from_packed(packed, num_experts=128, layer_ids=replay.layer_ids)

    Args:
        num_experts: of the layers; it decides the integers of `pack`. Learnt from the logits if it is None.
    """

    def __init__(self, num_experts: int | None = None) -> None:
        if num_experts is not None:
            _checks.check_integer(_NAME, "num_experts", num_experts, minimum=1)
        self.num_experts = num_experts
        self.recording = True
        self._routes: dict[int, Tensor] = {}
        self._mismatches: dict[int, Tensor] = {}
        self._passed: dict[int, bool] = {}

    def __repr__(self) -> str:
        mode = "recording" if self.recording else "given"
        return (
            f"{_NAME}({mode}, num_experts={self.num_experts}, layer_ids={self.layer_ids}, num_tokens={self.num_tokens})"
        )

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The layers that have routes, in the order of `pack`: as given, or as first passed."""
        return tuple(self._routes)

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the micro-batch; None while nothing is recorded."""
        return next((routes.shape[0] for routes in self._routes.values()), None)

    # in a layer ------------------------------------------------------------------------------------------------

    def route(self, layer_id: int, logits: Tensor, top_k: int, **options: Any) -> RouterOutput:
        """`moe_router(logits, top_k, **options)` along the routes of this layer, which the first pass records.

        Args:
            layer_id: The layer's number in the model. A layer of multi-token prediction needs one of its own.
            logits: [T, E] float. Live router logits.
            top_k: Experts a token.
            options: of `moe_router`, without replay_ids.

        Raises:
            ValueError: the object was given its routes and has none of this layer, or they are of another T or K.
        """
        if "replay_ids" in options:
            raise TypeError(f"{_NAME}: replay_ids is no option of route: the object holds the routes")
        routes = self.ids(layer_id)
        if routes is None:
            # All slots live, rather than no replay: a checkpoint's recomputation must save the same tensors.
            routes = torch.full((logits.shape[0], top_k), MISSING, dtype=torch.int32, device=logits.device)
        else:
            self._check_pass(layer_id, routes, (logits.shape[0], top_k), logits.device)
        output = moe_router(logits, top_k, replay_ids=routes, **options)
        self.record(layer_id, output.topk_ids, num_experts=logits.shape[1], mismatch=output.replay_mismatch)
        return output

    def ids(self, layer_id: int) -> Tensor | None:
        """[T, K] int. The routes of a layer for a router of your own; None if this pass is the one to record.

        Raises:
            ValueError: the object was given its routes and has none of this layer.
        """
        _check_layer_id(layer_id)
        routes = self._routes.get(layer_id)
        if routes is None:
            if self.recording:
                return None
            raise ValueError(
                f"{_NAME}: layer {layer_id} has no routes, only {_names(self._routes)} have. A layer that was not "
                "recorded, such as one of multi-token prediction, must not be passed the object"
            )
        if not torch.compiler.is_compiling() and routes.is_inference() and not torch.is_inference_mode_enabled():
            routes = self._routes[layer_id] = routes.clone()  # autograd may keep it
        return routes

    def record(
        self, layer_id: int, topk_ids: Tensor, *, num_experts: int | None = None, mismatch: Tensor | None = None
    ) -> None:
        """What a router of your own chose; a layer that has routes keeps them.

        Args:
            layer_id: The layer's number in the model.
            topk_ids: [T, K] int. Logical expert ids, -1 for a token that was not routed.
            num_experts: of the layer.
            mismatch: 0-d int. Tokens whose live experts differ from the replayed ones.
        """
        _check_layer_id(layer_id)
        routes = self._routes.get(layer_id)
        if routes is not None:
            self._check_pass(layer_id, routes, topk_ids.shape, topk_ids.device)
        elif not self.recording:
            raise ValueError(f"{_NAME}: layer {layer_id} has no routes, only {_names(self._routes)} have")
        else:
            _check_ids(topk_ids, 2)
            known = self.num_tokens
            if known is not None and topk_ids.shape[0] != known:
                raise ValueError(
                    f"{_NAME}: layer {layer_id} routes {topk_ids.shape[0]} tokens, {_names(self._routes)} routed "
                    f"{known}: one object serves one micro-batch"
                )
            self._routes[layer_id] = topk_ids.detach()
        if num_experts is not None:
            self.num_experts = max(num_experts, self.num_experts or 0)
        if mismatch is not None:
            self._mismatches[layer_id] = mismatch.detach()
        self._passed[layer_id] = True

    def mismatches(self) -> dict[int, Tensor]:
        """By layer, 0-d int32 on the device: tokens whose live experts differed in the latest pass of this object.

        Of recorded routes and a recomputation that is the number of tokens that would have changed experts.
        """
        return dict(self._mismatches)

    def check_used(self) -> None:
        """Raises ValueError if a layer has routes that no pass asked for: a replay that is silently ignored."""
        unused = [layer_id for layer_id in self._routes if layer_id not in self._passed]
        if unused:
            raise ValueError(f"{_NAME}: no pass asked for the routes of {_names(unused)}")

    # as data -----------------------------------------------------------------------------------------------------

    def pack(self) -> Tensor:
        """[T, layers, K] int8 (up to 128 experts), int16 (up to 32768) or int32. -1: not routed, or not known."""
        if not self._routes:
            raise ValueError(f"{_NAME}: pack needs routes, no layer has recorded any")
        if self.num_experts is None:
            raise ValueError(f"{_NAME}: pack needs the number of experts: RouterReplay(num_experts)")
        widths = {routes.shape[1] for routes in self._routes.values()}
        if len(widths) > 1:
            raise ValueError(f"{_NAME}: pack needs one number of experts a token, the layers have {sorted(widths)}")
        return _compact(torch.stack(list(self._routes.values()), dim=1), self.num_experts)

    @classmethod
    def from_packed(
        cls, packed: Tensor, num_experts: int, layer_ids: Iterable[int], *, num_tokens: int | None = None
    ) -> RouterReplay:
        """Routes that `pack` gave, or an inference engine.

        Args:
            packed: [len, layers, K] int8, uint8, int16, int32 or int64. Logical expert ids; -1: not known.
            num_experts: E of the layers.
            layer_ids: The layer that each of the `layers` belongs to.
            num_tokens: Tokens of the passes. Those past `len` have no route, as the last token of a sample, which no
                forward followed in the rollout.

        Raises:
            TypeError: packed is no integer tensor.
            ValueError: the shape does not fit layer_ids or num_tokens; on the CPU also an expert that does not exist or
                is named twice by one token. On a GPU, where looking would wait, the router makes those rows NaN.
        """
        _checks.check_integer(_NAME, "num_experts", num_experts, minimum=1)
        _check_ids(packed, 3)
        layers = tuple(layer_ids)
        for layer_id in layers:
            _check_layer_id(layer_id)
        if len(set(layers)) != len(layers):
            raise ValueError(f"{_NAME}: layer_ids must differ, got {list(layers)}")
        if packed.shape[1] != len(layers):
            raise ValueError(
                f"{_NAME}: packed must have shape [len, layers, K] with {len(layers)} layers as layer_ids has, got "
                f"{list(packed.shape)}"
            )
        if num_experts - 1 > torch.iinfo(packed.dtype).max:
            raise ValueError(
                f"{_NAME}: {str(packed.dtype).removeprefix('torch.')} cannot hold the ids of {num_experts} experts: "
                "some have wrapped round where they were packed"
            )
        length = packed.shape[0]
        tokens = length if num_tokens is None else num_tokens
        _checks.check_integer(_NAME, "num_tokens", tokens, minimum=0)
        if tokens < length:
            raise ValueError(f"{_NAME}: packed holds {length} tokens, more than num_tokens = {tokens}")
        if packed.device.type == "cpu":
            _check_routes(packed, num_experts, layers)
        compact = _compact(packed, num_experts)
        routes = compact.new_full((len(layers), tokens, packed.shape[2]), MISSING)
        routes[:, :length] = compact.transpose(0, 1)
        return cls._given(num_experts, dict(zip(layers, routes.unbind(0), strict=True)))

    def __getitem__(self, tokens: slice | Tensor) -> RouterReplay:
        """The routes of some tokens, for a part of the batch: a slice, or [n] int64 indices in the order wanted."""
        if isinstance(tokens, Tensor):
            _checks.check_dtype(_NAME, "an index", tokens, _checks.INTEGER)
        elif not isinstance(tokens, slice):
            raise TypeError(f"{_NAME}: tokens are taken by a slice or an integer tensor, got {type(tokens).__name__}")
        return self._given(self.num_experts, {layer: routes[tokens] for layer, routes in self._routes.items()})

    @classmethod
    def cat(cls, parts: Sequence[RouterReplay]) -> RouterReplay:
        """The routes of several objects, one after the other along the tokens."""
        if not parts:
            raise ValueError(f"{_NAME}: cat needs at least one part")
        first = parts[0]
        for part in parts[1:]:
            if set(part.layer_ids) != set(first.layer_ids):
                raise ValueError(
                    f"{_NAME}: cat needs parts of the same layers, got {_names(first._routes)} and "
                    f"{_names(part._routes)}"
                )
        numbers = [part.num_experts for part in parts if part.num_experts is not None]
        routes = {layer: [part._routes[layer].to(torch.int32) for part in parts] for layer in first.layer_ids}
        return cls._given(max(numbers, default=None), {layer: torch.cat(rows) for layer, rows in routes.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RouterReplay:
        """The same routes on another device."""
        routes = {layer: ids.to(device, non_blocking=non_blocking) for layer, ids in self._routes.items()}
        return self._given(self.num_experts, routes)

    @classmethod
    def _given(cls, num_experts: int | None, routes: dict[int, Tensor]) -> RouterReplay:
        replay = cls(num_experts)
        replay.recording = False
        replay._routes = routes
        return replay

    def _check_pass(self, layer_id: int, routes: Tensor, shape: Sequence[int], device: torch.device) -> None:
        if tuple(routes.shape) != tuple(shape):
            raise ValueError(
                f"{_NAME}: layer {layer_id} has routes of {routes.shape[0]} tokens with {routes.shape[1]} experts, "
                f"the pass has {shape[0]} and {shape[1]}: one object serves one micro-batch"
            )
        if routes.device != device:
            raise ValueError(
                f"{_NAME}: the routes of layer {layer_id} are on {routes.device}, the pass is on {device}: use .to"
            )


def _compact(ids: Tensor, num_experts: int) -> Tensor:
    """The same ids in the smallest signed integers that hold them. One that no expert has stays one."""
    dtype = torch.int8 if num_experts <= 128 else torch.int16 if num_experts <= 32768 else torch.int32
    ids = ids.to(torch.int16) if ids.dtype == torch.uint8 else ids
    return ids.masked_fill(_outside(ids, num_experts), _INVALID).to(dtype)


def _outside(ids: Tensor, num_experts: int) -> Tensor:
    """Which ids are neither those of an expert nor MISSING."""
    if (
        num_experts > torch.iinfo(ids.dtype).max
    ):  # they cannot be too large, and int8 compared with 128 compares with -128
        return ids < MISSING if ids.dtype.is_signed else torch.zeros_like(ids, dtype=torch.bool)
    return (ids < MISSING) | (ids >= num_experts) if ids.dtype.is_signed else ids >= num_experts


def _check_routes(packed: Tensor, num_experts: int, layer_ids: Sequence[int]) -> None:
    """Raises for an expert that does not exist and for one that a token has twice."""
    outside = _outside(packed, num_experts).any(dim=-1)
    slots = packed.movedim(-1, 0).contiguous()
    twice = torch.zeros_like(outside)
    for later in range(1, len(slots)):  # comparing all pairs of eight is eight times as fast as sorting
        named = slots[later] != MISSING if packed.dtype.is_signed else True
        twice |= (slots[:later] == slots[later]).any(dim=0) & named
    for faults, fault in ((outside, f"an expert outside [0, {num_experts})"), (twice, "an expert twice")):
        if bool(faults.any()):
            token, layer = faults.nonzero()[0].tolist()
            raise ValueError(
                f"{_NAME}: packed has {fault} at token {token}, layer {layer_ids[layer]}: "
                f"{packed[token, layer].tolist()} ({int(faults.sum())} such rows). Unknown routes must be -1, not 0"
            )


def _check_ids(ids: Tensor, dimensions: int) -> None:
    name = "packed" if dimensions == 3 else "topk_ids"
    _checks.check_tensor(_NAME, name, ids)
    _checks.check_dtype(_NAME, name, ids, _WIRE_DTYPES)
    _checks.check_ndim(_NAME, name, ids, "[len, layers, K]" if dimensions == 3 else "[T, K]")


def _check_layer_id(layer_id: int) -> None:
    _checks.check_integer(_NAME, "layer_id", layer_id, minimum=0)


def _names(layer_ids: Iterable[int]) -> str:
    """ "layers 3 to 60", or all of them where there are gaps."""
    ids = list(layer_ids)
    if not ids:
        return "no layers"
    if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"layers {ids[0]} to {ids[-1]}"
    return f"layer{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"
