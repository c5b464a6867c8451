"""The Triton kernels of the experts' activation."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels._math_triton import LOG2E

BLOCK = 128  # columns at a time
WARPS = 4


def rows_of_program(element_size: int, interleaved: bool) -> int:
    """As many as give a thread 16 bytes of gates, or of pairs: all its loads and stores then cut the tile alike. It does
    not depend on the batch, and so a row's bits do not depend on the other rows."""
    return WARPS * 32 * 16 // element_size // (2 if interleaved else 1) // BLOCK


@triton.jit
def _halves(pairs, ELEMENT: tl.constexpr):
    """The lower and the upper value of integers that hold two neighbours in memory."""
    BITS: tl.constexpr = ELEMENT.primitive_bitwidth
    INTEGER: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    lower = pairs.to(INTEGER).to(ELEMENT, bitcast=True)
    upper = (pairs >> BITS).to(INTEGER).to(ELEMENT, bitcast=True)
    return lower.to(tl.float32), upper.to(tl.float32)


@triton.jit
def _paired(lower, upper, ELEMENT: tl.constexpr):
    """The converse, rounded."""
    BITS: tl.constexpr = ELEMENT.primitive_bitwidth
    INTEGER: tl.constexpr = tl.uint16 if BITS == 16 else tl.uint32
    PAIR: tl.constexpr = tl.int32 if BITS == 16 else tl.int64
    low = lower.to(ELEMENT).to(INTEGER, bitcast=True).to(PAIR)
    high = upper.to(ELEMENT).to(INTEGER, bitcast=True).to(PAIR)
    return low | (high << BITS)


@triton.jit
def _load_gates(preact, start, offsets, width, wanted, INTERLEAVED: tl.constexpr, ELEMENT: tl.constexpr):
    """Gates and ups of the columns `offsets`, as float32. Interleaved ones are loaded as integers of twice their width:
    a thread then has both of a pair, and nothing is exchanged between threads."""
    if INTERLEAVED:
        return _halves(tl.load(preact + start + offsets, mask=wanted, other=0), ELEMENT)
    place = preact + 2 * start + offsets
    gate = tl.load(place, mask=wanted, other=0.0)
    up = tl.load(place + width, mask=wanted, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def _store_gates(grad, start, offsets, width, wanted, gate, up, INTERLEAVED: tl.constexpr, ELEMENT: tl.constexpr):
    """The converse."""
    if INTERLEAVED:
        tl.store(grad + start + offsets, _paired(gate, up, ELEMENT), mask=wanted)
    else:
        place = grad + 2 * start + offsets
        tl.store(place, gate.to(ELEMENT), mask=wanted)
        tl.store(place + width, up.to(ELEMENT), mask=wanted)


@triton.jit
def _clamped(gate, up, limit, CLAMPED: tl.constexpr):
    """What the products are made of: the gate, and the factor of the other half."""
    factor = up
    if CLAMPED:
        gate = tl.where(gate > limit, limit, gate)
        factor = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    return gate, factor


@triton.jit
def glu(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    """The activation."""
    gate, factor = _clamped(gate, up, limit, CLAMPED)
    slope = gate
    if CLAMPED:
        slope = gate * alpha
    return gate * (1.0 / (1.0 + tl.exp2(slope * -LOG2E))) * factor


@triton.jit
def glu_gradients(gate, up, grad, alpha, limit, CLAMPED: tl.constexpr):
    """The activation, and the gradients of gate and up. What is not used is not computed."""
    bounded, factor = _clamped(gate, up, limit, CLAMPED)
    slope = bounded
    if CLAMPED:
        slope = bounded * alpha
    e = tl.exp2(slope * -LOG2E)
    sigmoid = 1.0 / (1.0 + e)
    passed = bounded * sigmoid
    rest = tl.where(slope < 0.0, 1.0 - sigmoid, e * sigmoid)  # 1 - sigmoid, without cancellation
    of_gate = grad * factor * (sigmoid * (1.0 + slope * rest))
    of_up = grad * passed
    if CLAMPED:
        of_gate = tl.where(gate <= limit, of_gate, 0.0)
        of_up = tl.where((up >= -limit) & (up <= limit), of_up, 0.0)
    return passed * factor, of_gate, of_up


@triton.jit
def slots_of(inv_map, block, rows, ROWS: tl.constexpr):
    """The rows [ROWS, 1] of a block, whether they exist, and their slots, -1 for padding."""
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    return row, inside, tl.load(inv_map + row, mask=inside, other=-1)


@triton.jit(do_not_specialize=["rows", "slots"])
def glu_kernel(
    preact,
    inv_map,
    weights,
    activated,
    alpha,
    limit,
    rows,
    slots,
    width,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program (r, c) owns ROWS rows and BLOCK columns of the activation: 2 elements in and 1 out for each. Rows of padding
    # are written and not read; with weights, rows of no slot are padding.
    row, inside, slot = slots_of(inv_map, tl.program_id(0), rows, ROWS)
    live = slot >= 0
    if WEIGHTED:
        live = live & (slot < slots)
    ELEMENT: tl.constexpr = activated.dtype.element_ty
    start = row.to(tl.int64) * width
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    gate, up = _load_gates(preact, start, offsets, width, live & (offsets < width), INTERLEAVED, ELEMENT)
    value = glu(gate, up, alpha, limit, CLAMPED)
    if WEIGHTED:
        value = value * tl.load(weights + slot, mask=live, other=0.0)
    tl.store(activated + start + offsets, value.to(ELEMENT), mask=inside & (offsets < width))


@triton.jit(do_not_specialize=["rows", "slots"])
def glu_backward_kernel(
    preact,
    grad_activated,
    inv_map,
    weights,
    row_terms,
    grad_preact,
    activated,
    grad_weights,
    alpha,
    limit,
    rows,
    slots,
    width,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_TERMS: tl.constexpr,
    PREACT: tl.constexpr,
    ACTIVATED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns ROWS rows and walks their columns: 3 elements in and 3 out for each activation. The products with the
    # gradient add up in registers, a sum for each place in the block, and once across them at the end. Rows of padding are
    # written and not read; so are rows of no slot.
    row, inside, slot = slots_of(inv_map, tl.program_id(0), rows, ROWS)
    live = (slot >= 0) & (slot < slots)
    ELEMENT: tl.constexpr = activated.dtype.element_ty
    weight = tl.load(weights + slot, mask=live, other=0.0)
    start = row.to(tl.int64) * width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for columns in range(0, width, BLOCK):
        offsets = columns + tl.arange(0, BLOCK)[None, :]
        wanted = live & (offsets < width)
        written = inside & (offsets < width)
        gate, up = _load_gates(preact, start, offsets, width, wanted, INTERLEAVED, ELEMENT)
        grad = tl.load(grad_activated + start + offsets, mask=wanted, other=0.0).to(tl.float32)
        value, of_gate, of_up = glu_gradients(gate, up, grad, alpha, limit, CLAMPED)
        if WEIGHTS:
            total += grad * value
        if PREACT:
            of_gate, of_up = of_gate * weight, of_up * weight
            _store_gates(grad_preact, start, offsets, width, written, of_gate, of_up, INTERLEAVED, ELEMENT)
        if ACTIVATED:
            tl.store(activated + start + offsets, (value * weight).to(ELEMENT), mask=written)
    if WEIGHTS:
        result = tl.sum(total, axis=1)[:, None]
        if HAS_TERMS:
            result += tl.load(row_terms + row, mask=live, other=0.0)
        tl.store(grad_weights + slot, result, mask=live)
