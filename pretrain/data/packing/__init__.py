"""Pairs from elsewhere -> shards."""
