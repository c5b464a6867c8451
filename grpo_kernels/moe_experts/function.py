"""The autograd function: what is kept between the passes, and how the backward does without the rest.

With the rows x_e of the experts, h = x_e W1^T, A = glu(h), y_e = A W2^T and out = unpermute(s y_e), of gradient g::

    g_e = permute(g)          dA' = g_e W2             ds = <dA', A> = <g_e, y_e>
    dW2 = g_e^T (s A)         dh = s dA' glu'(h)       dW1 = dh^T x_e        dx = unpermute(dh W1)

x_e is gathered again and y_e is not needed: neither is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.moe_experts import ops
from grpo_kernels.moe_experts.arguments import Experts
from grpo_kernels.moe_experts.reference import Activation
from grpo_kernels.moe_experts.stages import Maps, Parts, build_maps


class Options(NamedTuple):
    """All that is no tensor."""

    backend: str
    parts: Parts
    dtype: torch.dtype  # of the products' operands
    activation: Activation
    keep_preact: bool
    expert_range: tuple[int, int]
    num_experts: int
    alignment: int

    def maps(self, topk_ids: Tensor) -> Maps:
        """Where the rows of the experts are."""
        return build_maps(topk_ids, self.num_experts, self.expert_range, self.alignment, self.backend)


Accumulators = tuple[Tensor | None, Tensor | None]


def routed_experts(
    options: Options, accumulators: Accumulators, experts: Experts, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """[T, H] through kernels, differentiable by the tokens, the parameters and the weights of the router."""
    trained = (*experts, topk_weights)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trained):
        result: Tensor = _RoutedExperts.apply(options, accumulators, *trained, topk_ids)  # type: ignore[no-untyped-call]
        return result
    return _forward(options, experts, topk_weights, options.maps(topk_ids))[0]


def _detached(experts: Experts, dtype: torch.dtype) -> Experts:
    return Experts(*(None if t is None else t.detach().to(dtype) for t in experts))  # type: ignore[arg-type]


def _forward(options: Options, experts: Experts, weights: Tensor, maps: Maps) -> tuple[Tensor, Tensor]:
    """The result, and the pre-activations."""
    parts = options.parts
    x, gate_up, down, gate_up_bias, down_bias = _detached(experts, options.dtype)
    preact = parts.product(parts.permute(x, maps), gate_up, maps, gate_up_bias)
    activated = ops.moe_glu(preact, maps.inv_map, None, *options.activation, options.backend)
    return parts.unpermute(parts.product(activated, down, maps, down_bias), maps, weights.detach()), preact


def of_dtypes(grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """Gradients in the dtypes of what they are of."""
    pairs = zip(grads, dtypes, strict=True)
    return [None if value is None or dtype is None else value.to(dtype) for value, dtype in pairs]


class Needs(NamedTuple):
    """Whose gradients are wanted, and what they need."""

    x: bool
    gate_up: bool
    down: bool
    gate_up_bias: bool
    down_bias: bool
    weights: bool

    @property
    def grad_preact(self) -> bool:
        return self.x or self.gate_up or self.gate_up_bias

    @property
    def preact(self) -> bool:
        return self.grad_preact or self.down or self.weights


class _RoutedExperts(torch.autograd.Function):
    """Keeps x and the pre-activations, as far as they are needed, the maps and what the caller passed."""

    @staticmethod
    def forward(ctx: Any, options: Options, accumulators: Accumulators, *tensors: Any) -> Tensor:
        *experts, weights, topk_ids = tensors
        given, maps = Experts(*experts), options.maps(topk_ids)
        result, preact = _forward(options, given, weights, maps)
        needs = Needs(*ctx.needs_input_grad[2:8])
        keep_x = needs.gate_up or (needs.preact and not options.keep_preact)
        kept = preact if needs.preact and options.keep_preact else None
        ctx.save_for_backward(given.x if keep_x else None, *given[1:], weights, kept, *maps)
        ctx.options, ctx.accumulators = options, accumulators
        ctx.dtypes = [None if t is None else t.dtype for t in given]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, gate_up_bias, down_bias, weights, preact, *maps = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[2:8])
        experts = Experts(x, gate_up, down, gate_up_bias, down_bias)
        grads = _Backward(ctx.options, needs, experts, weights, Maps(*maps)).run(grad, preact, ctx.accumulators)
        return (None, None, *of_dtypes(grads, (*ctx.dtypes, weights.dtype)), None)


class _Backward(NamedTuple):
    """One backward pass; `experts.x` is None where it is not needed."""

    options: Options
    needs: Needs
    experts: Experts
    weights: Tensor
    maps: Maps

    def run(self, grad: Tensor, preact: Tensor | None, accumulators: Accumulators) -> tuple[Tensor | None, ...]:
        """Gradients of the tokens, the parameters and the weights."""
        options, needs, parts, maps = self.options, self.needs, self.options.parts, self.maps
        grad = grad.to(options.dtype)
        grad_down_bias = parts.row_sum(parts.permute(grad, maps, self.weights), maps) if needs.down_bias else None
        grad_preact = grad_down = grad_weights = None
        if needs.preact:
            grad_preact, grad_down, grad_weights = self._through_down(grad, preact, accumulators[1])
        grad_x = grad_gate_up = grad_gate_up_bias = None
        if grad_preact is not None:
            if needs.gate_up_bias:
                grad_gate_up_bias = parts.row_sum(grad_preact, maps)
            if needs.gate_up:
                gate_up = self.experts.gate_up
                grad_gate_up = parts.weight_gradient(self._permuted(), grad_preact, maps, gate_up, accumulators[0])
            if needs.x:
                turned = self.experts.gate_up.to(options.dtype).transpose(1, 2)
                grad_x = parts.unpermute(parts.product(grad_preact, turned, maps), maps)
        return grad_x, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias, grad_weights

    def _permuted(self) -> Tensor:
        return self.options.parts.permute(self.experts.x.to(self.options.dtype), self.maps)

    def _preact(self) -> Tensor:
        """The pre-activations, as the forward formed them."""
        bias, dtype = self.experts.gate_up_bias, self.options.dtype
        bias = None if bias is None else bias.to(dtype)
        return self.options.parts.product(self._permuted(), self.experts.gate_up.to(dtype), self.maps, bias)

    def _through_down(
        self, grad: Tensor, preact: Tensor | None, accumulator: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the pre-activations, of `down` and of the weights."""
        options, needs, parts, maps = self.options, self.needs, self.options.parts, self.maps
        preact = self._preact() if preact is None else preact
        upstream = parts.permute(grad, maps)
        grad_preact = grad_down = grad_weights = None
        if needs.grad_preact or needs.weights:
            grad_activated = parts.product(upstream, self.experts.down.to(options.dtype).transpose(1, 2), maps)
            bias = self.experts.down_bias if needs.weights else None
            row_terms = None if bias is None else parts.bias_terms(upstream, bias, maps)
            grad_preact, activated, grad_weights = ops.moe_glu_backward(
                preact, grad_activated, maps.inv_map, self.weights, row_terms, *options.activation, needs.grad_preact,
                needs.down, needs.weights, options.backend,
            )  # fmt: skip
            del grad_activated
        else:
            activated = ops.moe_glu(preact, maps.inv_map, self.weights, *options.activation, options.backend)
        del preact
        if needs.down:
            grad_down = parts.weight_gradient(activated, upstream, maps, self.experts.down, accumulator)
        return grad_preact if needs.grad_preact else None, grad_down, grad_weights if needs.weights else None
