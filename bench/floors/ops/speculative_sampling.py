"""Floors of speculative_sampling: B sequences, D drafts, V logits in bfloat16; S parts of a row, Q of the race."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

_SHAPE = {"B": 64, "D": 3, "V": 129280, "S": 22, "Q": 64}
_BF16 = {"target": "*bf16", "draft": "*bf16"}
_DRAFT = {"HAS_DRAFT": True, "FILTERED": False, "HAS_TEMPERATURES": False}
_WIDE = {"NEIGHBOURS": True}
_MASSES = r"FSET\.BF\.GE\.AND|MUFU\.EX2"
"""Of an element three comparisons and its e^z."""

FLOORS = (
    Floor(
        kernel="statistics_kernel",
        form="bfloat16",
        shape=_SHAPE,
        read="2*B*(2*D + 1)*V",
        written="8*B*(2*D + 1)*S",
        operations="5*B*(2*D + 1)*V",
        unit="fp32",
        programs="B*(2*D + 1)*S",
        rounds=1,
        parts=(Part(r"LDG\.E\.128", "B*(2*D + 1)*V/(256*m)", most=1),),
        where={"HAS_DRAFT": True, "GREEDY": False, "SLOTS": 256, "HAS_LENGTHS": False, **_WIDE},
        types=_BF16,
    ),
    Floor(
        kernel="filter_kernel",
        form="bfloat16, top-k and top-p of rows with few likely tokens",
        shape={**_SHAPE, "W": 8, "C": 4, "X": 4},
        read="2*B*(2*D + 1)*V",  # once from memory
        written="8*B*(2*D + 1)",
        operations="4*B*(2*D + 1)*V",
        unit="fp32",
        programs="B*(2*D + 1)",
        rounds=10,
        # One walk copies what may be kept. Before it W walks over the largest logits of the groups find its least;
        # behind it C over a tile of copies count, and X add up e^z.
        parts=(
            Part(r"STG\.E\.U16", "B*(2*D + 1)*V/(32*m)"),
            Part(r"FSET\.BF\.GE\.AND", "3*B*(2*D + 1)*(W*256*S + C*4096)/(32*m)"),
            Part(_MASSES, "4*B*(2*D + 1)*X*4096/(32*m)"),
        ),
        where={"HAS_DRAFT": True, "HAS_TOP_K": True, "HAS_TOP_P": True, "SHIFT": 16, "SLOTS": 512, **_WIDE},
        types=_BF16,
    ),
    Floor(
        kernel="filter_kernel",
        form="bfloat16, top-p of rows that keep thousands",
        shape={**_SHAPE, "X": 4},
        read="2*B*(2*D + 1)*V",
        written="8*B*(2*D + 1)",
        operations="4*B*(2*D + 1)*V",
        unit="fp32",
        programs="B*(2*D + 1)",
        rounds=14,
        # X walks over the row (of normal logits: 3 to 5) leave few tokens between their pivots, one more copies these.
        parts=(
            Part(r"STG\.E\.U16", "B*(2*D + 1)*V/(32*m)"),
            Part(_MASSES, "4*X*B*(2*D + 1)*V/(32*m)"),
        ),
        where={"HAS_DRAFT": True, "HAS_TOP_K": False, "HAS_TOP_P": True, "SHIFT": 16, "SLOTS": 512, **_WIDE},
        types=_BF16,
        finding=(
            "Where the nucleus is wide, the largest logits of groups do not bound it: about four walks over the row "
            "narrow it, each with three comparisons, counts and sums an element, before one copies the rest. A sample "
            "of the row would place the first pivots as near as two of these walks do."
        ),
    ),
    Floor(
        kernel="token_kernel",
        form="bfloat16",
        shape=_SHAPE,
        read="B*D*(16*S + 4)",
        written="B*(12*(D + 1) + 44)",
        operations="8*B*D*S",
        unit="fp32",
        programs="B",
        rounds=9,  # of each draft one for what is known of both rows, one for its logits
        where=_DRAFT,
        types=_BF16,
    ),
    Floor(
        kernel="greedy_kernel",
        form="",
        shape=_SHAPE,
        read="12*B*(D + 1)*S",
        written="B*(12*(D + 1) + 8)",
        operations="8*B*(D + 1)*S",
        unit="fp32",
        programs="B",
        rounds=5,
    ),
    Floor(
        kernel="chain_kernel",
        form="bfloat16",
        shape=_SHAPE,
        read="B*D*(16*S + 4)",
        written="B*(16*(D + 1) + 4)",
        operations="8*B*D*S",
        unit="fp32",
        programs="B",
        rounds=8,
        where=_DRAFT,
        types=_BF16,
    ),
    Floor(
        kernel="residual_kernel",
        form="bfloat16, every position open",
        shape=_SHAPE,
        read="4*B*(D - 1)*V + 16*B*(D - 1)*S",
        written="4*B*(D - 1)*S",
        operations="9*B*(D - 1)*V",
        unit="fp32",
        programs="B*(D - 1)*S",
        rounds=4,
        parts=(Part(r"LDG\.E\.128", "2*B*(D - 1)*V/(256*m)"),),
        where={"FILTERED": False, "HAS_TEMPERATURES": False, "SLOTS": 256, **_WIDE},
        types=_BF16,
    ),
    Floor(
        kernel="block_kernel",
        form="bfloat16",
        shape=_SHAPE,
        read="4*B*(D - 1)*S",
        written="B*(12*(D + 1) + 44)",
        operations="4*B*D*S",
        unit="fp32",
        programs="B",
        rounds=6,
        where=_DRAFT,
        types={"target": "*bf16"},
    ),
    Floor(
        kernel="race_kernel",
        form="bfloat16, residual",
        shape=_SHAPE,
        read="4*B*V",
        written="8*B*Q",
        operations="9*B*V",
        unit="fp32",
        programs="B*Q",
        rounds=3,
        parts=(Part(r"LDG\.E\.128", "2*B*V/(256*m)"),),
        where={**_DRAFT, "WIDTH": 8},
        types=_BF16,
    ),
    Floor(
        kernel="choose_kernel",
        form="bfloat16",
        shape=_SHAPE,
        read="8*B*Q + 2*B",
        written="12*B",
        operations="B*Q",
        unit="fp32",
        programs="B",
        rounds=3,
        where={"FILTERED": False, "HAS_TEMPERATURES": False, "WIDTH": 8, "SLOTS": 256},
        types={"target": "*bf16"},
    ),
)
