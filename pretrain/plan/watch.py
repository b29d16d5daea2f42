"""What operators cost as they are called: FLOP, bytes moved, and bytes held at every moment. No data is needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATTENTION = "scaled_dot_product"
FREE = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)
"""Operators that take memory and no time."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what happens inside it; made for fake tensors, and as true of real ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.attention = self.moved = self.calls = 0
        self._events: list[tuple[int, int]] = []
        """(storage, bytes that it took or gave back), as they happened."""
        self._known: dict[int, int] = {}
        """Address of a living storage's handle -> its number."""
        self._count = 0

    @property
    def now(self) -> int:
        """A moment, for `levels` and `held`."""
        return len(self._events)

    def held(self, until: int, without: Iterable[Tensor] = ()) -> int:
        """Bytes that live at a moment and were made in here."""
        left_out = self._numbers(without)
        return sum(size for number, size in self._events[:until] if number not in left_out)

    def levels(self, start: int, stop: int, without: Sequence[Tensor] = ()) -> list[int]:
        """Bytes that live at each moment between two, of tensors made in here."""
        left_out = self._numbers(without)
        changes = [0 if number in left_out else size for number, size in self._events[start:stop]]
        return list(accumulate(changes, initial=self.held(start, without)))

    def _numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        return {self._known[key] for tensor in tensors if (key := tensor.untyped_storage()._cdata) in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        taken = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        if func.namespace == "aten" and not func.is_view and func._overloadpacket not in FREE:
            self._reckon(func, args, given, out, [*taken, *made])
        old = {tensor.untyped_storage()._cdata for tensor in taken}
        for storage in (tensor.untyped_storage() for tensor in made):
            if storage._cdata not in old and storage._cdata not in self._known:
                self._see(storage)
        return out

    def _reckon(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        self.calls += 1
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None:
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        elif ATTENTION in str(func):
            self.attention += int(formula(*args, **kwargs, out_val=out))
        else:
            self.products += int(formula(*args, **kwargs, out_val=out))

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._count += 1
        self._known[key] = self._count
        self._events.append((self._count, size))
        weakref.finalize(storage, self._gone, key, self._count, size)

    def _gone(self, key: int, number: int, size: int) -> None:
        if self._known.get(key) == number:
            del self._known[key]
        self._events.append((number, -size))


def _attended(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and mixture: 2 products of L x M x (head)."""
    *rows, length, width = query.shape
    return int(2 * torch.Size(rows).numel() * length * key.shape[-2] * (width + value.shape[-1]))


def _attended_back(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * _attended(query, key, value)


def _convolved_back(grad: Any, pixels: Any, weight: Any, *rest: Any, **__: Any) -> int:
    """Each gradient takes what the pass forward took; torch's own count forgets that channels are in groups."""
    transposed, mask = rest[4], rest[7]
    places = (pixels if transposed else grad).shape
    return int(2 * places[0] * torch.Size(places[2:]).numel() * weight.numel() * sum(mask[:2]))


def _formulas() -> dict[Any, Callable[..., Any]]:
    """torch's own, but for attention, whichever kernel carries it out, and convolutions of channels in groups."""
    found: dict[Any, Callable[..., Any]] = dict(flop_registry)
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        found[getattr(torch.ops.aten, f"_scaled_dot_product_{name}")] = _attended
        found[getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward")] = _attended_back
    found[torch.ops.aten.convolution_backward] = _convolved_back
    return found


FORMULAS = _formulas()
