"""RouterReplay: the routes of one micro-batch, recorded once and taken again in every later pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _checks

from .api import RouterOutput
from .layer_replay import NAME as _NAME
from .layer_replay import Batch, LayerReplay, check_ids, check_layer_id

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

    Weights always come from the live logits at the replayed experts, so gradients reach the router. What is compiled
    layer by layer takes `layer` of the object instead, which does not depend on the layer's number.

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
        self.recording = True
        self._num_experts = num_experts
        self._batch = Batch()
        self._layers: dict[int, LayerReplay] = {}

    def __repr__(self) -> str:
        mode = "recording" if self.recording else "given"
        return (
            f"{_NAME}({mode}, num_experts={self.num_experts}, layer_ids={self.layer_ids}, num_tokens={self.num_tokens})"
        )

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The layers that have routes, in the order of `pack`: as given, or as first asked for."""
        return tuple(self._routes)

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the micro-batch; None while nothing is recorded."""
        return next((routes.shape[0] for routes in self._routes.values()), None)

    @property
    def num_experts(self) -> int | None:
        """The largest number of experts that the object was told or a layer has; None: not known."""
        numbers = (self._num_experts, *(layer.num_experts for layer in self._layers.values()))
        return max((number for number in numbers if number is not None), default=None)

    @property
    def _routes(self) -> dict[int, Tensor]:
        return {layer_id: layer.routes for layer_id, layer in self._layers.items() if layer.routes is not None}

    # in a layer ------------------------------------------------------------------------------------------------

    def layer(self, layer_id: int) -> LayerReplay:
        """This object as one layer sees it, for a layer that is compiled by itself; the state is shared.

        Passed the whole object, layers compiled one by one are compiled anew for every layer, since each looks under
        another number. Passed this, all share the graphs of the first two.

        Raises:
            ValueError: the object was given its routes and has none of this layer.
        """
        check_layer_id(layer_id)
        layer = self._layers.get(layer_id)
        if layer is None:
            if not self.recording:
                raise ValueError(
                    f"{_NAME}: layer {layer_id} has no routes, only {_names(self._routes)} have. A layer that was not "
                    "recorded, such as one of multi-token prediction, must not be passed the object"
                )
            layer = self._layers[layer_id] = LayerReplay(layer_id, self._batch)
        return layer

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
        return self.layer(layer_id).route(logits, top_k, **options)

    def ids(self, layer_id: int) -> Tensor | None:
        """[T, K] int. The routes of a layer for a router of your own; None if this pass is the one to record.

        They are the object's own memory: to be read only.

        Raises:
            ValueError: the object was given its routes and has none of this layer.
        """
        return self.layer(layer_id).ids()

    def record(
        self, layer_id: int, topk_ids: Tensor, *, num_experts: int | None = None, mismatch: Tensor | None = None
    ) -> None:
        """What a router of your own chose, copied; a layer that has routes keeps them.

        Args:
            layer_id: The layer's number in the model.
            topk_ids: [T, K] int. Logical expert ids, -1 for a token that was not routed.
            num_experts: of the layer.
            mismatch: 0-d int. Tokens whose live experts differ from the replayed ones.
        """
        self.layer(layer_id).record(topk_ids, num_experts=num_experts, mismatch=mismatch)

    def mismatches(self) -> dict[int, Tensor]:
        """By layer, 0-d int32 on the device: tokens whose live experts differed in the latest pass of this object.

        Of recorded routes and a recomputation that is the number of tokens that would have changed experts.
        """
        return {number: layer.mismatch for number, layer in self._layers.items() if layer.mismatch is not None}

    def check_used(self) -> None:
        """Raises ValueError if a layer has routes that no pass asked for: a replay that is silently ignored."""
        unused = [number for number, layer in self._layers.items() if layer.routes is not None and not layer.passed]
        if unused:
            raise ValueError(f"{_NAME}: no pass asked for the routes of {_names(unused)}")

    # as data -----------------------------------------------------------------------------------------------------

    def pack(self) -> Tensor:
        """[T, layers, K] int8 (up to 128 experts), int16 (up to 32768) or int32. -1: not routed, or not known."""
        routes = self._routes
        if not routes:
            raise ValueError(f"{_NAME}: pack needs routes, no layer has recorded any")
        if self.num_experts is None:
            raise ValueError(f"{_NAME}: pack needs the number of experts: RouterReplay(num_experts)")
        for axis, what in enumerate(("tokens", "experts a token")):
            sizes = sorted({ids.shape[axis] for ids in routes.values()})
            if len(sizes) > 1:
                raise ValueError(f"{_NAME}: pack needs one number of {what}, the layers have {sizes}")
        return _compact(torch.stack(list(routes.values()), dim=1), self.num_experts)

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
        check_ids("packed", packed, "[len, layers, K]")
        layers = tuple(layer_ids)
        for layer_id in layers:
            check_layer_id(layer_id)
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
        """The routes of some tokens, for a part of the batch: a slice, or [n] int64 indices in the order wanted.

        A slice shares the memory of the whole, which nothing in the library writes to.
        """
        if isinstance(tokens, Tensor):
            _checks.check_dtype(_NAME, "an index", tokens, _checks.INTEGER)
            _checks.check_ndim(_NAME, "an index", tokens, "[n]")
        elif not isinstance(tokens, slice):
            raise TypeError(f"{_NAME}: tokens are taken by a slice or an integer tensor, got {type(tokens).__name__}")
        return self._given(self.num_experts, {layer: routes[tokens] for layer, routes in self._routes.items()})

    @classmethod
    def cat(cls, parts: Sequence[RouterReplay]) -> RouterReplay:
        """The routes of several objects of the same layers, experts, K and device, one after the other."""
        if not parts:
            raise ValueError(f"{_NAME}: cat needs at least one part")
        for part in parts:
            if not isinstance(part, RouterReplay):
                raise TypeError(f"{_NAME}: cat needs parts that are RouterReplay, got {type(part).__name__}")
        first = parts[0]._routes
        routes = {layer_id: [ids] for layer_id, ids in first.items()}
        for part in parts[1:]:
            others = part._routes
            if set(others) != set(first):
                raise ValueError(
                    f"{_NAME}: cat needs parts of the same layers, got {_names(first)} and {_names(others)}"
                )
            for layer_id, ids in others.items():
                _check_alike(layer_id, first[layer_id], ids)
                routes[layer_id].append(ids)
        numbers = sorted({part.num_experts for part in parts if part.num_experts is not None})
        if len(numbers) > 1:
            raise ValueError(f"{_NAME}: cat needs parts of one number of experts, got {numbers}")
        joined = {layer_id: torch.cat([ids.to(torch.int32) for ids in rows]) for layer_id, rows in routes.items()}
        return cls._given(numbers[0] if numbers else None, joined)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RouterReplay:
        """The same routes on another device."""
        routes = {layer: ids.to(device, non_blocking=non_blocking) for layer, ids in self._routes.items()}
        return self._given(self.num_experts, routes)

    @classmethod
    def _given(cls, num_experts: int | None, routes: dict[int, Tensor]) -> RouterReplay:
        replay = cls(num_experts)
        replay.recording = False
        replay._layers = {layer_id: LayerReplay(layer_id, replay._batch, ids) for layer_id, ids in routes.items()}
        return replay


def _check_alike(layer_id: int, first: Tensor, ids: Tensor) -> None:
    """Parts for `cat`: as many experts a token, on one device."""
    for what, wanted, found in (("K", first.shape[1], ids.shape[1]), ("device", first.device, ids.device)):
        if wanted != found:
            raise ValueError(f"{_NAME}: cat needs parts of the same {what}, layer {layer_id} has {wanted} and {found}")


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


def _names(layer_ids: Iterable[int]) -> str:
    """ "layers 3 to 60", or all of them where there are gaps."""
    ids = list(layer_ids)
    if not ids:
        return "no layers"
    if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"layers {ids[0]} to {ids[-1]}"
    return f"layer{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"
