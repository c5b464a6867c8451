"""How verify_draft's filters pick the few logits of a row that can be kept, so that a search need not read all of it."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.speculative_sampling._tiles_triton import load_logits


@triton.jit
def put(own, place, x, least, beyond, STEP: tl.constexpr):
    """Stores what is in [least, beyond) of each slot of a tile, from the slot's place on; the places behind."""
    if x.shape[1] == 1:
        x = tl.reshape(x, (x.shape[0],))
        keep = (x.to(tl.float32) >= least) & (x.to(tl.float32) < beyond)
        tl.store(own + place, x, mask=keep)
        place += tl.where(keep, STEP, 0)
    else:
        # Halves of a thread's own elements: the store of a whole tile would exchange them through shared memory first.
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        place = put(own, put(own, place, a, least, beyond, STEP), b, least, beyond, STEP)
    return place


@triton.jit
def gather(
    row, vocab, own, least, beyond, ROOM: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Copies the logits in [least, beyond) to `own` [ROOM / SLOTS, SLOTS], each to the column of its slot, -inf behind a
    column's last. The length of the copy, whole tiles; 0 if it does not hold all of them."""
    slot = tl.arange(0, SLOTS)
    place = slot
    # A column that goes beyond this has room for the tile that it does so in, and takes no more.
    full = ROOM - WIDTH * SLOTS
    tl.debug_barrier()  # all threads have read what `own` held
    following = load_logits(row, 0, vocab, SLOTS, WIDTH, NEIGHBOURS)
    for start in range(0, vocab, SLOTS * WIDTH):
        x = following.to(own.dtype.element_ty)
        following = load_logits(row, start + SLOTS * WIDTH, vocab, SLOTS, WIDTH, NEIGHBOURS)
        place = put(own, place, x, tl.where(place - slot <= full, least, float("inf")), beyond, SLOTS)
    length = tl.cdiv(tl.max(place - slot, axis=0), SLOTS * WIDTH) * (SLOTS * WIDTH)
    for first in range(0, length, SLOTS):
        tl.store(own + first + slot, float("-inf"), mask=first + slot >= place)
    tl.debug_barrier()
    return tl.where(length <= full, length, 0)
