"""Floors of linear_log_probs: N rows of width H, V tokens, S splits of the vocabulary, tiles of 128 x 256."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

_SHAPE = {"N": 8192, "H": 4096, "V": 128256, "S": 126}
_PLAIN = {
    "TMA": True, "HAS_BIAS": False, "PARTS": 0, "TEMPERATURE": 0, "CAPPED": False, "ENTROPY": True, "BLOCK_N": 256,
}  # fmt: skip
_TYPES = {"hidden": "*bf16"}
# A warp goes through the k-loop for its part of every tile, and once through what follows. Both groups of four warps
# wait for the same products: nothing runs on the tensor cores meanwhile.
_PRODUCT = Part(r"HGMMA\..*", "ceil(N/128)*ceil(V/256)*8*H/16/m")
_REST = Part(r"MUFU\.EX2", "ceil(N/128)*ceil(V/256)*8", without=r"HGMMA\..*", exposed=True)
_EXPOSED = (
    "The tensor cores wait while a tile of logits is reduced: both groups of warps share a tile. With a tile each, and "
    "warps of their own for loads, one would reduce while the other multiplies."
)

FLOORS = (
    Floor(
        kernel="forward_kernel",
        form="bfloat16, entropy",
        shape=_SHAPE,
        read="2*N*H + 2*V*H + 9*N",
        written="12*N*S + 4*N",
        operations="2*N*H*V",
        unit="bf16",
        programs="132",
        rounds=3,
        parts=(_PRODUCT, _REST),
        where={**_PLAIN, "SQUARED": False, "TOP1": False},
        finding=_EXPOSED,
        types=_TYPES,
    ),
    Floor(
        kernel="merge_kernel",
        form="entropy",
        shape=_SHAPE,
        read="12*N*S + 13*N",
        written="24*N",
        operations="8*N*S",
        unit="fp32",
        programs="ceil(N/4)",
        rounds=3,
        parts=(Part(r"LDG\.E(\.\d+)?", "ceil(N/4)*4", level=None),),
        where={"TEMPERATURE": 0, "ENTROPY": True, "SQUARED": False, "TOP1": False, "STATISTICS": True},
    ),
    Floor(
        kernel="dlogits_kernel",
        form="bfloat16, entropy",
        shape=_SHAPE,
        read="2*N*H + 2*V*H + 33*N",
        written="2*N*V",
        operations="2*N*H*V",
        unit="bf16",
        programs="132",
        rounds=3,
        parts=(_PRODUCT, _REST),
        where={**_PLAIN, "LOG_PROBS": True, "LOG_SUM_EXP": False},
        finding=_EXPOSED,
        types=_TYPES,
    ),
)
