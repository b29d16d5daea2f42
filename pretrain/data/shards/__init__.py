"""Tar shards as they lie: their members, the index of them, and samples read by number."""
