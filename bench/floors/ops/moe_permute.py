"""Floors of moe_permute: T tokens of width H in bfloat16, K slots each, E experts; C blocks share a map."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

_SHAPE = {"T": 8192, "K": 8, "H": 7168}
_MAP = {"T": 4096, "K": 8, "E": 256, "C": 32}
_BF16 = {"x": "*bf16"}
_STORES = Part(r"STG\.E\.128", "T*K*H/(256*m)", level=None)

FLOORS = (
    Floor(
        kernel="count_tiles_kernel",
        form="int32 ids",
        shape=_MAP,
        read="4*T*K",
        written="4*C*E",
        operations="0",
        unit="fp32",
        programs="C",
        rounds=2,
        parts=(Part(r"LDG\..*", "T*K/32", loop=r"MATCH\..*", most=1),),
        threads=256,
    ),
    Floor(
        kernel="place_slots_kernel",
        form="int32 ids",
        shape=_MAP,
        read="4*T*K + 4*C*E",
        written="8*T*K + 8*E",
        operations="0",
        unit="fp32",
        programs="C",
        rounds=4,
        parts=(Part(r"LDG\..*", "2*T*K/32", loop=r"MATCH\..*", most=1),),  # the slots are gone through twice
        threads=256,
    ),
    Floor(
        kernel="permute_kernel",
        form="bfloat16",
        shape=_SHAPE,
        read="2*T*H + 8*T*K",
        written="2*T*K*H",
        operations="0",
        unit="fp32",
        programs="T*ceil(H/1024)",
        rounds=2,
        parts=(_STORES,),
        where={"WEIGHTED": False, "SLOTS": 8, "BLOCK": 1024},
        types=_BF16,
    ),
    Floor(
        kernel="unpermute_kernel",
        form="bfloat16, weights",
        shape=_SHAPE,
        read="2*T*K*H + 8*T*K",
        written="2*T*H",
        operations="2*T*K*H",
        unit="fp32",
        programs="T*ceil(H/1024)",
        rounds=2,
        parts=(Part(r"LDG\.E\.128", "T*K*H/(256*m)", level=None),),
        where={"WEIGHTED": True, "SLOTS": 8, "BLOCK": 1024},
        types={"y": "*bf16"},
    ),
    Floor(
        kernel="unpermute_backward_kernel",
        form="bfloat16",
        shape=_SHAPE,
        read="2*T*H + 2*T*K*H + 12*T*K",
        written="2*T*K*H + 4*T*K",
        operations="3*T*K*H",
        unit="fp32",
        programs="T",
        rounds=2,
        parts=(Part(r"STG\.E\.128", "T*K*H/(256*m)"),),
        where={"SLOTS": 8, "LANES": 128, "NEIGHBOURS": True},
        types={"grad": "*bf16"},
    ),
    Floor(
        kernel="permute_quantize_kernel",
        form="bfloat16, 1x128",
        shape=_SHAPE,
        read="2*T*H + 8*T*K",
        written="T*K*(H + 4*ceil(H/128))",
        operations="3*T*H",
        unit="fp32",
        programs="T*ceil(H/1024)",
        rounds=2,
        parts=(Part(r"STG\.E\.128", "T*K*H/(512*m)", level=None),),
        where={"POWER_OF_TWO": True, "SLOTS": 8, "TILES": 8},
        types=_BF16,
    ),
    Floor(
        kernel="gather_quantize_kernel",
        form="bfloat16, 1x128 and the transpose",
        shape=_SHAPE,
        read="2*T*H + 4*T*K",  # tokens once: 117 MB, of which the L2 cache keeps a part
        written="2*T*K*H + 4*T*K*ceil(H/128) + 4*H*ceil(T*K/128)",
        operations="6*T*K*H",
        unit="fp32",
        programs="ceil(T*K/128)*ceil(H/128)",
        rounds=2,
        parts=(Part(r"LDG\.E\.128", "T*K*H/(256*m)", level=None),),
        where={"POWER_OF_TWO": True},
        types=_BF16,
        finding=(
            "16 ALU instructions an element: more than 5 find the largest magnitudes of both directions as integers of "
            "32 bits, 2.5 put codes of the transpose together that come from shared memory a byte at a time, and 2 "
            "clamp what the conversion to e4m3 saturates by itself: without them 12 % less."
        ),
    ),
)
