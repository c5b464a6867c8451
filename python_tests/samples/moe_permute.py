"""Samples of build_permutation, moe_permute, moe_permute_quantize and moe_unpermute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import Permutation
from grpo_kernels.moe_permute import reference
from python_tests.samples import BadCall, Call

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.tensor([[3, 0], [0, 5], [-1, 3], [3, 3], [5, -1]])  # 6 experts, some of them empty; slots without one
X = torch.randn(5, 7, generator=GENERATOR)
WEIGHTS = torch.rand(5, 2, generator=GENERATOR)
MAPS = reference.build_permutation(IDS, 6, 0, 6, 2)
ROW_MAP, INV_MAP = MAPS[:2]
Y = torch.randn(INV_MAP.shape[0], 7, generator=GENERATOR)
Y[INV_MAP < 0] = float("nan")
NOTHING = (ROW_MAP[:0], INV_MAP[:0])
WIDE = torch.randn(5, 144, generator=GENERATOR)
SPOILED = WIDE.bfloat16()
SPOILED[3, 130] = float("inf")
TILES = reference.build_permutation(IDS, 6, 0, 6, 128)

OPS = {
    "build_permutation": [
        (IDS, 6, 0, 6, 1),
        (IDS.int().T.contiguous().T, 8, 2, 6, 4),
        (IDS[:0], 6, 0, 6, 8),
        (IDS, 6, 3, 3, 8),
    ],
    "moe_permute": [
        (X, ROW_MAP, INV_MAP, None),
        (torch.randn(5, 9, generator=GENERATOR)[:, 1:8].bfloat16(), ROW_MAP, INV_MAP, WEIGHTS),
        (X.double(), ROW_MAP, INV_MAP, WEIGHTS),
        (X[:0], *NOTHING, None),
    ],
    "moe_permute_quantize": [
        (WIDE.bfloat16(), ROW_MAP, INV_MAP, True, False, 1e-12),
        (WIDE.double()[:, 1:], *TILES[:2], False, True, 1e-6),
        (X[:0], *NOTHING, True, True, 1e-12),
    ],
    "moe_unpermute": [
        (Y, ROW_MAP, None),
        (Y.half(), ROW_MAP, WEIGHTS),
        (Y.double(), ROW_MAP, WEIGHTS.double()),
        (Y[:0], ROW_MAP[:0], WEIGHTS[:0]),
    ],
    "moe_unpermute_backward": [
        (X, Y, ROW_MAP, INV_MAP, WEIGHTS),
        (X[:1].expand(5, 7).bfloat16(), Y.bfloat16(), ROW_MAP, INV_MAP, WEIGHTS),
        (X.double(), Y.double(), ROW_MAP, INV_MAP, WEIGHTS.double()),
        (X[:0], Y[:0], *NOTHING, WEIGHTS[:0]),
    ],
}


def layer(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Tokens to rows, an expert that squares, and back."""
    permutation = grpo_kernels.build_permutation(ids, 6, alignment=2)
    rows = grpo_kernels.moe_permute(x, permutation)
    return grpo_kernels.moe_unpermute(rows * rows, permutation, weights)


def moves(device: str, dtype: torch.dtype, top: int = 5) -> tuple[Any, ...]:
    """Rows of tokens and of experts, weights and a map, with which the moves go anywhere without the map's kernel."""
    row_id_map, inv_map = (MAPS[0], MAPS[1]) if top else NOTHING
    rows = Y.nan_to_num(0.5)[: inv_map.shape[0]]
    values = (X[:top].to(dtype), rows.to(dtype), WEIGHTS[:top], row_id_map, inv_map, *MAPS[2:])
    return tuple(value.to(device) for value in values)


