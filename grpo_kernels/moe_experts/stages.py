"""The ops that routed experts are made of, each on its own best backend; none of them is differentiated here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.grouped_gemm import function as grouped
from grpo_kernels.grouped_gemm import ops as gemm_ops
from grpo_kernels.moe_experts.arguments import raise_if_no_expert
from grpo_kernels.moe_experts.reference import exact_dtype
from grpo_kernels.moe_permute import ops as permute_ops
from grpo_kernels.moe_permute import reference as permute_reference


class Maps(NamedTuple):
    """Where the rows of the experts are: three tensors of a `Permutation`."""

    row_id_map: Tensor
    inv_map: Tensor
    offsets: Tensor


class Parts(NamedTuple):
    """The backends of the moves and of the products."""

    moves: str
    products: str

    @classmethod
    def of(cls, backend: str, tensor: Tensor) -> Parts:
        """Those that data like `tensor` takes; `backend`, on which the experts run, where there is no other."""
        chosen = (_dispatch.resolve_part(op, tensor, backend) for op in ("moe_permute", "grouped_gemm"))
        return cls(*(backend if part == "reference" else part for part in chosen))

    def permute(self, x: Tensor, maps: Maps, weights: Tensor | None = None) -> Tensor:
        """[R, H] the rows of the experts, each times its slot's weight; 0 in padding."""
        moved: Tensor = permute_ops.moe_permute(x, maps.row_id_map, maps.inv_map, weights, self.moves)
        return moved

    def unpermute(self, rows: Tensor, maps: Maps, weights: Tensor | None = None) -> Tensor:
        """[T, H] the sum of each token's rows, weighted."""
        moved: Tensor = permute_ops.moe_unpermute(rows, maps.row_id_map, weights, self.moves)
        return moved

    def product(
        self, rows: Tensor, weight: Tensor, maps: Maps, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[R, N] rows of each expert times its weight [N, K], transposed."""
        result: Tensor = gemm_ops.grouped_gemm(rows, weight, maps.offsets, bias, dtype or rows.dtype, self.products)
        return result

    def bias_terms(self, rows: Tensor, bias: Tensor, maps: Maps) -> Tensor:
        """[R] <row, its expert's bias>: what the bias adds to the gradient of a weight."""
        columns = bias.to(rows.dtype)[:, None, :]
        return self.product(rows, columns, maps, dtype=exact_dtype(rows.dtype))[:, 0]

    def weight_gradient(
        self,
        rows: Tensor | ScaledTensor,
        grad: Tensor | ScaledTensor,
        maps: Maps,
        weight: Tensor,
        accumulator: Tensor | None,
    ) -> Tensor | None:
        """[E, N, K] like `weight`; None with an accumulator, which takes it. ScaledTensors are the transposes."""
        return grouped.weight_gradient(rows, grad, maps.offsets, weight, accumulator, self.products)

    def row_sum(self, rows: Tensor, maps: Maps) -> Tensor:
        """[E, N] the sum of each expert's rows."""
        result: Tensor = gemm_ops.grouped_row_sum(rows, maps.offsets, self.products)
        return result


def build_maps(topk_ids: Tensor, num_experts: int, expert_range: tuple[int, int], alignment: int, backend: str) -> Maps:
    """The maps of the experts of a range."""
    chosen = _dispatch.resolve_part("build_permutation", topk_ids, backend)
    arguments = (topk_ids, num_experts, *expert_range, alignment)
    if chosen == "reference":
        raise_if_no_expert(topk_ids, num_experts)
        return Maps(*permute_reference.build_permutation(*arguments)[:3])
    try:
        return Maps(*permute_ops.build_permutation(*arguments, chosen)[:3])
    except ValueError:  # it has looked at the ids, and names itself
        raise_if_no_expert(topk_ids, num_experts)
        raise
