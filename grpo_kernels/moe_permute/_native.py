"""The permutation through the C++ kernels, the map on CPU and CUDA, the moves on the CPU: allocates and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, pointer
from grpo_kernels.moe_permute._quantize_native import moe_permute_quantize
from grpo_kernels.moe_permute.layout import dense_rows, raise_outside
from grpo_kernels.moe_permute.maps import check_maps, check_rows
from grpo_kernels.moe_permute.ops import accumulation_dtype, empty_gradients, empty_maps, empty_rows, empty_tokens

__all__ = ["build_permutation", "moe_permute", "moe_permute_quantize", "moe_unpermute", "moe_unpermute_backward"]

_CPU_TILE = 8192  # slots; below that a second thread costs more than it brings
_CUDA_TILE = 1024
_CUDA_TILES = 128  # each of them reads the counts of all


def _tiles(slots: int, execution: tuple[int, int]) -> int:
    """Parts that the slots are cut into. The map does not depend on it."""
    if execution[0] >= 0:
        return max(1, min(_CUDA_TILES, -(-slots // _CUDA_TILE)))
    return max(1, min(4 * execution[1], slots // _CPU_TILE)) if execution[1] > 1 else 1


def build_permutation(
    topk_ids: Tensor, num_experts: int, first: int, last: int, alignment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maps = empty_maps(topk_ids, num_experts, first, last, alignment)
    ids = topk_ids.contiguous()
    execution = _extension.execution(ids)
    tiles = _tiles(ids.numel(), execution)
    workspace = ids.new_empty(tiles * (last - first), dtype=torch.int32)
    bad_slot = _extension.extension().build_permutation(
        ids.data_ptr(),
        ids.dtype == torch.int64,
        ids.numel(),
        num_experts,
        first,
        last,
        alignment,
        maps[1].shape[0],
        tiles,
        workspace.data_ptr(),
        *(tensor.data_ptr() for tensor in maps),
        *execution,
    )
    if bad_slot >= 0:
        raise_outside(topk_ids, bad_slot, num_experts)
    return maps


def _weights(topk_weights: Tensor | None, like: Tensor) -> Tensor | None:
    return None if topk_weights is None else topk_weights.to(accumulation_dtype(like)).contiguous()


def _moved(
    values: Tensor, tokens: int, rows: int, row_id_map: Tensor, weights: Tensor | None
) -> tuple[int, int, int, int, int, int, int]:
    """What the moves have in common; `values` are tokens or rows."""
    sizes = (tokens, values.shape[1], rows, row_id_map.shape[1])
    return DTYPE_CODE[values.dtype], *sizes, row_id_map.data_ptr(), pointer(weights)


def moe_permute(x: Tensor, row_id_map: Tensor, inv_map: Tensor, topk_weights: Tensor | None) -> Tensor:
    out = empty_rows(x, row_id_map, inv_map, topk_weights)
    x, weights = dense_rows(x), _weights(topk_weights, x)
    row_id_map, inv_map = row_id_map.contiguous(), inv_map.contiguous()
    fault = _extension.extension().moe_permute(
        _moved(x, x.shape[0], inv_map.shape[0], row_id_map, weights),
        x.data_ptr(),
        x.stride(0),
        inv_map.data_ptr(),
        out.data_ptr(),
        *_extension.execution(x),
    )
    if fault >= 0:
        check_maps("moe_permute", row_id_map, inv_map)
    return out


def moe_unpermute(y: Tensor, row_id_map: Tensor, topk_weights: Tensor | None) -> Tensor:
    out = empty_tokens(y, row_id_map, topk_weights)
    y, weights = dense_rows(y), _weights(topk_weights, y)
    row_id_map = row_id_map.contiguous()
    fault = _extension.extension().moe_unpermute(
        _moved(y, out.shape[0], y.shape[0], row_id_map, weights),
        y.data_ptr(),
        y.stride(0),
        out.data_ptr(),
        *_extension.execution(y),
    )
    if fault >= 0:
        check_rows("moe_unpermute", row_id_map, y.shape[0])
    return out


def moe_unpermute_backward(
    grad: Tensor, y: Tensor, row_id_map: Tensor, inv_map: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor]:
    grad_y, grad_weights = empty_gradients(grad, y, row_id_map, inv_map, topk_weights)
    grad, y, weights = dense_rows(grad), dense_rows(y), _weights(topk_weights, y)
    row_id_map, inv_map = row_id_map.contiguous(), inv_map.contiguous()
    fault = _extension.extension().moe_unpermute_backward(
        _moved(y, grad.shape[0], inv_map.shape[0], row_id_map, weights),
        grad.data_ptr(),
        grad.stride(0),
        y.data_ptr(),
        y.stride(0),
        inv_map.data_ptr(),
        grad_y.data_ptr(),
        grad_weights.data_ptr(),
        *_extension.execution(y),
    )
    if fault >= 0:
        check_maps("moe_unpermute", row_id_map, inv_map)
    return grad_y, grad_weights
