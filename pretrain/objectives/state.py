"""What an objective remembers between steps: buffers, so that a checkpoint holds them and a restored run goes on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMPTY = -1
"""Id of an entry that holds nothing yet."""


class Queue(nn.Module):
    """The last K features, first in first out, with the ids of their samples.

    Source: He et al. 2020, section 3.2 (arXiv:1911.05722).
    """

    features: Tensor
    """[K, D] fp32; rows whose id is EMPTY are zero."""
    ids: Tensor
    """[K] int64 sample ids."""
    cursor: Tensor
    """[] int64: where the next feature goes, which is where the oldest is once the queue is full."""

    def __init__(self, size: int, width: int) -> None:
        """Raises ValueError unless size (K) and width (D) are positive."""
        super().__init__()
        if size < 1 or width < 1:
            raise ValueError(f"queue size {size} and width {width} must be positive")
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("ids", torch.full((size,), EMPTY))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    @property
    def held(self) -> Tensor:
        """[K] bool: which entries hold a feature."""
        return self.ids != EMPTY

    @torch.no_grad()
    def enqueue(self, features: Tensor, ids: Tensor) -> None:
        """Take a batch in, the oldest entries out. No gradient flows into the queue.

        Args:
            features: [N, D] of all ranks in rank order (`exchange.gather`), so that every rank's queue stays the same.
            ids: [N] their sample ids, none of them negative.

        Raises:
            ValueError: shapes do not fit.
        """
        size, width = self.features.shape
        if features.ndim != 2 or features.shape[1] != width or ids.shape != features.shape[:1]:
            raise ValueError(
                f"queue of width {width} cannot take features {list(features.shape)}, ids {list(ids.shape)}"
            )
        count = len(features)
        kept = min(size, count)
        places = (self.cursor + torch.arange(count - kept, count, device=self.cursor.device)) % size
        self.features[places] = features[count - kept :].to(self.features.dtype)
        self.ids[places] = ids[count - kept :]
        self.cursor.copy_((self.cursor + count) % size)
