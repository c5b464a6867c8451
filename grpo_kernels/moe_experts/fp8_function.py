"""The autograd function of routed experts in FP8.

With q(.) a tensor in e4m3 and the rows x_e of the experts, h = q(x_e) q(W1)^T, A = glu(h), y_e = q(A) q(W2)^T and
out = unpermute(s y_e), of gradient g::

    g_e = permute(g)          dA' = q(g_e) q(W2)       ds = <dA', A>
    dW2 = g_e^T (s A)         dh = s dA' glu'(h)       dW1 = dh^T q(x_e)        dx = unpermute(q(dh) q(W1))

Kept are q(x) of the tokens and q(h), from which A is formed again. Gradients of weights are products of wide operands,
or of quantised ones whose tiles run along the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels import _dispatch
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.moe_experts import fp8_weights
from grpo_kernels.moe_experts.arguments import Experts
from grpo_kernels.moe_experts.fp8_stages import Fp8Parts
from grpo_kernels.moe_experts.function import Accumulators, Needs, of_dtypes
from grpo_kernels.moe_experts.ops import QuantizedGradients, QuantizedNeeds
from grpo_kernels.moe_experts.reference import Activation
from grpo_kernels.moe_experts.stages import Maps, build_maps


class Options(NamedTuple):
    """All that is no tensor."""

    backend: str
    parts: Fp8Parts
    dtype: torch.dtype  # of the products' results
    activation: Activation
    keep_preact: bool
    expert_range: tuple[int, int]
    num_experts: int
    alignment: int
    fp8_wgrad: bool

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of what was quantised, when it is not: float16 need not hold the power of two above its largest number."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def maps(self, topk_ids: Tensor) -> Maps:
        """Where the rows of the experts are."""
        return build_maps(topk_ids, self.num_experts, self.expert_range, self.alignment, self.backend)


def routed_experts(
    options: Options, accumulators: Accumulators, experts: Experts, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """[T, H], differentiable by the tokens, the parameters and the weights of the router."""
    _dispatch.refuse_forward_mode("moe_experts", "products of FP8 have")
    trained = (*experts, topk_weights)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trained):
        result: Tensor = _RoutedExperts.apply(options, accumulators, *trained, topk_ids)  # type: ignore[no-untyped-call]
        return result
    return _forward(options, experts, topk_weights, options.maps(topk_ids), None)[0]


class _Parameters(NamedTuple):
    """As the caller passed them."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def _forward(
    options: Options, experts: Experts, weights: Tensor, maps: Maps, needs: Needs | None
) -> tuple[Tensor, ScaledTensor]:
    """The result, and the pre-activations where they are to be kept: where there will be a backward."""
    parts, dtype = options.parts, options.dtype
    rows, _ = parts.permute_quantize(experts.x.detach(), maps)
    gate_up = fp8_weights.quantized(experts.gate_up, parts.casts, both=needs is not None and needs.x)
    preact = parts.product(rows, gate_up, maps, experts.gate_up_bias, dtype)
    del rows, gate_up
    keep = needs is not None and needs.preact and options.keep_preact
    activated, kept = parts.glu(preact, maps, options.activation, keep)
    del preact
    both = needs is not None and (needs.grad_preact or needs.weights)
    down = fp8_weights.quantized(experts.down, parts.casts, both=both)
    results = parts.product(activated, down, maps, experts.down_bias, dtype)
    return parts.plain.unpermute(results, maps, weights.detach()), kept


def _kept(scaled: ScaledTensor) -> ScaledTensor:
    """As it is kept. In compiled code with dense scales: of a stride that is the next multiple of four inductor makes a
    guard, and compiles anew."""
    if not torch.compiler.is_compiling():
        return scaled
    return scaled._replace(scale=scaled.scale.clone(memory_format=torch.contiguous_format))


class _RoutedExperts(torch.autograd.Function):
    """Keeps tokens and pre-activations in e4m3, as far as they are needed, the maps and what the caller passed."""

    @staticmethod
    def forward(ctx: Any, options: Options, accumulators: Accumulators, *tensors: Any) -> Tensor:
        *given, weights, topk_ids = tensors
        experts, maps = Experts(*given), options.maps(topk_ids)
        needs = Needs(*ctx.needs_input_grad[2:8])
        result, kept = _forward(options, experts, weights, maps, needs)
        keep_x = needs.gate_up or (needs.preact and not options.keep_preact)
        x = _kept(options.parts.quantize(experts.x.detach())) if keep_x else (None, None)
        preact = _kept(kept) if needs.preact and options.keep_preact else (None, None)
        ctx.save_for_backward(*x, *preact, *given[1:], weights, *maps)
        ctx.options, ctx.accumulators = options, accumulators
        ctx.copies = [fp8_weights.reference_to(weight) for weight in given[1:3]]
        ctx.dtypes = [None if t is None else t.dtype for t in given]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, preact, preact_scale, *parameters, weights, row_id_map, inv_map, offsets = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[2:8])
        tokens, kept = ScaledTensor(x, x_scale), None if preact is None else ScaledTensor(preact, preact_scale)
        maps = Maps(row_id_map, inv_map, offsets)
        backward = _Backward(ctx.options, needs, tokens, _Parameters(*parameters), weights, maps, *ctx.copies)
        grads = backward.run(grad, kept, ctx.accumulators)
        return (None, None, *of_dtypes(grads, (*ctx.dtypes, weights.dtype)), None)


