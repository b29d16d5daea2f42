"""A 64-bit hash of weights that are the same on several ranks, to see when a machine has computed wrongly.

The hash of a tensor is the sum, modulo 2^64, of a mix of each number's bits with its place. So it knows where numbers
are, does not depend on the order of summation, and the hashes of a tensor's parts add up to the whole one's: engines
and numbers of ranks give one hash for one model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from pretrain.world import World

_CHUNK = 1 << 22
"""Numbers hashed at a time: the workspace is a few times 32 MB."""
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of splitmix64, as signed numbers. Source: Steele, Lea and Flood 2014."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Part:
    """The numbers of a tensor that this rank holds."""

    name: str
    values: Tensor
    start: int
    """Place of the first one in the whole tensor, flattened."""
    spread: bool
    """Whether other ranks hold other parts; ranks that hold the part with the same start must agree."""


@dataclass(frozen=True)
class Difference:
    """Ranks do not hold the same weights."""

    name: str
    """The first tensor that differs."""
    ranks: tuple[int, ...]
    """Those in the minority; of two equal camps, those without the lowest rank."""

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"{self.name} differs on rank{'s' * (len(self.ranks) > 1)} {ranks} from what the others hold"


def comparable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that `parts` can take; none where DeepSpeed has cut them up. Buffers are no rank's but its own."""
    params = dict(model.named_parameters())
    return {} if any(hasattr(param, "ds_tensor") for param in params.values()) else dict(params)


def parts(named: Mapping[str, Tensor]) -> list[Part]:
    """What this rank holds of tensors that may be spread over ranks by FSDP2, by name."""
    return [_part(name, tensor.detach()) for name, tensor in named.items()]


@torch.no_grad()
def hashes(found: Sequence[Part]) -> Tensor:
    """[P] int64, on the parts' device where they share one; nothing waits for it."""
    return torch.stack([_hash(part.values, part.start) for part in found])


def compare(found: Sequence[Part], world: World) -> tuple[str, Difference | None]:
    """The hash of the whole model, 16 hexadecimal digits, and where ranks differ. Collective; one copy to the host.

    Every rank gets the same answer.
    """
    own = [(part.start if part.spread else -1, value) for part, value in zip(found, _on_host(found), strict=True)]
    everyone = world.share(own)
    totals = []
    for n, part in enumerate(found):
        held = [rank[n] for rank in everyone]
        if ranks := _minority(held):
            return "", Difference(part.name, ranks)
        totals.append(sum(dict(held).values()))
    return combine((part.name for part in found), totals), None


def of_whole(named: Mapping[str, Tensor]) -> str:
    """The hash that `compare` gives, of tensors that lie whole on this rank."""
    found = parts(named)
    return combine(named, _on_host(found))


def combine(names: Iterable[str], totals: Iterable[int]) -> str:
    """One hash of the hashes of named tensors."""
    rows = sorted(zip(names, totals, strict=True))
    return xxhash.xxh3_64_hexdigest("".join(f"{name} {total % (1 << 64):016x}\n" for name, total in rows).encode())


def _on_host(found: Sequence[Part]) -> list[int]:
    values: list[int] = hashes(found).tolist() if found else []
    return values


def _minority(held: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Ranks whose hash is not what most ranks have that hold the same numbers."""
    camps: dict[int, dict[int, list[int]]] = {}
    for rank, (start, value) in enumerate(held):
        camps.setdefault(start, {}).setdefault(value, []).append(rank)
    largest = {start: max(values.values(), key=len) for start, values in camps.items()}
    odd = (
        rank for s, values in camps.items() for ranks in values.values() if ranks is not largest[s] for rank in ranks
    )
    return tuple(sorted(odd))


def _part(name: str, tensor: Tensor) -> Part:
    if not isinstance(tensor, DTensor):
        return Part(name, tensor, 0, False)
    start = 0
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, f"{name} is not cut along its first dimension"
            rows = -(-tensor.shape[0] // tensor.device_mesh.size(dimension))  # as torch.chunk cuts
            turn = tensor.device_mesh.get_local_rank(dimension)
            start = min(rows * turn, tensor.shape[0]) * (tensor.numel() // max(1, tensor.shape[0]))
    return Part(name, tensor.to_local(), start, True)


def _hash(values: Tensor, start: int) -> Tensor:
    bits = values.contiguous().reshape(-1)
    bits = bits.view(torch.uint8) if bits.dtype == torch.bool else bits.view(_INTEGERS[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first in range(0, len(bits), _CHUNK):
        chunk = bits[first : first + _CHUNK].to(torch.int64)
        places = torch.arange(start + first, start + first + len(chunk), device=values.device)
        total += _mix(chunk + _mix(places * _GOLDEN)).sum()
    return total


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finisher, but for shifts that keep the sign: any fixed mix of all bits will do."""
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)
