"""The kernels themselves, in Triton: programs that walk a table of segments of gradients.

A program owns the segments ``programs[p]`` up to ``programs[p + 1]``; a row of ``segments`` is the
gradient's position in ``addresses``, the segment's first element, the one past its last, and the
gradient's number of elements. Products are float32, or float64 for float64, and are stored in the
gradient's own dtype.

A gradient is cut at 16-byte borders of memory, wherever it begins: the few elements before its
first border are its head, those after its last one its rest, and all borders between segments move
on by the head. So bodies are read and written 128 bits at a time, heads and rests by one element.

Constants of a compilation: ``DTYPE``, the gradients' dtype; ``BLOCK``, elements a program takes at
a time; ``LANES``, threads of a program; ``BY_HAND``, whether bfloat16 is converted by integer
arithmetic, for Triton's interpreter, which truncates where hardware rounds to nearest even.
"""

import triton
import triton.language as tl

__all__ = ["count_kernel", "scale_kernel", "sum_kernel", "unscale_kernel"]

# Squares in float32 are exact enough, and finite, while the largest product lies between these:
# below, too much of a square is lost under 2^-149; above, a thread's sum of 16 may overflow.
_SMALLEST = tl.constexpr(2.0**-48)
_LARGEST = tl.constexpr(2.0**60)


