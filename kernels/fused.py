# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What the pairwise Triton kernels share on the device: a tile of products, and which of its entries are pairs.

Both a forward kernel and the backward kernel that recomputes its logits take their products from `products`, with the
same tile, so that they see the same bits. Kernels are launched without implicit fusion of multiply and add
(`enable_fp_fusion=False`), so that the compiler cannot round an expression in one of them otherwise than in the other.
"""
# ruff: noqa: N803  (compile-time constants are upper case, as triton writes them)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HEAD, LN2_TAIL = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)
"""log 2 in two parts; the first has 9 bits, so that its product with a whole number below 2^15 is exact."""

NEGATIVES, IGNORE, POSITIVES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DUPLICATES = {"negatives": 0, "ignore": 1, "positives": 2}
"""What `kernels.pairing` calls them -> the compile-time constant."""


@triton.jit
def products(
    rows,
    columns,
    top,
    left,
    num_rows,
    num_columns,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[ROWS, COLUMNS] fp32 of rows[top:] and columns[left:], both [_, WIDTH]; past the end the last one is repeated.

    Repeating needs no mask, and a load without mask is what the compiler pipelines best.
    """
    r, c, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, FEATURES)
    if not EVEN:
        r, c = tl.minimum(r, num_rows - 1 - top), tl.minimum(c, num_columns - 1 - left)
    row_base, row_at = rows + top.to(tl.int64) * WIDTH, (r * WIDTH)[:, None] + k[None, :]
    column_base, column_at = columns + left.to(tl.int64) * WIDTH, (c * WIDTH)[None, :] + k[:, None]
    tile = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, FEATURES):
        if WIDTH % FEATURES == 0:
            row, column = tl.load(row_base + start + row_at), tl.load(column_base + start + column_at)
        else:
            row = tl.load(row_base + start + row_at, mask=(k < WIDTH - start)[None, :], other=0.0)
            column = tl.load(column_base + start + column_at, mask=(k < WIDTH - start)[:, None], other=0.0)
        tile = tl.dot(row, column, tile, input_precision=PRECISION)
    return tile


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    left, right = _halves(tile, ROWS, COLUMNS)
    return _halves(left, ROWS, COLUMNS // 2) + _halves(right, ROWS, COLUMNS // 2)


@triton.jit
def parts(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """A tile's columns in 1, 2, 4 or 8 equal parts: what is made of one of them leaves before the next is begun.

    The compiler makes each operation for a whole tensor; with a whole tile's intermediate values registers run out.
    """
    if PARTS == 1:
        found = (tile,)
    elif PARTS == 2:
        found = _halves(tile, ROWS, COLUMNS)
    elif PARTS == 4:
        found = _quarters(tile, ROWS, COLUMNS)
    else:
        left, right = _halves(tile, ROWS, COLUMNS)
        found = _quarters(left, ROWS, COLUMNS // 2) + _quarters(right, ROWS, COLUMNS // 2)
    return found


@triton.jit
def crosses(top, left, gap, first, last, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether a tile holds a pair: an entry (r, r + gap) with first <= r < last."""
    low = tl.maximum(tl.maximum(top, first), left - gap)
    high = tl.minimum(tl.minimum(top + ROWS, last), left + COLUMNS - gap)
    return low < high


@triton.jit
def pairs(r, c, gap, first, last):
    """[ROWS, COLUMNS] bool."""
    return (c[None, :] - r[:, None] == gap) & ((r >= first) & (r < last))[:, None]


@triton.jit
def equal(row_codes, column_codes, r, c, num_rows, num_columns):
    """[ROWS, COLUMNS] bool: entries whose ids are equal, pairs among them."""
    row_code = tl.load(row_codes + r, mask=r < num_rows, other=-1)
    column_code = tl.load(column_codes + c, mask=c < num_columns, other=-2)
    return row_code[:, None] == column_code[None, :]


@triton.jit
def exp(x):
    """To about two units in the last place, also far from 0, where x log2(e) is rounded to more than that.

    A whole power of two is split off first (Cody and Waite 1980): what is left is small, and so is its rounding.
    """
    whole = tl.floor(x * LOG2E + 0.5)
    rest = (x - whole * LN2_HEAD) - whole * LN2_TAIL
    return tl.exp2(rest * LOG2E) * tl.exp2(whole)
