"""Floors of moe_router: T tokens, E experts of which K are chosen, bfloat16 logits; C chunks of 16 tokens."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

_SHAPE = {"T": 4096, "E": 256, "K": 8, "C": 256}

FLOORS = (
    Floor(
        kernel="route_kernel",
        form="bfloat16, softmax or sigmoid with bias and groups",
        shape=_SHAPE,
        read="2*T*E + 4*E",
        written="8*T*K + 4*C*E",
        operations="6*T*E",
        unit="fp32",
        programs="C",
        rounds=3,  # logits, the chosen logits again, the counters
        # A token with scores of its logits, and the K turns of its selection.
        parts=(Part(r"MUFU\.RCP|LDG\.E\.128", "T", loop=r"ATOMS\..*", most=9), Part(r"REDUX\..*", "T*K", most=1)),
        symbol="ILi8E",
        threads=512,
        finding=(
            "The K turns of the selection are 57 % of a token's instructions, 64 each, over all of a lane's experts. "
            "Lanes that sort theirs once would need about a third of them a turn: 1 us less, of the 8 that both "
            "launches may take."
        ),
    ),
    Floor(
        kernel="sum_kernel",
        form="no losses",
        shape=_SHAPE,
        read="4*C*E + 8*C",
        written="4*E",
        operations="0",
        unit="fp32",
        programs="ceil(E/32)",
        rounds=2,
        threads=1024,
    ),
    Floor(
        kernel="gradient_kernel",
        form="bfloat16",
        shape=_SHAPE,
        read="2*T*E + 12*T*K",
        written="2*T*E",
        operations="6*T*E",
        unit="fp32",
        programs="ceil(T/8)",
        rounds=2,
        parts=(Part(r"STG\.E\.128", "T", level=None, most=1),),
        symbol="ILi8E",
        threads=256,
    ),
)
