"""Triton kernels with fixed tiles: a row's bits are the same alone and in any company.

No program's tile depends on how many rows, sequences or experts share the launch, and every sum runs in one order. Each
also runs in Triton's interpreter on a CPU, which is how it is tested without a GPU. Numbers that change from
step to step are not specialised, or a kernel would be compiled again in the midst of serving.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_of(matrix, row, real, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """These rows of a matrix of WIDTH columns, zeros where a row is not real and beyond WIDTH."""
    wide = tl.arange(0, WIDE)
    return tl.load(
        matrix + row[:, None] * WIDTH + wide[None, :], mask=real[:, None] & (wide[None, :] < WIDTH), other=0.0
    )


SUMS = tl.constexpr(16)  # columns of ones: the fewest that a product has


@triton.jit
def _no_cells(ROWS: tl.constexpr, VALUE_WIDE: tl.constexpr):
    """The running softmax before it has seen anything."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    return top, tl.zeros((ROWS, SUMS), tl.float32), tl.zeros((ROWS, VALUE_WIDE), tl.float32)


@triton.jit
def _add_cells(rows, key, value, seen, scaling, top, total, mixed):
    """The running softmax with some more cells: the largest score, the sum of weights, the weighted sum of values.

    Weights are summed by a product with ones, in the order of all products: in which order `tl.sum` goes depends on how
    many rows there are.
    """
    scores = tl.dot(rows, key, input_precision="ieee") * scaling
    scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp(scores - base[:, None]).to(value.dtype)
    kept = tl.exp(top - base)[:, None]
    ones = tl.full((value.shape[0], SUMS), 1.0, value.dtype)
    total = tl.dot(weights, ones, total * kept, input_precision="ieee")
    mixed = tl.dot(weights, value, mixed * kept, input_precision="ieee")
    return new, total, mixed


