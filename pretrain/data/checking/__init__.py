"""Shards read through, and what was found."""
