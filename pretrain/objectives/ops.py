"""The equations that objectives share. The only door to the kernels; columns of all ranks are asked for here alone.

Statistics are fp32 (fp64 for fp64 features) whatever autocast says. None of it makes a tensor the size of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.kernels.pairing import Duplicates
from pretrain.kernels.sigmoid_contrastive import sigmoid_contrastive_over
from pretrain.kernels.softmax_contrastive import softmax_contrastive_over
from pretrain.kernels.tiling import beside, wide
from pretrain.values import Pairs

__all__ = ["Duplicates", "pairwise_sigmoid", "symmetric_cross_entropy"]


def symmetric_cross_entropy(pairs: Pairs, label_smoothing: float = 0.0, duplicates: Duplicates = "negatives") -> Tensor:
    """Mean of the cross-entropies of each image against all texts and of its text against all images.

    Args:
        pairs: B rows of this rank; N columns of all ranks come through its exchange.
        label_smoothing: share of the target that is spread evenly over all N columns.
        duplicates: what other entries of the same sample (equal `pairs.ids`) count as.

    Returns:
        [B] nats. `pairs.mean` makes the loss of them.

    Raises:
        ValueError: the features do not fit together, or nobody has rows; on every rank while batches are checked.

    Source: Radford et al. 2021, fig. 3 (arXiv:2103.00020); smoothing: Szegedy et al. 2016, section 7
    (arXiv:1512.00567); several positives: Khosla et al. 2020, eq. 2 (arXiv:2004.11362).
    """
    image, text, options = _door(pairs, duplicates)
    losses = softmax_contrastive_over(image, text, beside(pairs.logit_scale, image), **options)
    return losses + label_smoothing * (_positives(pairs) - _mean_logits(pairs)) if label_smoothing else losses


def pairwise_sigmoid(pairs: Pairs, duplicates: Duplicates = "negatives") -> Tensor:
    """Binary cross-entropy of every image with every text: summed over the N texts, mean over images.

    Args:
        duplicates: as above.

    Returns:
        [] nats.

    Raises:
        ValueError: as above.

    Source: Zhai et al. 2023, eq. 1 (arXiv:2303.15343).
    """
    image, text, options = _door(pairs, duplicates)
    scale = beside(pairs.logit_scale, image)
    bias = torch.zeros_like(scale) if pairs.logit_bias is None else beside(pairs.logit_bias, image)
    return pairs.mean(sigmoid_contrastive_over(image, text, scale, bias, **options))


def _door(pairs: Pairs, duplicates: Duplicates) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rows, the columns that take a gradient, and what a kernel needs besides."""
    trip, how = pairs.trip, pairs.exchange.options
    text, columns = pairs.text, trip
    if pairs.image.requires_grad:  # else no backward is left to travel behind, and the scale reads what must be there
        text, columns = pairs.exchange.receiver(text, trip)
    options: dict[str, Any] = {"columns": columns, "impl": how.impl, "gradient_dtype": how.gradients}
    options["products"] = pairs.image.to(trip.mine.dtype)
    if duplicates != "negatives":
        if pairs.ids is None:
            raise ValueError(f"duplicates {duplicates!r} needs sample ids, and this batch has none")
        options |= {"duplicates": duplicates, "row_ids": pairs.ids, "column_ids": trip.spread(pairs.ids)}
    return pairs.image, text, options


def _positives(pairs: Pairs) -> Tensor:
    return wide(pairs.logit_scale) * (wide(pairs.image) * wide(pairs.text)).sum(1)


def _mean_logits(pairs: Pairs) -> Tensor:
    """[B] mean over all columns of the logits of each image and of its text, by way of the mean feature: O(B D)."""
    image, text = wide(pairs.image), wide(pairs.text)
    means = pairs.exchange.sum(torch.stack([image.sum(0), text.sum(0)])) / pairs.trip.count
    return wide(pairs.logit_scale) * ((image * means[1]).sum(1) + (text * means[0]).sum(1)) / 2
