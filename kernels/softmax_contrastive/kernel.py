# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The same in Triton: logits live in registers, a tile at a time; one exponential per logit serves its row and column.

Row sums stay in registers while a program walks some column tiles; column sums leave as one line per row tile and are
added afterwards, in an order that never changes. Backward computes the tile again, makes a logit's gradient of it in
fp32, pair included, and only then rounds it to the dtype of the matrix products (`kernels.strips`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.kernels.fused import DUPLICATES, IGNORE, LOG2E, POSITIVES, crosses, equal, exp, pairs, parts, products
from pretrain.kernels.launches import VARYING, Plan
from pretrain.kernels.pairing import Pairing
from pretrain.kernels.softmax_contrastive.statistics import Shifts, Sums, Weights
from pretrain.kernels.strips import power_of_two_below, strips

LARGEST = 8192.0
"""Where fp16 gradients put the largest weight: four of them still fit, and 1e-8 of one is still normal."""
GROUP = 8
"""Row tiles that share their column tiles in the cache."""


@triton.jit
def _exponentials(
    dots,
    scale,
    row_shift,
    column_shift,
    r,
    c,
    num_rows,
    num_columns,
    is_crossed,
    gap,
    first,
    last,
    TRACKED: tl.constexpr,
):
    """exp(logit - shift), for the row sums and for the column sums: the same tile where there is one shift.

    The pair's own exponential nearly is the sum once training has converged, and the loss their quotient: there its
    last bits count.
    """
    if TRACKED:
        logits = dots * scale
        by_row = tl.load(row_shift + r, mask=r < num_rows, other=float("inf"))
        by_column = tl.load(column_shift + c, mask=c < num_columns, other=float("inf"))
        row_part = tl.exp2((logits - by_row[:, None]) * LOG2E)
        column_part = tl.exp2((logits - by_column[None, :]) * LOG2E)
    else:
        shift = tl.load(row_shift)
        slope, start = scale * LOG2E, -shift * LOG2E
        if is_crossed:
            is_pair = pairs(r, c, gap, first, last)
            row_part = tl.where(is_pair, exp(dots * scale - shift), tl.exp2(tl.fma(dots, slope, start)))
        else:
            row_part = tl.exp2(tl.fma(dots, slope, start))
        column_part = row_part
    return row_part, column_part


@triton.jit(do_not_specialize=VARYING)
def _sums(
    rows,
    columns,
    scale,
    row_shift,
    column_shift,
    row_codes,
    column_codes,
    row_parts,
    column_parts,
    positives,
    row_positive_parts,
    column_positive_parts,
    num_rows,
    num_columns,
    gap,
    first,
    last,
    share,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    TRACKED: tl.constexpr,
    KIND: tl.constexpr,
):
    """Program (t, g) takes row tile t and column tiles g share .. (g + 1) share.

    row_parts [groups, num_rows], column_parts [row tiles, num_columns], the positives' parts alike; where a row has one
    positive, that logit goes to positives [num_rows].
    """
    row_tile, group = tl.program_id(0), tl.program_id(1)
    top = row_tile * ROWS
    r = top + tl.arange(0, ROWS)
    scale_now = tl.load(scale)
    row_sum, row_positive = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
    for tile in range(group * share, tl.minimum((group + 1) * share, tl.cdiv(num_columns, COLUMNS))):
        start = tile * COLUMNS
        dots = products(
            rows, columns, top, start, num_rows, num_columns, WIDTH, ROWS, COLUMNS, FEATURES, EVEN, PRECISION
        )
        for part in tl.static_range(PARTS):
            found = parts(dots, ROWS, COLUMNS, PARTS)[part]
            left = start + part * (COLUMNS // PARTS)
            c = left + tl.arange(0, COLUMNS // PARTS)
            is_crossed = crosses(top, left, gap, first, last, ROWS, COLUMNS // PARTS)
            at = row_tile.to(tl.int64) * num_columns + c
            if KIND == POSITIVES:
                positive = equal(row_codes, column_codes, r, c, num_rows, num_columns) | pairs(r, c, gap, first, last)
                logits = tl.where(positive, found * scale_now, 0.0)
                row_positive += tl.sum(logits, 1)
                tl.store(column_positive_parts + at, tl.sum(logits, 0), mask=c < num_columns)
            else:
                if is_crossed:
                    own = tl.sum(tl.where(pairs(r, c, gap, first, last), found * scale_now, 0.0), 1)
                    has_own = (r >= first) & (r < last) & (r + gap >= left) & (r + gap < left + COLUMNS // PARTS)
                    tl.store(positives + r, own, mask=has_own)
            row_part, column_part = _exponentials(
                found,
                scale_now,
                row_shift,
                column_shift,
                r,
                c,
                num_rows,
                num_columns,
                is_crossed,
                gap,
                first,
                last,
                TRACKED,
            )
            if KIND == IGNORE:
                left_out = equal(row_codes, column_codes, r, c, num_rows, num_columns) & ~pairs(r, c, gap, first, last)
                row_part = tl.where(left_out, 0.0, row_part)
                column_part = tl.where(left_out, 0.0, column_part)
            if not EVEN:
                inside = (r < num_rows)[:, None] & (c < num_columns)[None, :]
                row_part = tl.where(inside, row_part, 0.0)
                column_part = tl.where(inside, column_part, 0.0)
            row_sum += tl.sum(row_part, 1)
            tl.store(column_parts + at, tl.sum(column_part, 0), mask=c < num_columns)
    line = group.to(tl.int64) * num_rows + r
    tl.store(row_parts + line, row_sum, mask=r < num_rows)
    if KIND == POSITIVES:
        tl.store(row_positive_parts + line, row_positive, mask=r < num_rows)


@triton.jit(do_not_specialize=VARYING)
def _maxima(
    rows,
    columns,
    scale,
    row_codes,
    column_codes,
    row_parts,
    column_parts,
    num_rows,
    num_columns,
    gap,
    first,
    last,
    share,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    KIND: tl.constexpr,
):
    """As `_sums`, with the largest logit in place of a sum."""
    row_tile, group = tl.program_id(0), tl.program_id(1)
    top = row_tile * ROWS
    r = top + tl.arange(0, ROWS)
    scale_now = tl.load(scale)
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for tile in range(group * share, tl.minimum((group + 1) * share, tl.cdiv(num_columns, COLUMNS))):
        left = tile * COLUMNS
        c = left + tl.arange(0, COLUMNS)
        dots = products(
            rows, columns, top, left, num_rows, num_columns, WIDTH, ROWS, COLUMNS, FEATURES, EVEN, PRECISION
        )
        logits = dots * scale_now
        if KIND == IGNORE:
            left_out = equal(row_codes, column_codes, r, c, num_rows, num_columns) & ~pairs(r, c, gap, first, last)
            logits = tl.where(left_out, float("-inf"), logits)
        if not EVEN:
            inside = (r < num_rows)[:, None] & (c < num_columns)[None, :]
            logits = tl.where(inside, logits, float("-inf"))
        largest = tl.maximum(largest, tl.max(logits, 1))
        tl.store(column_parts + row_tile.to(tl.int64) * num_columns + c, tl.max(logits, 0), mask=c < num_columns)
    tl.store(row_parts + group.to(tl.int64) * num_rows + r, largest, mask=r < num_rows)


@triton.jit(do_not_specialize=VARYING)
def _gradients(
    rows,
    columns,
    scale,
    row_shift,
    column_shift,
    row_codes,
    column_codes,
    row_weight,
    column_weight,
    row_positive,
    column_positive,
    factor,
    strip,
    pitch,
    num_rows,
    num_columns,
    gap,
    first,
    last,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    TRACKED: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """strip [num_rows, pitch] = factor d losses / d logits; one tile a program, GROUP row tiles at a time."""
    row_tile, column_tile = tl.swizzle2d(
        tl.program_id(0) // tl.cdiv(num_columns, COLUMNS),
        tl.program_id(0) % tl.cdiv(num_columns, COLUMNS),
        tl.cdiv(num_rows, ROWS),
        tl.cdiv(num_columns, COLUMNS),
        GROUP,
    )
    top, start = row_tile * ROWS, column_tile * COLUMNS
    r = top + tl.arange(0, ROWS)
    scale_now = tl.load(scale)
    by_row = tl.load(row_weight + r, mask=r < num_rows, other=0.0)
    less_row = tl.load(row_positive + r, mask=r < num_rows, other=0.0)
    dots = products(rows, columns, top, start, num_rows, num_columns, WIDTH, ROWS, COLUMNS, FEATURES, EVEN, PRECISION)
    for part in tl.static_range(PARTS):
        found = parts(dots, ROWS, COLUMNS, PARTS)[part]
        left = start + part * (COLUMNS // PARTS)
        c = left + tl.arange(0, COLUMNS // PARTS)
        is_crossed = crosses(top, left, gap, first, last, ROWS, COLUMNS // PARTS)
        row_part, column_part = _exponentials(
            found,
            scale_now,
            row_shift,
            column_shift,
            r,
            c,
            num_rows,
            num_columns,
            is_crossed,
            gap,
            first,
            last,
            TRACKED,
        )
        by_column = tl.load(column_weight + c, mask=c < num_columns, other=0.0)
        if TRACKED:
            gradient = row_part * by_row[:, None] + column_part * by_column[None, :]
        else:
            gradient = row_part * (by_row[:, None] + by_column[None, :])
        if KIND == IGNORE:
            left_out = equal(row_codes, column_codes, r, c, num_rows, num_columns) & ~pairs(r, c, gap, first, last)
            gradient = tl.where(left_out, 0.0, gradient)
        if KIND == POSITIVES:
            less_column = tl.load(column_positive + c, mask=c < num_columns, other=0.0)
            positive = equal(row_codes, column_codes, r, c, num_rows, num_columns) | pairs(r, c, gap, first, last)
            gradient -= tl.where(positive, less_row[:, None] + less_column[None, :], 0.0)
        else:
            if is_crossed:
                gradient -= tl.where(pairs(r, c, gap, first, last), less_row[:, None], 0.0)
        if SCALED:
            gradient *= tl.load(factor)
        at = strip + r.to(tl.int64)[:, None] * pitch + c[None, :]
        if EVEN:
            tl.store(at, gradient.to(strip.dtype.element_ty))
        else:
            inside = (r < num_rows)[:, None] & (c < num_columns)[None, :]
            tl.store(at, gradient.to(strip.dtype.element_ty), mask=inside)


def sums(rows: Tensor, columns: Tensor, scale: Tensor, shifts: Shifts, pairing: Pairing) -> Sums:
    rows, columns = rows.contiguous(), columns.contiguous()
    by_row, by_column, positives = (_zeros(len(x), rows) for x in (rows, columns, rows))
    several = pairing.duplicates == "positives"
    extra = _zeros(len(columns), rows) if several else None
    for launch in Plan.of("softmax", rows, pairing).launches(len(rows), len(columns)):
        r, c = launch.rows, launch.columns
        row_parts, column_parts = launch.by_row(rows.device), launch.by_column(rows.device)
        more_by_row = launch.by_row(rows.device) if several else None
        more_by_column = launch.by_column(rows.device) if several else None
        _sums[launch.row_tiles, launch.groups](
            rows[r],
            columns[c],
            scale,
            *_of_block(shifts, r, c),
            *launch.codes,
            row_parts,
            column_parts,
            positives[r],
            more_by_row,
            more_by_column,
            *launch.numbers,
            launch.share,
            EVEN=launch.even,
            TRACKED=shifts.column is not None,
            KIND=DUPLICATES[launch.kind],
            **launch.options(rows),
        )
        by_row[r] += row_parts.sum(0)
        by_column[c] += column_parts.sum(0)
        if extra is not None and more_by_row is not None and more_by_column is not None:
            positives[r] += more_by_row.sum(0)
            extra[c] += more_by_column.sum(0)
    return Sums(by_row, by_column, positives, extra)


def maxima(rows: Tensor, columns: Tensor, scale: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    rows, columns = rows.contiguous(), columns.contiguous()
    by_row, by_column = (_zeros(len(x), rows).fill_(-torch.inf) for x in (rows, columns))
    for launch in Plan.of("softmax", rows, pairing).launches(len(rows), len(columns)):
        r, c = launch.rows, launch.columns
        row_parts, column_parts = launch.by_row(rows.device), launch.by_column(rows.device)
        _maxima[launch.row_tiles, launch.groups](
            rows[r],
            columns[c],
            scale,
            *launch.codes,
            row_parts,
            column_parts,
            *launch.numbers,
            launch.share,
            EVEN=launch.even,
            KIND=DUPLICATES[launch.kind],
            **launch.options(rows),
        )
        by_row[r] = torch.maximum(by_row[r], row_parts.amax(0))
        by_column[c] = torch.maximum(by_column[c], column_parts.amax(0))
    return by_row, by_column


def gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    shifts: Shifts,
    pairing: Pairing,
    weights: Weights,
    d_rows: Tensor | None,
    need_columns: bool,
    gradient_dtype: torch.dtype | None = None,
) -> Tensor | None:
    rows, columns, dtype = rows.contiguous(), columns.contiguous(), gradient_dtype or rows.dtype
    d_columns = torch.zeros_like(columns, dtype=torch.float32) if need_columns else None
    factor = power_of_two_below(weights.largest, LARGEST) if dtype == torch.float16 else None
    plan, by_column = Plan.of("softmax", rows, pairing), weights.column_positive
    for r, c, strip in strips(rows, columns, d_rows, d_columns, dtype, factor):
        launch = plan.launch(r, c)
        _gradients[(launch.row_tiles * launch.column_tiles,)](
            rows[r],
            columns[c],
            scale,
            *_of_block(shifts, r, c),
            *launch.codes,
            weights.row[r].contiguous(),
            weights.column[c].contiguous(),
            weights.positive[r].contiguous(),
            None if by_column is None else by_column[c].contiguous(),
            factor,
            strip,
            strip.stride(0),
            *launch.numbers,
            EVEN=launch.even,
            TRACKED=shifts.column is not None,
            KIND=DUPLICATES[launch.kind],
            SCALED=factor is not None,
            GROUP=GROUP,
            **launch.options(rows),
        )
    return d_columns


def _zeros(count: int, like: Tensor) -> Tensor:
    return torch.zeros(count, dtype=torch.float32, device=like.device)


def _of_block(shifts: Shifts, r: slice, c: slice) -> tuple[Tensor, Tensor | None]:
    if shifts.column is None:
        return shifts.row, None
    return shifts.row[r].contiguous(), shifts.column[c].contiguous()
