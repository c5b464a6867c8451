"""The ops that routed experts in FP8 are made of, each on its own best backend; none of them is differentiated here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.fp8_quantize import ops as fp8_ops
from grpo_kernels.grouped_gemm import ops as gemm_ops
from grpo_kernels.moe_experts import ops
from grpo_kernels.moe_experts.reference import Activation
from grpo_kernels.moe_experts.stages import Maps, Parts
from grpo_kernels.moe_permute import ops as permute_ops


def eps(gradient: bool) -> float:
    """No tile's scale is below that of a tile whose largest magnitude is this. Means over batches make gradients small.

    A function, because torch.compile takes a float of a module for an input of its graph, which a backward cannot have.
    """
    return 1e-30 if gradient else 1e-12


class Fp8Parts(NamedTuple):
    """The backends of the activation and of quantisation; moves and products have those of the plain recipe."""

    activations: str
    casts: str
    plain: Parts

    @classmethod
    def of(cls, backend: str, tensor: Tensor) -> Fp8Parts:
        """Those that data like `tensor` takes; `backend`, on which the experts run, where there is no other."""
        casts = _dispatch.resolve_part("fp8_quantize", tensor, backend)
        return cls(backend, backend if casts == "reference" else casts, Parts.of(backend, tensor))

    def permute_quantize(
        self, x: Tensor, maps: Maps, *, gradient: bool = False, columns: bool = False
    ) -> tuple[ScaledTensor, ScaledTensor]:
        """[R, H] the rows of the experts, and their transpose where `columns`."""
        arguments = (x, maps.row_id_map, maps.inv_map, True, columns, eps(gradient))
        found = permute_ops.moe_permute_quantize(*arguments, self.plain.moves)
        return ScaledTensor(*found[:2]), ScaledTensor(*found[2:])

    def quantize(self, x: Tensor) -> ScaledTensor:
        """In tiles of 1 x 128."""
        return ScaledTensor(*fp8_ops.fp8_quantize(x, False, True, True, False, eps(gradient=False), self.casts)[:2])

    def dequantize(self, scaled: ScaledTensor, dtype: torch.dtype) -> Tensor:
        """What it stands for."""
        found: Tensor = fp8_ops.fp8_dequantize(*scaled, dtype, self.casts)
        return found

    def glu(self, preact: Tensor, maps: Maps, activation: Activation, keep: bool) -> tuple[ScaledTensor, ScaledTensor]:
        """[R, I] the activation, and [R, 2I] the pre-activations where they are kept."""
        arguments = (preact, maps.inv_map, *activation, keep, eps(gradient=False))
        found = ops.moe_glu_quantize(*arguments, self.activations)
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
        arguments = (*preact, grad_activated, maps.inv_map, weights, row_terms, *activation, *needs, *limits, dtype)
        return ops.QuantizedGradients(*ops.moe_glu_backward_quantize(*arguments, self.activations))

    def product(
        self, rows: ScaledTensor, weight: ScaledTensor, maps: Maps, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[R, N] rows of each expert times its weight [N, K], transposed."""
        arguments = (*rows, *weight, maps.offsets, bias, dtype)
        result: Tensor = gemm_ops.fp8_grouped_gemm(*arguments, self.plain.products)
        return result