@triton.jit(do_not_specialize_on_alignment=["inv_scale", "found_inf", "partials"])
def unscale_kernel(
    addresses,
    segments,
    programs,
    inv_scale,
    found_inf,
    partials,
    DTYPE: tl.constexpr,
    WRITE: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """Judge the gradients; multiply them if WRITE; with SQUARES, a partial sum for each program.

    Squared is the product as stored, or the unrounded one where nothing is written.
    """
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    VECTOR: tl.constexpr = 16 // ITEM
    program = tl.program_id(0)
    factor = tl.load(inv_scale)
    wide_factor = factor.to(_wide(DTYPE))
    # How many lanes store: with a factor of exactly one every bit stays, also those of a NaN.
    writing = tl.where(factor != 1, BLOCK, 0)
    lanes = tl.arange(0, BLOCK)
    edge = tl.arange(0, 2 * VECTOR)
    # Bits of a magnitude, as integers: every number is below Inf, and Inf is below every NaN.
    largest = tl.zeros([LANES], _bits(DTYPE))
    edge_largest = tl.zeros([2 * VECTOR], _bits(DTYPE))
    sums = tl.zeros([LANES], tl.float64)
    edge_sums = tl.zeros([2 * VECTOR], tl.float64)
    for index in range(tl.load(programs + program), tl.load(programs + program + 1)):
        address, head, body, length, rest = _segment(addresses, segments, index, ITEM)
        for i in range(0, length, BLOCK):
            at = _vectors(body, DTYPE) + (i + lanes)
            inside = i + lanes < length
            x = _widen(tl.load(at, mask=inside, other=0.0), DTYPE, BY_HAND)
            largest = tl.maximum(largest, _fold_max(_magnitude(x), VECTOR, LANES))
            product = x * wide_factor
            if WRITE:
                stored = _narrow(product, DTYPE, BY_HAND)
                tl.store(at, stored, mask=inside & (lanes < writing))
                product = _widen(stored, DTYPE, BY_HAND)
            if SQUARES:
                sums += _fold_sum(product * product, VECTOR, LANES)
        if head + rest > 0:
            at, inside = _edges(edge, address, head, body, length, rest, DTYPE)
            x = _widen(tl.load(at, mask=inside, other=0.0), DTYPE, BY_HAND)
            edge_largest = tl.maximum(edge_largest, _magnitude(x))
            product = x * wide_factor
            if WRITE:
                stored = _narrow(product, DTYPE, BY_HAND)
                tl.store(at, stored, mask=inside & (edge < writing))
                product = _widen(stored, DTYPE, BY_HAND)
            if SQUARES:
                edge_sums += (product * product).to(tl.float64)
    bits = tl.maximum(tl.max(largest, 0), tl.max(edge_largest, 0))
    amax = bits.to(_wide(DTYPE), bitcast=True)
    # Rounding keeps the order, so the largest product is that of the largest element.
    product = amax * wide_factor
    stored = _widen(_narrow(product, DTYPE, BY_HAND), DTYPE, BY_HAND)
    good = (factor > 0) & (factor < float("inf")) & (amax < float("inf"))
    good = good & ((factor <= 1) | (stored < float("inf")))
    if not good:
        tl.store(found_inf, 1.0)  # programs race, but all of them store the same
    if SQUARES:
        total = tl.sum(sums, 0) + tl.sum(edge_sums, 0)
        # A float16 that is stored is neither too small nor too large.
        if DTYPE == tl.float32 or DTYPE == tl.bfloat16 or (DTYPE == tl.float16 and not WRITE):
            if WRITE:
                product = stored
            safe = (product >= _SMALLEST) & (product <= _LARGEST)
            if good & (amax > 0) & (not safe):
                total = _squares_in_float64(
                    addresses, segments, programs, factor, DTYPE, WRITE, LANES, BY_HAND
                )
        tl.store(partials + program, total)


@triton.jit(do_not_specialize_on_alignment=["factor"])
def scale_kernel(
    addresses,
    segments,
    programs,
    factor,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """Multiply the gradients; where the factor is one, no gradient is read."""
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    program = tl.program_id(0)
    wide_factor = tl.load(factor).to(_wide(DTYPE))
    if wide_factor == 1:
        return
    lanes = tl.arange(0, BLOCK)
    edge = tl.arange(0, 32 // ITEM)
    for index in range(tl.load(programs + program), tl.load(programs + program + 1)):
        address, head, body, length, rest = _segment(addresses, segments, index, ITEM)
        for i in range(0, length, BLOCK):
            at = _vectors(body, DTYPE) + (i + lanes)
            inside = i + lanes < length
            x = _widen(tl.load(at, mask=inside, other=0.0), DTYPE, BY_HAND)
            tl.store(at, _narrow(x * wide_factor, DTYPE, BY_HAND), mask=inside)
        if head + rest > 0:
            at, inside = _edges(edge, address, head, body, length, rest, DTYPE)
            x = _widen(tl.load(at, mask=inside, other=0.0), DTYPE, BY_HAND)
            tl.store(at, _narrow(x * wide_factor, DTYPE, BY_HAND), mask=inside)


@triton.jit
def count_kernel(
    addresses,
    segments,
    programs,
    counts,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """Add to each gradient's row of ``counts``, int64: Infs, NaNs, and float64 bits of its amax.

    Integers may be added and compared in any order, so the result is the same each time.
    """
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    VECTOR: tl.constexpr = 16 // ITEM
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    edge = tl.arange(0, 2 * VECTOR)
    for index in range(tl.load(programs + program), tl.load(programs + program + 1)):
        address, head, body, length, rest = _segment(addresses, segments, index, ITEM)
        infs = tl.zeros([LANES], tl.int32)
        nans = tl.zeros([LANES], tl.int32)
        largest = tl.zeros([LANES], _bits(DTYPE))
        for i in range(0, length, BLOCK):
            at = _vectors(body, DTYPE) + (i + lanes)
            x = _widen(tl.load(at, mask=i + lanes < length, other=0.0), DTYPE, BY_HAND)
            bits = _magnitude(x)
            infs += _fold_sum((bits == _inf(DTYPE)).to(tl.int32), VECTOR, LANES)
            nans += _fold_sum((bits > _inf(DTYPE)).to(tl.int32), VECTOR, LANES)
            largest = tl.maximum(largest, _fold_max(bits, VECTOR, LANES))
        ends, inside = _edges(edge, address, head, body, length, rest, DTYPE)
        edge_bits = _magnitude(_widen(tl.load(ends, mask=inside, other=0.0), DTYPE, BY_HAND))
        num_infs = tl.sum(infs, 0) + tl.sum((edge_bits == _inf(DTYPE)).to(tl.int32), 0)
        num_nans = tl.sum(nans, 0) + tl.sum((edge_bits > _inf(DTYPE)).to(tl.int32), 0)
        amax_bits = tl.maximum(tl.max(largest, 0), tl.max(edge_bits, 0))
        amax = amax_bits.to(_wide(DTYPE), bitcast=True)
        row = counts + 3 * tl.load(segments + 4 * index)
        tl.atomic_add(row, num_infs.to(tl.int64), sem="relaxed")
        tl.atomic_add(row + 1, num_nans.to(tl.int64), sem="relaxed")
        tl.atomic_max(row + 2, amax.to(tl.float64).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit(
    do_not_specialize=["num_partials"], do_not_specialize_on_alignment=["partials", "sum_squares"]
)
def sum_kernel(partials, num_partials, sum_squares, BLOCK: tl.constexpr):
    """Add all partial sums to ``sum_squares``, by one program and in one order."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for i in range(0, num_partials, BLOCK):
        sums += tl.load(partials + i + lanes, mask=i + lanes < num_partials, other=0.0)
    tl.store(sum_squares, tl.load(sum_squares) + tl.sum(sums, 0))


@triton.jit
def _segment(addresses, segments, index, ITEM: tl.constexpr):
    """A segment as its gradient's address and its head, body and rest; lengths in elements."""
    VECTOR: tl.constexpr = 16 // ITEM
    row = segments + 4 * index
    address = tl.load(addresses + tl.load(row))
    first = tl.load(row + 1)
    numel = tl.load(row + 3)
    shift = ((0 - address) & 15) // ITEM
    # Clamped: the last segment may be shorter than the shift, and no element is past the end.
    begin = tl.minimum(first + shift, numel)
    end = tl.minimum(tl.load(row + 2) + shift, numel)
    head = tl.where(first == 0, begin, 0).to(tl.int32)
    length = (end - begin).to(tl.int32)
    rest = length % VECTOR
    return address, head, address + begin * ITEM, length // VECTOR * VECTOR, rest


@triton.jit
def _vectors(address, DTYPE: tl.constexpr):
    """The pointer that an address is; it lies on a 16-byte border."""
    pointer = tl.multiple_of(address, 16).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _edges(edge, address, head, body, length, rest, DTYPE: tl.constexpr):
    """Pointers to the head in the lower half of the lanes and to the rest in the upper one."""
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    upper = edge >= VECTOR
    lane = edge % VECTOR
    inside = lane < tl.where(upper, rest, head)
    begin = tl.where(upper, body, address).to(tl.pointer_type(DTYPE))
    return begin + tl.where(upper, length + lane, lane), inside


@triton.jit
def _squares_in_float64(
    addresses,
    segments,
    programs,
    factor,
    DTYPE: tl.constexpr,
    STORED: tl.constexpr,
    LANES: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """The program's sum once more, of magnitudes whose squares float32 does not hold."""
    tl.debug_barrier()  # what one thread has stored, another reads
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    VECTOR: tl.constexpr = 16 // ITEM
    BLOCK: tl.constexpr = LANES * VECTOR
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    edge = tl.arange(0, 2 * VECTOR)
    sums = tl.zeros([LANES], tl.float64)
    edge_sums = tl.zeros([2 * VECTOR], tl.float64)
    for index in range(tl.load(programs + program), tl.load(programs + program + 1)):
        address, head, body, length, rest = _segment(addresses, segments, index, ITEM)
        for i in range(0, length, BLOCK):
            at = _vectors(body, DTYPE) + (i + lanes)
            x = _widen(tl.load(at, mask=i + lanes < length, other=0.0), DTYPE, BY_HAND)
            product = x.to(tl.float64) if STORED else x.to(tl.float64) * factor.to(tl.float64)
            sums += _fold_sum(product * product, VECTOR, LANES)
        ends, inside = _edges(edge, address, head, body, length, rest, DTYPE)
        edge_x = _widen(tl.load(ends, mask=inside, other=0.0), DTYPE, BY_HAND).to(tl.float64)
        edge_product = edge_x if STORED else edge_x * factor.to(tl.float64)
        edge_sums += edge_product * edge_product
    return tl.sum(sums, 0) + tl.sum(edge_sums, 0)


@triton.constexpr_function
def _wide(DTYPE):
    """The dtype of products."""
    return tl.float64 if DTYPE == tl.float64 else tl.float32


@triton.constexpr_function
def _bits(DTYPE):
    """The integer as long as a product."""
    return tl.int64 if DTYPE == tl.float64 else tl.int32


@triton.constexpr_function
def _inf(DTYPE):
    """The bits of Inf as a product."""
    return 0x7FF0000000000000 if DTYPE == tl.float64 else 0x7F800000


@triton.jit
def _magnitude(x):
    """The bits of a float32 or float64 without its sign."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _fold_sum(x, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """Sum what one thread holds of a block; threads meet only at the end."""
    x = tl.reshape(x, [x.numel // (VECTOR * LANES), LANES, VECTOR])
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _fold_max(x, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """The largest of what one thread holds of a block."""
    x = tl.reshape(x, [x.numel // (VECTOR * LANES), LANES, VECTOR])
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _widen(x, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """To the dtype of products; exact."""
    if BY_HAND and DTYPE == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(_wide(DTYPE))


@triton.jit
def _narrow(x, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """To the dtype as stored, rounded to nearest even."""
    if BY_HAND and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # A NaN keeps its upper bits, and one more so that it stays a NaN.
        rounded = tl.where(x == x, rounded, bits | 0x400000)
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
