"""Every rank holds the whole model; gradients are averaged, bucket by bucket, while the backward pass still runs."""

# Annotations stay objects here: DDP compares those of a hook with its own types.
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from pretrain.engines.single import Named, Single, warn_of_batch_norms
from pretrain.model import DualEncoder
from pretrain.values import Announce, Batch, Features


class Ddp(Single):
    """See `base.Engine`."""

    worlds = range(2, 1 << 20)
    wrapped: DistributedDataParallel

    def wrap(self, model: DualEncoder) -> nn.Module:
        warn_of_batch_norms(model)
        device_ids = [self.world.device] if self.world.device.type == "cuda" else None
        # torch 2.13 renames the option and warns about the name that every earlier release has.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {buffers: model.has_batch_norms, "static_graph": self.parallel.static_graph}
        wrapped = DistributedDataParallel(Named(model), device_ids=device_ids, gradient_as_bucket_view=True, **options)
        if self.parallel.reduce_dtype == "bf16":
            wrapped.register_comm_hook(None, _sum_in_bf16)
        self._rehearsed = False
        return wrapped

    def forward(self, batch: Batch, announce: Announce | None = None) -> Features:
        if torch.is_grad_enabled() and not self._rehearsed:
            self._rehearsed = True
            self._rehearse(batch)  # all of it: compiled towers take another size for a dynamic one
        return super().forward(batch, announce)

    def _rehearse(self, batch: Batch) -> None:
        """A pass whose gradients are dropped, before the first step of a start; it leaves no other trace.

        DDP lays its buckets out anew after its first backward pass, in the order in which gradients came; where a
        gradient lies decides in which order three or more ranks are summed. The first step of a start would round
        unlike the same step of a run that was never stopped.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        on_gpu = [self.world.device] if self.world.device.type == "cuda" else []
        before, self.wrapped.require_backward_grad_sync = self.wrapped.require_backward_grad_sync, True
        with torch.random.fork_rng(devices=on_gpu):
            features = super().forward(batch)
            torch.autograd.backward(torch.stack([tensor.sum() for tensor in features.tensors().values()]).sum())
        self.wrapped.require_backward_grad_sync = before
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, value in buffers:
            buffer.copy_(value)

    @contextmanager
    def averaging(self, on: bool) -> Iterator[None]:
        with nullcontext() if on else self.wrapped.no_sync():
            yield


def _sum_in_bf16(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """torch's own hook. By its own name DDP refuses it without CUDA, though gloo sums bf16 as well."""
    return default_hooks.bf16_compress_hook(None, bucket)  # type: ignore[arg-type]