@triton.jit
def _add_sequence(
    rows,
    mine,
    position,
    keys,
    values,
    table,
    head,
    first,
    last,
    scaling,
    window,
    top,
    total,
    mixed,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
):
    """Cells `first` to `last` of one sequence, for those `rows` that are `mine` and stand at `position` [ROWS]. The
    others' sums stay as they are, to the bit: their weights are zeros, and what was is multiplied by 1.
    """
    for start in range(first, last, CELLS):
        at = start + tl.arange(0, CELLS)
        there = at < last
        block = tl.load(table + at // PAGE, mask=there, other=0).to(tl.int64)
        cell = (block * PAGE + at % PAGE) * HEADS + head
        key = tl.trans(_rows_of(keys, cell, there, WIDTH, WIDE))
        value = _rows_of(values, cell, there, VALUE_WIDTH, VALUE_WIDE)
        behind = position[:, None] - at[None, :]  # a token sees itself and what stands before it
        seen = mine[:, None] & (behind >= 0) & (behind < window)
        top, total, mixed = _add_cells(rows, key, value, seen, scaling, top, total, mixed)
    return top, total, mixed


@triton.jit
def _keep_split(partial, sizes, place, real, top, total, mixed, VALUE_WIDTH: tl.constexpr, VALUE_WIDE: tl.constexpr):
    """What one split gives its rows. Of those that saw no cell the size alone says so, and nothing else is read."""
    wide = tl.arange(0, VALUE_WIDE)
    total = tl.max(total, 1)  # all columns are the same
    some = total != 0.0  # a sum that is no number is of cells that were seen, too
    total = tl.where(some, total, 1.0)
    tl.store(
        partial + place[:, None] * VALUE_WIDTH + wide[None, :],
        mixed / total[:, None], mask=(real & some)[:, None] & (wide[None, :] < VALUE_WIDTH),
    )  # fmt: skip
    tl.store(sizes + place, tl.where(some, top + tl.log(total), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["count", "splits", "pages", "window"])
def attend(
    queries,
    keys,
    values,
    tables,
    sequences,
    positions,
    partial,
    sizes,
    scaling,
    count,
    splits,
    pages,
    window,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROOM: tl.constexpr,
    CELLS: tl.constexpr,
    WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
):
    """One (TOKENS tokens, key/value head, split): the GROUP query heads of that head, of each of these tokens, against
    SPLIT cells of their sequences. ROOM rows of a tile are for one token.

    queries [T, HEADS * GROUP, WIDTH], keys [block, PAGE, HEADS, WIDTH], values alike; tables [sequence, pages];
    sequences [T] ascending; partial [T, HEADS * GROUP, splits, VALUE_WIDTH], sizes [T, HEADS * GROUP, splits] (log of
    the sum of weights).
    """
    token, head, split = tl.program_id(0) * TOKENS, tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, TOKENS * ROOM)
    its = token + row // ROOM
    real = (row % ROOM < GROUP) & (its < count)
    query = (its * HEADS + head) * GROUP + row % ROOM
    rows = _rows_of(queries, query, real, WIDTH, WIDE)
    top, total, mixed = _no_cells(TOKENS * ROOM, VALUE_WIDE)
    first = split * SPLIT
    if TOKENS == 1:
        stands = tl.load(positions + token).to(tl.int32)
        top, total, mixed = _add_sequence(
            rows, real, tl.full((ROOM,), 0, tl.int32) + stands, keys, values,
            tables + tl.load(sequences + token) * pages, head, first, tl.minimum(first + SPLIT, stands + 1),
            scaling, window, top, total, mixed, PAGE, HEADS, WIDTH, VALUE_WIDTH, CELLS, WIDE, VALUE_WIDE,
        )  # fmt: skip
    else:
        position = tl.load(positions + its, mask=real, other=-1).to(tl.int32)
        sequence = tl.load(sequences + its, mask=real, other=-1).to(tl.int32)
        for each in range(tl.load(sequences + token).to(tl.int32), tl.max(sequence, 0) + 1):
            mine = sequence == each
            top, total, mixed = _add_sequence(
                rows, mine, position, keys, values, tables + each * pages, head, first,
                tl.minimum(first + SPLIT, tl.max(tl.where(mine, position, -1), 0) + 1), scaling, window,
                top, total, mixed, PAGE, HEADS, WIDTH, VALUE_WIDTH, CELLS, WIDE, VALUE_WIDE,
            )  # fmt: skip
    _keep_split(partial, sizes, query * splits + split, real, top, total, mixed, VALUE_WIDTH, VALUE_WIDE)


@triton.jit(do_not_specialize=["splits"])
def merge(partial, sizes, out, splits, VALUE_WIDTH: tl.constexpr, VALUE_WIDE: tl.constexpr):
    """One (token, query head): its splits, ascending. Those that saw no cell add exact zeros."""
    query = tl.program_id(0)
    wide = tl.arange(0, VALUE_WIDE)
    inside = wide < VALUE_WIDTH
    top = tl.load(sizes + query * splits)
    for split in range(1, splits):
        top = tl.maximum(top, tl.load(sizes + query * splits + split))
    mixed = tl.zeros((VALUE_WIDE,), tl.float32)
    total = 0.0
    for split in range(splits):
        place = query * splits + split
        size = tl.load(sizes + place)
        weight = tl.exp(size - top)
        saw = tl.zeros((VALUE_WIDE,), tl.float32) + size > float("-inf")
        mixed += tl.load(partial + place * VALUE_WIDTH + wide, mask=inside & saw, other=0.0) * weight
        total += weight
    tl.store(out + query * VALUE_WIDTH + wide, (mixed / total).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile_product(
    rows,
    real,
    columns,
    there,
    inner,
    inner_stride,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Rows that begin at `rows` [ROWS, 1] times columns that begin at `columns` [1, COLUMNS], in pieces of PIECE."""
    piece = tl.arange(0, PIECE)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inner, PIECE):
        at = start + piece
        left = rows + at[None, :]
        right = columns + at[:, None] * inner_stride
        if EVEN:
            left = tl.load(left, mask=real, other=0.0)
            right = tl.load(right)
        else:
            left = tl.load(left, mask=real & (at[None, :] < inner), other=0.0)
            right = tl.load(right, mask=there & (at[:, None] < inner), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _silu_gate(both, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """silu of the even columns times the odd ones; what is rounded when both are kept, is rounded here."""
    gate, up = tl.split(tl.reshape(both.to(tl.float32), (ROWS, COLUMNS // 2, 2)))
    gate = (gate / (1.0 + tl.exp(-gate))).to(both.dtype).to(tl.float32)
    return (gate * up).to(both.dtype)


@triton.jit(do_not_specialize=["least", "below", "shared_by"])
def grouped_product(
    rows,
    order,
    matrices,
    ends,
    out,
    inner,
    width,
    inner_stride,
    width_stride,
    least,
    below,
    shared_by,
    EVEN: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """COLUMNS columns of one group's product: out[i, :] = rows[i, :] times the matrix of the group that has row i.

    out [R, width]; group g is rows ends[g] to ends[g + 1]; matrices[g] is the address of its matrix [inner, width] with
    these strides, all of type KIND. rows [R, inner], or with shared_by > 0 [R // shared_by, inner]: then row i of the
    product is made of row order[i] // shared_by. GATED: matrices are [inner, 2 * width], and out is silu(rows times the
    first half) * (rows times the second), each rounded as if it were kept. Nothing is done for rows of no group, nor
    for groups of fewer than `least` rows, or of `below` and more, which are for another launch with other tiles. EVEN:
    all tiles of the matrices are full, so that they are read without masks.
    """
    group = tl.program_id(1)
    begin, end = tl.load(ends + group).to(tl.int32), tl.load(ends + group + 1).to(tl.int32)
    if end - begin < least or end - begin >= below:
        return
    # What is said of the number is lost with the cast: said of the pointer, it is read 16 bytes at a time, and ahead.
    matrix = tl.multiple_of(tl.load(matrices + group).to(tl.pointer_type(KIND)), 16)
    lane = tl.arange(0, COLUMNS)
    if GATED:  # columns of both halves by turns, so that it is one product all the same
        column = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        read = tl.program_id(0) * (COLUMNS // 2) + lane // 2
        there = read[None, :] < width
        read += lane % 2 * width
    else:
        column = tl.program_id(0) * COLUMNS + lane
        read = column
        there = read[None, :] < width
    inside = column[None, :] < width
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        real = row[:, None] < end
        picked = tl.load(order + row, mask=(row < end) & (shared_by > 0), other=0) // tl.maximum(shared_by, 1)
        source = tl.where(shared_by > 0, picked, row)
        total = _tile_product(
            rows + source[:, None] * inner, real, matrix + read[None, :] * width_stride, there, inner, inner_stride,
            EVEN, ROWS, COLUMNS, PIECE,
        )  # fmt: skip
        kept = total.to(out.dtype.element_ty)
        if GATED:
            kept = _silu_gate(kept, ROWS, COLUMNS)
        tl.store(out + row[:, None] * width + column[None, :], kept, mask=real & inside)


@triton.jit(do_not_specialize=["count"])
def dense_product(
    rows,
    matrix,
    out,
    count,
    inner,
    width,
    inner_stride,
    width_stride,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """ROWS rows and COLUMNS columns of rows [count, inner] times one matrix [inner, width] with these strides, which
    gives out [count, width]. EVEN: all tiles of the matrix are full, so that it is read without masks.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real, there = row[:, None] < count, column[None, :] < width
    total = _tile_product(
        rows + row[:, None] * inner, real, matrix + column[None, :] * width_stride, there, inner, inner_stride,
        EVEN, ROWS, COLUMNS, PIECE,
    )  # fmt: skip
    tl.store(out + row[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=real & there)


NO_EXPERT = tl.constexpr(1 << 30)


@triton.jit(do_not_specialize=["total"])
def group_pairs(ids, rows, pairs, places, ends, counts, total, K: tl.constexpr, PAIRS: tl.constexpr):
    """One expert: which of the (token, choice) pairs are for it, in their order, and where its group begins.

    ids [total] of experts, K of each token, of which those of the first rows[0] tokens count. pairs[i] is the pair that
    row i of the grouped rows is of, and places[p] the row of pair p; group g is rows ends[g] to ends[g + 1]; counts[g]
    grows by its size.
    """
    expert = tl.program_id(0)
    real = tl.load(rows) * K
    number = tl.arange(0, PAIRS)
    begin = 0
    size = 0
    for start in range(0, total, PAIRS):
        pair = start + number
        wanted = tl.load(ids + pair, mask=pair < real, other=NO_EXPERT)
        begin += tl.sum((wanted < expert).to(tl.int32))
        size += tl.sum((wanted == expert).to(tl.int32))
    tl.store(ends + expert, begin)
    if expert == tl.num_programs(0) - 1:
        tl.store(ends + expert + 1, begin + size)
    tl.store(counts + expert, tl.load(counts + expert) + size)
    place = begin
    for start in range(0, total, PAIRS):
        pair = start + number
        mine = tl.load(ids + pair, mask=pair < real, other=NO_EXPERT) == expert
        at = place + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(pairs + at, pair, mask=mine)
        tl.store(places + pair, at, mask=mine)
        place += tl.sum(mine.to(tl.int32))


@triton.jit
def weighted_sum(
    parts, ids, weights, places, rows, out, width, K: tl.constexpr, WIDE_K: tl.constexpr, COLUMNS: tl.constexpr
):
    """One token: the sum of its K rows of `parts`, by ascending expert; zeros from token rows[0] on.

    parts [R, width], ids, weights and places [T, K], out [T, width]. To be launched without fused multiply-add: each
    product and each sum is rounded by itself, as workers/exchange/combine.py has it.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = token < tl.load(rows)
    choice = tl.arange(0, WIDE_K)
    some = choice < K
    wanted = tl.load(ids + token * K + choice, mask=some, other=NO_EXPERT)
    earlier = choice[None, :] < choice[:, None]
    first = (wanted[None, :] < wanted[:, None]) | ((wanted[None, :] == wanted[:, None]) & earlier)
    rank = tl.sum(first.to(tl.int32), 1)
    weight = tl.load(weights + token * K + choice, mask=some, other=0.0).to(tl.float32)
    place = tl.load(places + token * K + choice, mask=some & real, other=0)
    total = tl.zeros((COLUMNS,), tl.float32)
    for nth in tl.static_range(K):
        chosen = rank == nth
        at = tl.sum(tl.where(chosen, place, 0))
        part = tl.load(parts + at * width + column, mask=real & (column < width), other=0.0).to(tl.float32)
        part = part * tl.sum(tl.where(chosen, weight, 0.0))
        total = part if nth == 0 else total + part
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def rms_norm(rows, weight, out, epsilon, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """One row of WIDTH numbers: x / sqrt(mean(x^2) + epsilon) in fp32, rounded, times `weight`."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    wide = tl.arange(0, WIDE)
    inside = wide < WIDTH
    given = tl.load(rows + row + wide, mask=inside, other=0.0)
    exact = given.to(tl.float32)
    normed = (exact * tl.rsqrt(tl.sum(exact * exact) / WIDTH + epsilon)).to(given.dtype).to(tl.float32)
    scale = tl.load(weight + wide, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + wide, (normed * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def copy_blocks(numbers, memory, parts, WORDS: tl.constexpr):
    """One (part, block): copy it out of memory that is laid out as ours, maybe another GPU's, WORDS words at a time.

    numbers [3, blocks]: the address of that memory, the block there, the block here. parts [parts, 2]: where each
    begins, and its words of 8 bytes in a block.
    """
    part, number, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, size = tl.load(parts + 2 * part), tl.load(parts + 2 * part + 1).to(tl.int32)
    source = tl.multiple_of(tl.load(numbers + number).to(tl.pointer_type(tl.int64)), 16)
    source += begin + tl.load(numbers + count + number) * size
    target = memory + begin + tl.load(numbers + 2 * count + number) * size
    word = tl.arange(0, WORDS)
    for start in range(0, size, WORDS):
        inside = start + word < size
        tl.store(target + start + word, tl.load(source + start + word, mask=inside), mask=inside)


@triton.jit
def _turned(given, cosines, sines, out, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    wide = tl.arange(0, WIDE)
    inside = wide < WIDTH
    straight = tl.load(given + wide, mask=inside, other=0.0)
    across = tl.load(given + (wide + WIDTH // 2) % WIDTH, mask=inside, other=0.0).to(tl.float32)
    across = tl.where(wide < WIDTH // 2, -across, across)
    cosine = tl.load(cosines + wide, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sines + wide, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    along = (straight.to(tl.float32) * cosine).to(kind).to(tl.float32)
    tl.store(out + wide, (along + (across * sine).to(kind).to(tl.float32)).to(kind), mask=inside)


@triton.jit
def rotate(
    queries,
    keys,
    cosines,
    sines,
    turned_queries,
    turned_keys,
    query_head,
    query_token,
    key_head,
    key_token,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One (token, head) of the queries, then of the keys: x * cos + (-x2, x1) * sin, each rounded as torch rounds it.

    queries and keys [T, heads, WIDTH] with these strides, cosines and sines [T, WIDTH], what is made [T, heads, WIDTH].
    To be launched without fused multiply-add.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angle = token * WIDTH
    if head < QUERY_HEADS:
        given = queries + token * query_token + head * query_head
        _turned(
            given, cosines + angle, sines + angle, turned_queries + (token * QUERY_HEADS + head) * WIDTH, WIDTH, WIDE
        )
    else:
        head -= QUERY_HEADS
        given = keys + token * key_token + head * key_head
        _turned(given, cosines + angle, sines + angle, turned_keys + (token * KEY_HEADS + head) * WIDTH, WIDTH, WIDE)


@triton.jit
def write_cells(
    keys,
    values,
    cells,
    kept_keys,
    kept_values,
    key_head,
    key_token,
    value_head,
    value_token,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
):
    """One (token, head): its key and its value go to cell cells[token]. keys and values [T, HEADS, width] with these
    strides; what is kept is [cells, HEADS, width].

    Of a value that is not finite as it is kept, zeros are, and its key as no number. So each row that sees the cell is
    no number, and no other: rows that share a product with it multiply the value by 0, and 0 x inf would be NaN.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.load(cells + token) * HEADS + head
    wide, value_wide = tl.arange(0, WIDE), tl.arange(0, VALUE_WIDE)
    key = tl.load(keys + token * key_token + head * key_head + wide, mask=wide < WIDTH, other=0.0)
    value = tl.load(
        values + token * value_token + head * value_head + value_wide, mask=value_wide < VALUE_WIDTH, other=0.0
    ).to(kept_values.dtype.element_ty)
    finite = tl.min((tl.abs(value.to(tl.float32)) < float("inf")).to(tl.int32), 0) == 1
    key = tl.where(finite, key.to(tl.float32), float("nan"))
    tl.store(kept_keys + at * WIDTH + wide, key.to(kept_keys.dtype.element_ty), mask=wide < WIDTH)
    tl.store(kept_values + at * VALUE_WIDTH + value_wide, tl.where(finite, value, 0.0), mask=value_wide < VALUE_WIDTH)


@triton.jit
def choose(
    logits,
    ids,
    weights,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    NORMED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_K: tl.constexpr,
):
    """One token: the K largest of softmax(logits) in fp32, the largest first, of equal ones the first expert.

    logits [T, EXPERTS], ids and weights [T, K]. NORMED: the weights are divided by their sum.
    """
    token = tl.program_id(0).to(tl.int64)
    wide = tl.arange(0, WIDE)
    given = tl.load(logits + token * EXPERTS + wide, mask=wide < EXPERTS, other=float("-inf")).to(tl.float32)
    powers = tl.exp(given - tl.max(given, 0))
    total = tl.sum(powers, 0)
    shares = tl.where(total == total, powers / total, 0.0)  # of no numbers, the first K experts: no id is out of range
    left = tl.where(wide < EXPERTS, shares, -1.0)
    nth = tl.arange(0, WIDE_K)
    chosen = tl.zeros((WIDE_K,), tl.float32)
    for number in tl.static_range(K):
        expert = tl.argmax(left, 0)
        tl.store(ids + token * K + number, expert.to(tl.int64))
        chosen = tl.where(nth == number, tl.max(left, 0), chosen)
        left = tl.where(wide == expert, -1.0, left)
    if NORMED:
        chosen = chosen / tl.sum(chosen, 0)
    chosen = tl.where(total == total, chosen, total)
    tl.store(weights + token * K + nth, chosen.to(weights.dtype.element_ty), mask=nth < K)
