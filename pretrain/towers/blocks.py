"""The repeated blocks of both towers, whoever wrote them: what is gathered, compiled or computed again on its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

SMALLEST = 1 / 1000
"""Share of a tower below which a block stays with whatever holds it: a message of its own would not pay."""


@dataclass(frozen=True)
class Units:
    """The parts of one tower that are gathered, used and freed one after another."""

    tower: str
    """'image' or 'text'."""
    blocks: list[nn.Module]
    """Repeated blocks and large embeddings, in order."""
    whole: list[nn.Module]
    """What holds the rest of the tower, where something does that is called as a module."""
    share: float
    """Share of the tower's parameters inside `blocks`, or inside `whole` where it has no blocks."""

    def __str__(self) -> str:
        kinds = Counter(type(block).__name__.removeprefix("FSDP") for block in self.blocks or self.whole)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"{self.tower} tower: {self.share:.0%} in {named}"


def units(towers: nn.Module) -> list[Units]:
    """The units of both towers.

    Args:
        towers: open_clip's CLIP, whose text tower lies open among its own modules, or CustomTextCLIP.
    """
    return [_units(name, roots) for name, roots in parts(towers).items()]


def parts(towers: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of the image and of the text tower that are called as such; arguments as of `units`."""
    children = dict(towers.named_children())
    visual = children.pop("visual")
    return {"image": [visual], "text": [child for child in children.values() if _size(child)]}


def blocks(tower: nn.Module) -> list[nn.Module]:
    """Repeated blocks of a tower, innermost first of all: members of a list or sequence beside one of their own class.

    A stage of blocks gives its blocks; a stage without any, beside others of its class, is a block itself. Single
    layers are none: what holds a list of them may use their weights without calling them.
    """
    return list(_repeated(tower))


def _units(name: str, roots: list[nn.Module]) -> Units:
    total = sum(map(_size, roots))
    found = [block for root in roots for block in blocks(root) if _size(block) >= SMALLEST * total]
    if found:
        most = max(map(_size, found))
        modules = [module for root in roots for module in root.modules()]
        found = [module for module in modules if type(module) is nn.Embedding and _size(module) >= most] + found
    whole = [root for root in roots if any(_size(child) for child in root.children())]
    held = sum(map(_size, found or whole))
    return Units(name, found, whole, held / total)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    children = list(module.children())
    for place, child in enumerate(children):
        inner = list(_repeated(child))
        beside = children[max(place - 1, 0) : place] + children[place + 1 : place + 2]
        if inner:
            yield from inner
        elif isinstance(module, nn.ModuleList | nn.Sequential) and _is_block(child, beside):
            yield child


def _is_block(child: nn.Module, beside: list[nn.Module]) -> bool:
    return any(type(other) is type(child) for other in beside) and any(_size(part) for part in child.children())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
