"""The ops that routed experts in FP8 are made of, each on its own best backend, or all of them in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels._autocast import no_autocast
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.fp8_quantize import ops as fp8_ops
from grpo_kernels.fp8_quantize import reference as fp8_reference
from grpo_kernels.grouped_gemm import ops as gemm_ops
from grpo_kernels.grouped_gemm import reference as gemm_reference
from grpo_kernels.moe_experts import fp8_reference as reference
from grpo_kernels.moe_experts import glu_reference, ops
from grpo_kernels.moe_experts.reference import Activation
from grpo_kernels.moe_experts.stages import Maps
from grpo_kernels.moe_permute import ops as permute_ops
from grpo_kernels.moe_permute import quantize_reference
from grpo_kernels.moe_permute import reference as permute_reference


def eps(gradient: bool) -> float:
    """The smallest largest magnitude of a tile. Means over large batches make gradients small.

    A function, because torch.compile takes a float of a module for an input of its graph, which a backward cannot have.
    """
    return 1e-30 if gradient else 1e-12


def _call(op: Callable[..., Any], definition: Callable[..., Any], backend: str, *arguments: Any) -> Any:
    if backend != "reference":
        return op(*arguments, backend)
    with no_autocast(arguments[0].device.type):
        return definition(*arguments)


class Parts(NamedTuple):
    """The backends of the activation, of the moves, of the products and of plain quantisation."""

    activations: str
    moves: str
    products: str
    casts: str

    @classmethod
    def of(cls, backend: str, tensor: Tensor) -> Parts:
        """Those that data like `tensor` takes; `backend`, on which the experts run, where there is no other."""
        names = ("moe_permute_quantize", "grouped_gemm", "fp8_quantize")
        chosen = (_dispatch.resolve_part(op, tensor, backend) for op in names)
        return cls(backend, *(backend if part == "reference" else part for part in chosen))

    def permute(self, x: Tensor, maps: Maps, weights: Tensor | None = None) -> Tensor:
        """[R, H] the rows of the experts, each times its slot's weight; 0 in padding."""
        if self.moves != "reference":
            moved: Tensor = permute_ops.moe_permute(x, maps.row_id_map, maps.inv_map, weights, self.moves)
            return moved
        rows = permute_reference.moe_permute(x, maps.row_id_map, maps.inv_map)
        if weights is None:
            return rows
        of_rows = permute_reference.moe_permute(weights.reshape(-1, 1), maps.row_id_map.reshape(-1, 1), maps.inv_map)
        return (rows.to(of_rows.dtype) * of_rows).to(x.dtype)

    def unpermute(self, rows: Tensor, maps: Maps, weights: Tensor | None = None) -> Tensor:
        """[T, H] the sum of each token's rows, weighted."""
        moved: Tensor = _call(
            permute_ops.moe_unpermute, permute_reference.moe_unpermute, self.moves, rows, maps.row_id_map, weights
        )
        return moved

    def permute_quantize(
        self, x: Tensor, maps: Maps, *, gradient: bool = False, columns: bool = False
    ) -> tuple[ScaledTensor, ScaledTensor]:
        """[R, H] the rows of the experts, and their transpose where `columns`."""
        arguments = (x, maps.row_id_map, maps.inv_map, True, columns, eps(gradient))
        found = _call(permute_ops.moe_permute_quantize, quantize_reference.moe_permute_quantize, self.moves, *arguments)
        return ScaledTensor(*found[:2]), ScaledTensor(*found[2:])

    def quantize(self, x: Tensor) -> ScaledTensor:
        """In tiles of 1 x 128."""
        arguments = (x, False, True, True, False, eps(gradient=False))
        return ScaledTensor(*_call(fp8_ops.fp8_quantize, fp8_reference.fp8_quantize, self.casts, *arguments)[:2])

    def dequantize(self, scaled: ScaledTensor, dtype: torch.dtype) -> Tensor:
        """What it stands for."""
        found: Tensor = _call(fp8_ops.fp8_dequantize, fp8_reference.fp8_dequantize, self.casts, *scaled, dtype)
        return found

    def glu(self, preact: Tensor, maps: Maps, activation: Activation, keep: bool) -> tuple[ScaledTensor, ScaledTensor]:
        """[R, I] the activation, and [R, 2I] the pre-activations where they are kept."""
        arguments = (preact, maps.inv_map, *activation, keep, eps(gradient=False))
        found = _call(ops.moe_glu_quantize, glu_reference.moe_glu_quantize, self.activations, *arguments)
        return ScaledTensor(*found[:2]), ScaledTensor(*found[2:])

    def glu_backward(
        self,
        preact: ScaledTensor,
        grad_activated: Tensor | None,
        maps: Maps,
        weights: Tensor,
        row_terms: Tensor | None,
        activation: Activation,
        needs: ops.QuantizedNeeds,
        dtype: torch.dtype,
    ) -> ops.QuantizedGradients:
        """What the gradients ask of the activation."""
        limits = (eps(gradient=False), eps(gradient=True))
        arguments = (*preact, grad_activated, maps.inv_map, weights, row_terms, *activation, *needs, *limits)
        definition = glu_reference.moe_glu_backward_quantize
        found = _call(ops.moe_glu_backward_quantize, definition, self.activations, *arguments, dtype)
        return ops.QuantizedGradients(*found)

    def product(
        self, rows: ScaledTensor, weight: ScaledTensor, maps: Maps, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[R, N] rows of each expert times its weight [N, K], transposed."""
        arguments = (*rows, *weight, maps.offsets, bias, dtype)
        definition = gemm_reference.fp8_grouped_gemm
        result: Tensor = _call(gemm_ops.fp8_grouped_gemm, definition, self.products, *arguments)
        return result

    def bias_terms(self, rows: Tensor, bias: Tensor, maps: Maps) -> Tensor:
        """[R] float32: <row, bias of its expert>."""
        arguments = (rows, bias.to(rows.dtype)[:, None, :], maps.offsets, None, torch.float32)
        terms: Tensor = _call(gemm_ops.grouped_gemm, gemm_reference.grouped_gemm, self.products, *arguments)
        return terms[:, 0]

    def row_sum(self, rows: Tensor, maps: Maps) -> Tensor:
        """[E, N] the sum of each expert's rows."""
        arguments = (rows, maps.offsets)
        result: Tensor = _call(gemm_ops.grouped_row_sum, reference.row_sum, self.products, *arguments)
        return result

    def weight_gradient(
        self, rows: Tensor, grad: Tensor, maps: Maps, weight: Tensor, accumulator: Tensor | None
    ) -> Tensor | None:
        """[E, N, K] like `weight`, of rows in a wide dtype; None with an accumulator, which takes it."""
        return self._gradient(
            (rows,), (grad,), maps, weight, accumulator,
            gemm_ops.grouped_gemm_wgrad, gemm_ops.grouped_gemm_wgrad_add_, reference.weight_gradient,
        )  # fmt: skip

    def fp8_weight_gradient(
        self, rows: ScaledTensor, grad: ScaledTensor, maps: Maps, weight: Tensor, accumulator: Tensor | None
    ) -> Tensor | None:
        """The same, of the transposes [K, R] and [N, R], in tiles of 128 rows."""
        return self._gradient(
            rows, grad, maps, weight, accumulator,
            gemm_ops.fp8_grouped_gemm_wgrad, gemm_ops.fp8_grouped_gemm_wgrad_add_, reference.fp8_weight_gradient,
        )  # fmt: skip

    def _gradient(
        self,
        rows: tuple[Tensor, ...],
        grad: tuple[Tensor, ...],
        maps: Maps,
        weight: Tensor,
        accumulator: Tensor | None,
        op: Callable[..., Any],
        add_op: Callable[..., Any],
        definition: Callable[..., Any],
    ) -> Tensor | None:
        """A weight that is a view of a parameter [E, K, N] gets its gradient in that order."""
        layout = weight if accumulator is None else accumulator
        turned = layout.stride(-1) != 1 and layout.stride(1) == 1
        operands = (*grad, *rows) if turned else (*rows, *grad)
        if accumulator is not None:
            add_op(*operands, maps.offsets, accumulator.transpose(1, 2) if turned else accumulator, self.products)
            return None
        found: Tensor = _call(op, definition, self.products, *operands, maps.offsets, weight.dtype)
        return found.transpose(1, 2) if turned else found
