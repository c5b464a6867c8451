"""The public function that moves and quantises: argument checks and the choice of a backend."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from grpo_kernels import _checks, _dispatch
from grpo_kernels.fp8_quantize.api import ScaledTensor
from grpo_kernels.fp8_quantize.arguments import check_options
from grpo_kernels.fp8_quantize.layout import TILE
from grpo_kernels.moe_permute import ops, quantize_reference
from grpo_kernels.moe_permute.api import Permutation, check_rows
from grpo_kernels.moe_permute.maps import readable


@overload
def moe_permute_quantize(
    x: Tensor,
    permutation: Permutation,
    *,
    power_of_two_scales: bool = ...,
    eps: float = ...,
    transpose: Literal[False] = ...,
) -> ScaledTensor: ...


@overload
def moe_permute_quantize(
    x: Tensor,
    permutation: Permutation,
    *,
    power_of_two_scales: bool = ...,
    eps: float = ...,
    transpose: Literal["both"],
) -> tuple[ScaledTensor, ScaledTensor]: ...


def moe_permute_quantize(
    x: Tensor,
    permutation: Permutation,
    *,
    power_of_two_scales: bool = True,
    eps: float = 1e-12,
    transpose: Literal[False, "both"] = False,
) -> ScaledTensor | tuple[ScaledTensor, ScaledTensor]:
    """`fp8_quantize(moe_permute(x, permutation))` in one pass: the rows of the experts in e4m3, in tiles of 1 x 128.

    A token is read and quantised once, and its bytes are written into its rows; the rows in the dtype of x are never
    formed.

    Args:
        x: [T, H] bf16, fp16, fp32 or fp64. A view with a dense last axis is not copied.
        permutation: of these T tokens, from `build_permutation`.
        power_of_two_scales, eps: as in `fp8_quantize`.
        transpose: "both" also gives the transpose, [H, R], quantised from x in tiles of 128 rows of one column: the
            operand of the weights' gradient. It wants an alignment of the permutation that is a multiple of 128, so
            that no tile has rows of two experts.

    Returns:
        `ScaledTensor(data [R, H], scale [R, ceil(H / 128)])`, in the memory formats of `fp8_quantize`; for "both" also
        the one of the transpose. Padding rows are 0, with the scale of a tile of zeros. No gradient: of an input that
        requires one the values are taken.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; for "both" also where R is
            not a multiple of 128 or, on the CPU, an expert's segment does not end at one. On the CPU also where the
            maps do not belong together; on other devices an entry beyond R or T * K counts as -1.

    Numerics:
        The bits of the two functions called one after the other, on every device. NaN or an infinity makes its tile
        NaN, in all rows of its token; in the transpose that of 128 rows. No host synchronisation.

    Source:
        DeepSeek-V3 (arXiv 2412.19437), section 3.3: tokens are quantised before they go to their experts.
    """
    op = "moe_permute_quantize"
    check_rows(op, "x", x, permutation, "[T, H]", "row_id_map")
    check_options(op, power_of_two_scales, transpose, (False, "both"), eps)
    columns = transpose == "both"
    if columns:
        _check_alignment(op, permutation)
    x = x.detach()
    arguments = (x, permutation.row_id_map, permutation.inv_map, power_of_two_scales, columns, float(eps))
    backend = _dispatch.resolve(op, x)
    if backend == "reference":
        outputs = quantize_reference.moe_permute_quantize(*arguments)
    else:
        outputs = ops.moe_permute_quantize(*arguments, backend)
    plain = ScaledTensor(*outputs[:2])
    return (plain, ScaledTensor(*outputs[2:])) if columns else plain


def _check_alignment(op: str, permutation: Permutation) -> None:
    """Raises where the segments are seen not to be multiples of a tile."""
    rows, offsets = permutation.inv_map.shape[0], permutation.offsets
    wanted = f"{op}: permutation must have an alignment that is a multiple of {TILE} for transpose='both'"
    if rows % TILE:
        raise ValueError(f"{wanted}, got R = {rows}")
    _checks.check_tensor(op, "permutation.offsets", offsets)
    if readable(offsets) and bool((offsets % TILE).any()):
        raise ValueError(f"{wanted}, got offsets {offsets.tolist()[:8]} ...")
