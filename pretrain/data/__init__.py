"""From shards on disk to batches on the device; order and augmentation are pure functions of (seed, position)."""
