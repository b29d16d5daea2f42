"""The equations that objectives share. The only door to the kernels; blocks and ranks are walked here and nowhere else.

All of it is fp32 (fp64 for fp64 features) whatever autocast says. None of it makes a tensor the size of the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.kernels.sigmoid_contrastive import sigmoid_contrastive
from pretrain.kernels.softmax_contrastive import softmax_contrastive, softmax_maxima
from pretrain.kernels.tiling import wide
from pretrain.values import Pairs

NORM_PRODUCT = 1.01
"""Largest product of an image's and a text's norm that the common shift allows for: 1, rounded to bf16."""
RANGE = {torch.float32: (-60.0, 72.0), torch.float64: (-600.0, 600.0)}
"""Logarithms between which a sum of exponentials is exact: below, single terms may have vanished; above, the reciprocal
that becomes its gradient does once it is divided by 2 B."""


def symmetric_cross_entropy(pairs: Pairs, label_smoothing: float = 0.0) -> Tensor:
    """Mean of the cross-entropies of each image against all texts and of its text against all images.

    Args:
        pairs: B rows of this rank; N columns of all ranks come through its exchange.
        label_smoothing: share of the target that is spread evenly over all N columns.

    Returns:
        [B] nats.

    Raises:
        ValueError: there are no rows.

    Source: Radford et al. 2021, fig. 3 (arXiv:2103.00020); smoothing: Szegedy et al. 2016, section 7
    (arXiv:1512.00567).
    """
    found = _common_shift_sums(pairs) or _tracked_sums(pairs)
    by_image = _cross_entropy(found.rows, found.positives, found.row_shift)
    by_text = _cross_entropy(found.columns, found.positives, found.column_shift)
    losses = (by_image + by_text) / 2
    if not label_smoothing:
        return losses
    return losses + label_smoothing * (found.positives - _mean_logits(pairs))


def pairwise_sigmoid(pairs: Pairs) -> Tensor:
    """Binary cross-entropy of every image with every text: summed over the N texts, mean over this rank's B images.

    Returns:
        [] nats.

    Raises:
        ValueError: there are no rows.

    Source: Zhai et al. 2023, eq. 1 (arXiv:2303.15343).
    """
    image, text, scale = wide(pairs.image), wide(pairs.text), wide(pairs.logit_scale)
    bias = torch.zeros_like(scale) if pairs.logit_bias is None else wide(pairs.logit_bias)
    first = pairs.exchange.rank * len(image)
    blocks = pairs.exchange.blocks(text)
    total = sum(
        (sigmoid_contrastive(image, b.columns, scale, bias, first - b.start) for b in blocks), scale.new_zeros(())
    )
    _require_rows(pairs)
    return total / len(image)


@dataclass(frozen=True)
class _Sums:
    """Sums of exp(logit - shift), over all N columns and over all N rows."""

    rows: Tensor
    """[B] by image."""
    columns: Tensor
    """[B] by this rank's texts."""
    positives: Tensor
    """[B] logits of the pairs."""
    row_shift: Tensor
    """[] or [B]"""
    column_shift: Tensor
    """[] or [B]"""


def _common_shift_sums(pairs: Pairs) -> _Sums | None:
    """One shift for all logits, hence one exponential each; None, on all ranks alike, where it does not suit them.

    It always suits scales up to about 50, and larger ones unless some row's best cosine is well below 0. To know it the
    CPU waits for the device once.
    """
    exchange, count = pairs.exchange, len(pairs.image) * pairs.exchange.size
    low, high = RANGE[wide(pairs.image).dtype]
    scale = wide(pairs.logit_scale.detach())
    shift = (scale.abs() * NORM_PRODUCT + math.log(count or 1) - high).clamp(min=0)
    rows, partial, positives = _walk(pairs, shift, None)
    _require_rows(pairs)
    unfit = (~_within(rows, low)).sum().to(rows.dtype)
    # The vote of each rank's rows travels with the sums, which all ranks see alike.
    total = exchange.sum(torch.cat([partial, unfit[None]]))
    columns = total[:-1]
    if not bool((total[-1] == 0) & _within(columns, low).all()):
        return None
    return _Sums(rows, _own(pairs, columns), positives, shift, shift)


