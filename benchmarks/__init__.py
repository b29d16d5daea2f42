"""Measurements and the demonstration run: `python -m benchmarks.NAME`."""
