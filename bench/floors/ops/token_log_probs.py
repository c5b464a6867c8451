"""Floors of token_log_probs: N rows of V logits of b bytes. A row is read once, and its gradient written once."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

_SHAPE = {"N": 4096, "V": 151936}
_PLAIN = {"TEMPERATURE": 0, "CAPPED": False, "ENTROPY": True}
_FORWARD = {**_PLAIN, "SQUARED": False, "TOP1": False, "STATISTICS": True}
_BACKWARD = {**_PLAIN, "LOG_SUM_EXP": False}


def _floors(form: str, logits: str, element: int, vocab: int, loads: Part) -> tuple[Floor, Floor]:
    shape = {**_SHAPE, "V": vocab, "b": element, "S": 512 * 16 // element}
    types, wide = {"logits": logits}, {"SLOTS": 512, "NEIGHBOURS": vocab % 16 == 0}
    forward = Floor(
        kernel="forward_kernel",
        form=f"{form}, entropy",
        shape=shape,
        read="b*N*V + 8*N",
        written="24*N",  # log-prob, entropy, and four statistics
        operations="8*N*V",  # scale, maximum, difference, exponential, and a multiply-add and an addition of sums
        unit="fp32",
        programs="N",
        rounds=3,
        parts=(loads,),
        where={**_FORWARD, **wide},
        types=types,
    )
    backward = Floor(
        kernel="backward_kernel",
        form=f"{form}, entropy",
        shape=shape,
        read="b*N*V + 28*N",
        written="b*N*V",
        operations="8*N*V",
        unit="fp32",
        programs="N*ceil(V/(4*S))",
        rounds=3,
        parts=(loads,),
        where={**_BACKWARD, **wide},
        types=types,
    )
    return forward, backward


_WIDE = Part(r"LDG\.E\.128", "N*V*b/(512*m)", most=1)

FLOORS = (
    *_floors("bfloat16", "*bf16", 2, 151936, _WIDE),
    *_floors("float32", "*fp32", 4, 151936, _WIDE),
    *_floors("bfloat16, rows that are not aligned", "*bf16", 2, 50257, Part(r"LDG\.E\.U16", "N*V/(32*m)", most=8)),
)
