# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The same in Triton: logits live in registers, a tile at a time, and leave as a row's loss and as logit gradients.

A logit costs one exponential, and one reciprocal where gradients are needed. log(1 + x) is a polynomial: it keeps the
last bits of the millions of small losses that good negatives have, which the hardware's logarithm of 1 + x loses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.kernels.fused import DUPLICATES, IGNORE, LOG2E, POSITIVES, crosses, equal, pairs, parts, products
from pretrain.kernels.launches import VARYING, Launch, Plan
from pretrain.kernels.pairing import Pairing
from pretrain.kernels.sigmoid_contrastive.loss import Swept
from pretrain.kernels.strips import strips

FP16_FACTOR = 16384.0
"""What fp16 logit gradients, at most 1, are multiplied by: those of good negatives stay normal, none overflows."""


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, relative error below 1.5e-7, to which the sum in fp32 contributes three quarters.

    x (1 + x q(x)) with q of degree 7, fitted to the least largest relative error (iteratively reweighted squares at
    4000 Chebyshev points).
    """
    q = tl.fma(x, 0.005364822689443827, -0.030065786093473434)
    q = tl.fma(x, q, 0.07920452207326889)
    q = tl.fma(x, q, -0.13753801584243774)
    q = tl.fma(x, q, 0.191536545753479)
    q = tl.fma(x, q, -0.24857163429260254)
    q = tl.fma(x, q, 0.3332132399082184)
    q = tl.fma(x, q, -0.49999648332595825)
    return tl.fma(x, q, 1.0) * x


@triton.jit(do_not_specialize=VARYING)
def _sweep(
    rows,
    columns,
    scale,
    bias,
    row_codes,
    column_codes,
    loss_parts,
    bias_parts,
    strip,
    pitch,
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
    STRIP: tl.constexpr,
    BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Program (t, g) takes row tile t and column tiles g share .. (g + 1) share.

    loss_parts and bias_parts [groups, num_rows]: each row's loss, and the sum of its logits' gradients;
    strip [num_rows, pitch] = FACTOR d loss / d logits.
    """
    row_tile, group = tl.program_id(0), tl.program_id(1)
    top = row_tile * ROWS
    r = top + tl.arange(0, ROWS)
    scale_now, bias_now = tl.load(scale), tl.load(bias)
    loss, d_bias = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
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
            # A positive's logit changes its sign before the softplus: softplus(z) - z would lose a good pair's loss.
            z = tl.fma(found, scale_now, bias_now)
            if KIND == POSITIVES:
                positive = equal(row_codes, column_codes, r, c, num_rows, num_columns) | pairs(r, c, gap, first, last)
                z = tl.where(positive, -z, z)
            else:
                if is_crossed:
                    z = tl.where(pairs(r, c, gap, first, last), -z, z)
            small = tl.exp2(tl.abs(z) * -LOG2E)
            losses = tl.maximum(z, 0.0) + log1p(small)
            if KIND == IGNORE:
                left_out = equal(row_codes, column_codes, r, c, num_rows, num_columns) & ~pairs(r, c, gap, first, last)
                losses = tl.where(left_out, 0.0, losses)
            if not EVEN:
                inside = (r < num_rows)[:, None] & (c < num_columns)[None, :]
                losses = tl.where(inside, losses, 0.0)
            loss += tl.sum(losses, 1)
            if STRIP or BIAS:
                gradient = tl.where(z >= 0, 1.0, small) / (1.0 + small)
                if KIND == POSITIVES:
                    gradient = tl.where(positive, -gradient, gradient)
                else:
                    if is_crossed:
                        gradient = tl.where(pairs(r, c, gap, first, last), -gradient, gradient)
                if KIND == IGNORE:
                    gradient = tl.where(left_out, 0.0, gradient)
                if BIAS:
                    if EVEN:
                        d_bias += tl.sum(gradient, 1)
                    else:
                        d_bias += tl.sum(tl.where(inside, gradient, 0.0), 1)
                if STRIP:
                    at = strip + r.to(tl.int64)[:, None] * pitch + c[None, :]
                    if EVEN:
                        tl.store(at, (gradient * FACTOR).to(strip.dtype.element_ty))
                    else:
                        tl.store(at, (gradient * FACTOR).to(strip.dtype.element_ty), mask=inside)
    line = group.to(tl.int64) * num_rows + r
    tl.store(loss_parts + line, loss, mask=r < num_rows)
    if BIAS:
        tl.store(bias_parts + line, d_bias, mask=r < num_rows)


def sweep(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairing: Pairing,
    d_rows: Tensor | None,
    need_columns: bool,
    need_bias: bool,
    gradient_dtype: torch.dtype | None = None,
) -> Swept:
    rows, columns, dtype = rows.contiguous(), columns.contiguous(), gradient_dtype or rows.dtype
    plan = Plan.of("sigmoid", rows, pairing)
    losses = torch.zeros(len(rows), dtype=torch.float32, device=rows.device)
    d_biases = torch.zeros_like(losses) if need_bias else None
    d_columns = torch.zeros_like(columns, dtype=torch.float32) if need_columns else None
    if d_rows is None and d_columns is None:
        for launch in plan.launches(len(rows), len(columns)):
            _run(launch, rows, columns, scale, bias, losses, d_biases, None, 1.0)
    else:
        factor = FP16_FACTOR if dtype == torch.float16 else 1.0
        undo = torch.full((), factor, device=rows.device) if factor != 1 else None
        for r, c, strip in strips(rows, columns, d_rows, d_columns, dtype, undo):
            _run(plan.launch(r, c), rows, columns, scale, bias, losses, d_biases, strip, factor)
    return Swept(losses.sum(), None if d_biases is None else d_biases.sum(), d_columns)


def _run(
    launch: Launch,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    losses: Tensor,
    d_biases: Tensor | None,
    strip: Tensor | None,
    factor: float,
) -> None:
    """Add a rectangle's losses and bias gradients to their rows, and fill its strip."""
    loss_parts = launch.by_row(rows.device)
    bias_parts = None if d_biases is None else launch.by_row(rows.device)
    _sweep[launch.row_tiles, launch.groups](
        rows[launch.rows],
        columns[launch.columns],
        scale,
        bias,
        *launch.codes,
        loss_parts,
        bias_parts,
        strip,
        0 if strip is None else strip.stride(0),
        *launch.numbers,
        launch.share,
        EVEN=launch.even,
        KIND=DUPLICATES[launch.kind],
        STRIP=strip is not None,
        BIAS=bias_parts is not None,
        FACTOR=factor,
        **launch.options(rows),
    )
    losses[launch.rows] += loss_parts.sum(0)
    if d_biases is not None and bias_parts is not None:
        d_biases[launch.rows] += bias_parts.sum(0)