class _Backward(NamedTuple):
    """One backward pass; `x` holds nothing where it is not needed."""

    options: Options
    needs: Needs
    x: ScaledTensor
    parameters: _Parameters
    weights: Tensor
    maps: Maps
    of_gate_up: fp8_weights.Reference | None
    of_down: fp8_weights.Reference | None

    def run(self, grad: Tensor, preact: ScaledTensor | None, accumulators: Accumulators) -> tuple[Tensor | None, ...]:
        """Gradients of the tokens, the parameters and the weights."""
        options, needs, parts, maps = self.options, self.needs, self.options.parts, self.maps
        grad = grad.to(options.wide_dtype)
        grad_down_bias = (
            parts.plain.row_sum(parts.plain.permute(grad, maps, self.weights), maps) if needs.down_bias else None
        )
        if not needs.preact:
            return None, None, None, None, grad_down_bias, None
        found, grad_down = self._through_down(grad, self._preact() if preact is None else preact, accumulators[1])
        grad_gate_up_bias = parts.plain.row_sum(found.wide, maps) if needs.gate_up_bias else None
        grad_gate_up = self._of_gate_up(found, accumulators[0]) if needs.gate_up else None
        grad_x = None
        if needs.x:
            turned = fp8_weights.turned(self.parameters.gate_up, parts.casts, self.of_gate_up)
            rows = parts.product(ScaledTensor(found.data, found.scale), turned, maps, None, options.dtype)
            grad_x = parts.plain.unpermute(rows, maps)
        weights = found.weights if needs.weights else None
        return grad_x, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias, weights

    def _tokens(self) -> Tensor:
        return self.options.parts.dequantize(self.x, self.options.wide_dtype)

    def _preact(self) -> ScaledTensor:
        """The pre-activations, as the forward formed and quantised them."""
        parts, parameters = self.options.parts, self.parameters
        rows, _ = parts.permute_quantize(self._tokens(), self.maps)
        gate_up = fp8_weights.quantized(parameters.gate_up, parts.casts, both=self.needs.x, saved=self.of_gate_up)
        preact = parts.product(rows, gate_up, self.maps, parameters.gate_up_bias, self.options.dtype)
        return parts.glu(preact, self.maps, self.options.activation, True)[1]

    def _through_down(
        self, grad: Tensor, preact: ScaledTensor, accumulator: Tensor | None
    ) -> tuple[QuantizedGradients, Tensor | None]:
        """What the activation gives, and the gradient of `down`."""
        options, needs, parts, maps = self.options, self.needs, self.options.parts, self.maps
        down, eight_bits = self.parameters.down, options.fp8_wgrad
        wanted = QuantizedNeeds(
            rows=needs.x,
            columns=needs.gate_up and eight_bits,
            wide=(needs.gate_up and not eight_bits) or needs.gate_up_bias,
            activated_columns=needs.down and eight_bits,
            activated_wide=needs.down and not eight_bits,
            weights=needs.weights,
        )
        rows = columns = None
        if wanted.grad or wanted.activated_columns:
            rows, columns = parts.permute_quantize(grad, maps, gradient=True, columns=wanted.activated_columns)
        bias = self.parameters.down_bias if needs.weights else None
        upstream = parts.plain.permute(grad, maps) if bias is not None or wanted.activated_wide else grad.new_empty(0)
        grad_activated = None
        if rows is not None and wanted.grad:
            turned = fp8_weights.turned(down, parts.casts, self.of_down)
            grad_activated = parts.product(rows, turned, maps, None, options.dtype)
        del rows
        row_terms = None if bias is None else parts.plain.bias_terms(upstream, bias, maps)
        found = parts.glu_backward(
            preact, grad_activated, maps, self.weights, row_terms, options.activation, wanted, options.wide_dtype
        )
        del grad_activated
        if not needs.down:
            return found, None
        if columns is not None and eight_bits:
            activated = ScaledTensor(found.activated_data_t, found.activated_scale_t)
            return found, parts.plain.weight_gradient(activated, columns, maps, down, accumulator)
        return found, parts.plain.weight_gradient(found.activated_wide, upstream, maps, down, accumulator)

    def _of_gate_up(self, found: QuantizedGradients, accumulator: Tensor | None) -> Tensor | None:
        parts, maps, gate_up = self.options.parts, self.maps, self.parameters.gate_up
        if not self.options.fp8_wgrad:
            return parts.plain.weight_gradient(
                parts.plain.permute(self._tokens(), maps), found.wide, maps, gate_up, accumulator
            )
        _, columns = parts.permute_quantize(self._tokens(), maps, columns=True)
        return parts.plain.weight_gradient(
            columns, ScaledTensor(found.data_t, found.scale_t), maps, gate_up, accumulator
        )