def there_and_back(x: Tensor, y: Tensor, weights: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    permutation = Permutation(*maps)
    rows = grpo_kernels.moe_permute(x, permutation)
    plain = grpo_kernels.moe_unpermute(y, permutation)
    return rows, plain, grpo_kernels.moe_unpermute(y, permutation, weights)


def quantized(x: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    """Rows, and the same with their transpose."""
    permutation = Permutation(*maps)
    plain, transposed = grpo_kernels.moe_permute_quantize(x, permutation, power_of_two_scales=False, transpose="both")
    return (*grpo_kernels.moe_permute_quantize(x, permutation, eps=1e-6), *plain, *transposed)


CALLS = [
    Call("layer", layer, lambda device: (X.to(device), WEIGHTS.to(device), IDS.to(device)), (0, 1)),
    Call("moves_bf16", there_and_back, lambda device: moves(device, torch.bfloat16), (0, 1, 2), rounds=torch.bfloat16),
    Call("moves_nothing", there_and_back, lambda device: moves(device, torch.float32, 0), (0, 1, 2)),
    Call("quantized_bf16", quantized, lambda device: tuple(t.to(device) for t in (SPOILED, *TILES))),
    Call(
        "map_of_a_rank",
        lambda ids: tuple(grpo_kernels.build_permutation(ids, 6, alignment=4, expert_range=(2, 6))),
        lambda device: (IDS.int().to(device),),
    ),
]

_MAP = Permutation(*MAPS)


def _bad_map(
    name: str, error: type[Exception], *says: str, ids: Any = IDS, experts: Any = 6, **options: Any
) -> BadCall:
    call = lambda: grpo_kernels.build_permutation(ids, experts, **options)  # noqa: E731
    return BadCall(f"build_permutation_{name}", call, error, says)


def _bad_move(name: str, error: type[Exception], *says: str, x: Any = X, permutation: Any = _MAP) -> BadCall:
    return BadCall(f"moe_permute_{name}", lambda: grpo_kernels.moe_permute(x, permutation), error, says)


def _bad_tiles(
    name: str, error: type[Exception], *says: str, x: Any = X, permutation: Any = _MAP, **options: Any
) -> BadCall:
    call = lambda: grpo_kernels.moe_permute_quantize(x, permutation, **options)  # noqa: E731
    return BadCall(f"moe_permute_quantize_{name}", call, error, says)


def _bad_sum(name: str, error: type[Exception], *says: str, y: Any = Y, weights: Any = None) -> BadCall:
    return BadCall(f"moe_unpermute_{name}", lambda: grpo_kernels.moe_unpermute(y, _MAP, weights), error, says)


BAD_CALLS = [
    _bad_map("list", TypeError, "topk_ids must be a torch.Tensor, got list", ids=[[1]]),
    _bad_map("dtype", TypeError, "topk_ids must have dtype int64, int32, got int16", ids=IDS.short()),
    _bad_map("ndim", ValueError, "topk_ids must have shape [T, K], got [10]", ids=IDS.view(-1)),
    _bad_map("experts", ValueError, "num_experts must be >= 1, got 0", experts=0),
    _bad_map("many_experts", ValueError, "num_experts must be <= 1024, got 1025", experts=1025),
    _bad_map("alignment", ValueError, "alignment must be >= 1, got 0", alignment=0),
    _bad_map("float_alignment", TypeError, "alignment must be an int, got float", alignment=8.0),
    _bad_map("range_type", TypeError, "expert_range must be a pair (start, end), got 3", expert_range=3),
    _bad_map("range_order", ValueError, "expert_range[1] must be >= 4, got 2", expert_range=(4, 2)),
    _bad_map("range_end", ValueError, "expert_range must end at num_experts = 6 at most", expert_range=(4, 7)),
    _bad_map("rows", ValueError, "T * K and R must be < 2^31, got 10 and", alignment=2**30),
    _bad_map(
        "slots",
        ValueError,
        "T * K and R must be < 2^31, got 2147483648",
        ids=torch.empty(1 << 27, 16, dtype=torch.int32, device="meta"),
    ),
    _bad_map("id", ValueError, "topk_ids[1, 1] must be < num_experts = 5, or negative", "got 5", experts=5),
    _bad_move("type", TypeError, "x must be a torch.Tensor, got list", x=[1.0]),
    _bad_move("dtype", TypeError, "x must have dtype", "got int64", x=X.long()),
    _bad_move("ndim", ValueError, "x must have shape [T, H], got [5]", x=X[:, 0]),
    _bad_move("tokens", ValueError, "x must have shape [T, H] = [5, 7], got [4, 7]", x=X[:4]),
    _bad_move("tuple", TypeError, "permutation must be a Permutation, got tuple", permutation=tuple(_MAP)),
    _bad_move(
        "map_dtype",
        TypeError,
        "permutation.inv_map must have dtype int32, got int64",
        permutation=_MAP._replace(inv_map=INV_MAP.long()),
    ),
    _bad_move(
        "map_device",
        ValueError,
        "permutation.row_id_map must be on cpu like x, got meta",
        permutation=_MAP._replace(row_id_map=ROW_MAP.to("meta")),
    ),
    _bad_tiles("dtype", TypeError, "moe_permute_quantize: x must have dtype", "got int64", x=X.long()),
    _bad_tiles("tokens", ValueError, "x must have shape [T, H] = [5, 7], got [4, 7]", x=X[:4]),
    _bad_tiles("tuple", TypeError, "permutation must be a Permutation, got tuple", permutation=tuple(_MAP)),
    _bad_tiles("transpose", ValueError, "transpose must be one of False, 'both', got True", transpose=True),
    _bad_tiles("power", TypeError, "power_of_two_scales must be a bool, got int", power_of_two_scales=1),
    _bad_tiles("eps", ValueError, "eps must be finite and >= 1e-30 and <= 1, got 0.0", eps=0.0),
    _bad_tiles(
        "alignment",
        ValueError,
        "permutation must have an alignment that is a multiple of 128",
        "R = 16",
        transpose="both",
    ),
    _bad_tiles(
        "segments",
        ValueError,
        "permutation must have an alignment that is a multiple of 128",
        "got offsets [64, ",
        permutation=Permutation(*reference.build_permutation(IDS, 6, 0, 6, 64)),
        transpose="both",
    ),
    _bad_sum("rows", ValueError, "y must have shape [R, H] = [", "got [5, 7]", y=X),
    _bad_sum("weights", ValueError, "topk_weights must have shape [T, K] = [5, 2], got [5]", weights=WEIGHTS[:, 0]),
    _bad_sum("weights_dtype", TypeError, "topk_weights must have dtype", "got int64", weights=IDS),
    _bad_sum("weights_type", TypeError, "topk_weights must be a torch.Tensor, got float", weights=1.0),
    _bad_sum("weights_device", ValueError, "topk_weights must be on cpu like y, got meta", weights=WEIGHTS.to("meta")),
]