def _tracked_sums(pairs: Pairs) -> _Sums:
    """Every row and column shifted by its own maximum: right for any finite logits, at three times the cost."""
    text, parts = wide(pairs.text.detach()), {}
    by_row = torch.full_like(wide(pairs.image[:, 0]), -torch.inf)
    with torch.no_grad():
        for block in pairs.exchange.blocks(text):
            found = softmax_maxima(wide(pairs.image), block.columns, wide(pairs.logit_scale))
            by_row, parts[block.start] = torch.maximum(by_row, found[0]), found[1]
        by_column = pairs.exchange.max(_in_order(parts))
    rows, partial, positives = _walk(pairs, by_row, by_column)
    columns = pairs.exchange.sum(partial)
    return _Sums(rows, _own(pairs, columns), positives, by_row, _own(pairs, by_column))


def _walk(pairs: Pairs, shift: Tensor, column_shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums [B] over all columns, column sums [N] over this rank's rows, positives [B]."""
    image, scale = wide(pairs.image), wide(pairs.logit_scale)
    first = pairs.exchange.rank * len(image)
    rows, positives, parts = torch.zeros_like(image[:, 0]), torch.zeros_like(image[:, 0]), {}
    for block in pairs.exchange.blocks(wide(pairs.text)):
        stop = block.start + len(block.columns)
        own_shift = None if column_shift is None else column_shift[block.start : stop]
        found = softmax_contrastive(image, block.columns, scale, shift, own_shift, first - block.start)
        rows, positives = rows + found.row_sums, positives + found.positives
        parts[block.start] = found.column_sums
    return rows, _in_order(parts), positives


def _cross_entropy(sums: Tensor, positives: Tensor, shift: Tensor) -> Tensor:
    """log(sum) + shift - positive, to fp32's last bits: near convergence sum = exp(positive - shift), nearly.

    Dividing by the positive's own exponential before the logarithm keeps what their difference would cancel. Where that
    exponential is negligible the pivot stays 15 below the sum, so that nothing overflows.
    """
    shifted = positives - shift
    pivot = torch.maximum(shifted, sums.log() - 15).detach()
    return (sums * (-pivot).exp()).log() + (pivot - shifted)


def _mean_logits(pairs: Pairs) -> Tensor:
    """[B] mean over all columns of the logits of each image and of its text, by way of the mean feature: O(B D)."""
    image, text = wide(pairs.image), wide(pairs.text)
    means = pairs.exchange.sum(torch.stack([image.sum(0), text.sum(0)])) / (len(image) * pairs.exchange.size)
    return wide(pairs.logit_scale) * ((image * means[1]).sum(1) + (text * means[0]).sum(1)) / 2


def _within(sums: Tensor, low: float) -> Tensor:
    return (sums >= math.exp(low)) & (sums < torch.inf)


def _own(pairs: Pairs, columns: Tensor) -> Tensor:
    """This rank's part [B] of something [N]."""
    first = pairs.exchange.rank * len(pairs.image)
    return columns[first : first + len(pairs.image)]


def _in_order(parts: dict[int, Tensor]) -> Tensor:
    return torch.cat([parts[start] for start in sorted(parts)])


def _require_rows(pairs: Pairs) -> None:
    """After the exchange, so that a rank without rows does not leave the others waiting in it."""
    if not len(pairs.image) or pairs.image.shape != pairs.text.shape:
        shapes = f"image features {list(pairs.image.shape)} and text features {list(pairs.text.shape)}"
        raise ValueError(f"{shapes} must both be [B, D] with at least one row")
