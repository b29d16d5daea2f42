"""Who writes what: a tensor that is spread over ranks is written where its parts lie, one that all have by one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # as DCP's planner does


@dataclass(frozen=True)
class Piece:
    """A block of a tensor."""

    name: str
    tensor: Tensor
    """[*size]."""
    offset: tuple[int, ...]
    """Where the block starts in the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def is_whole(self) -> bool:
        """Whether the block is all of the tensor."""
        return tuple(self.tensor.shape) == self.shape


def whole(name: str, tensor: Tensor) -> Piece:
    """A tensor in one piece."""
    return Piece(name, tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape))


class Shares:
    """Hands out tensors that several ranks hold, so that each of these writes about as many bytes.

    Every rank makes the same calls and comes to the same answers without asking the others.
    """

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}

    def of(self, named: Mapping[str, Tensor], rank: int, holders: list[int]) -> list[Piece]:
        """What `rank` writes of tensors that all `holders` know, whole or in parts."""
        found = []
        order = sorted(named.items(), key=lambda item: (-item[1].numel() * item[1].element_size(), item[0]))
        for turn, (name, tensor) in enumerate(order):
            if isinstance(tensor, DTensor):
                found += _part(name, tensor, turn)
            elif self._next(holders, tensor.numel() * tensor.element_size()) == rank:
                found.append(whole(name, tensor))
        return found

    def _next(self, holders: list[int], size: int) -> int:
        chosen = min(holders, key=lambda rank: self._bytes.get(rank, 0))
        self._bytes[chosen] = self._bytes.get(chosen, 0) + size
        return chosen


def _part(name: str, tensor: DTensor, turn: int) -> list[Piece]:
    """This rank's block; nothing where it has none, or where the turn is another replica's."""
    mesh, local = tensor.device_mesh, tensor.to_local().detach()
    coordinate = list(mesh.get_coordinate() or ())
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() and coordinate[dim] != turn % mesh.size(dim):
            return []
    if not local.numel() and (tensor.numel() or any(coordinate)):
        return []
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    return [Piece(name, local, tuple(offset), tuple(tensor.shape))]
