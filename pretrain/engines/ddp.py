"""Every rank holds the whole model; gradients are averaged, bucket by bucket, while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.engines.single import Single
from pretrain.model import DualEncoder


class Ddp(Single):
    """See `base.Engine`."""

    worlds = range(2, 1 << 20)
    wrapped: DistributedDataParallel

    def wrap(self, model: DualEncoder) -> nn.Module:
        norms = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in model.modules())
        device_ids = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=device_ids, broadcast_buffers=norms, gradient_as_bucket_view=True
        )

    @contextmanager
    def averaging(self, on: bool) -> Iterator[None]:
        with nullcontext() if on else self.wrapped.no_sync():
            yield
