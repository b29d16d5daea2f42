"""Every rank holds the whole model; gradients are averaged, bucket by bucket, while the backward pass still runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.engines.single import Single
from pretrain.model import DualEncoder

log = logging.getLogger(__name__)


class Ddp(Single):
    """See `base.Engine`."""

    worlds = range(2, 1 << 20)
    wrapped: DistributedDataParallel

    def wrap(self, model: DualEncoder) -> nn.Module:
        norms = model.has_batch_norms
        if norms:
            log.warning(
                "the towers have BatchNorm, which normalises over each rank's rows: results depend on the ranks"
            )
        device_ids = [self.world.device] if self.world.device.type == "cuda" else None
        # torch 2.13 renames the option and warns about the name that every earlier release has.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": norms
        }
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **buffers)

    @contextmanager
    def averaging(self, on: bool) -> Iterator[None]:
        with nullcontext() if on else self.wrapped.no_sync():
            yield
