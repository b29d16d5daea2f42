"""See `pretrain.towers.blocks`."""

from pretrain.towers.blocks import Units, blocks, units

__all__ = ["Units", "blocks", "units"]
