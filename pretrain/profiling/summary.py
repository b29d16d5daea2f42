"""A profile in words: what to read before opening a trace."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.profiling.memory import Use


def summary(what: str, seconds: Mapping[str, float], memory: Mapping[str, Use], peak_bytes: int, operators: str) -> str:
    """Text.

    Args:
        what: was recorded, where.
        seconds: a step, by phase.
        memory: by phase.
        peak_bytes: most that this rank has used since it began.
        operators: a table of them.
    """
    total = sum(seconds.values()) or 1.0
    times = [f"  {name:12} {spent:10.6f} s  {spent / total:4.0%}" for name, spent in seconds.items()]
    uses = [
        f"  {name:12} {use.peak_bytes / 1e6:12.3f} MB  {use.grown_bytes / 1e6:+12.3f} MB"
        for name, use in sorted(memory.items(), key=lambda item: -item[1].peak_bytes)
    ]
    return "\n".join(
        [
            what,
            "",
            "seconds a step by phase, and share of these phases (a profiler slows what it watches)",
            *times,
            "",
            f"memory by phase: peak, growth (a CPU's from 0 on); the whole process: at most {peak_bytes / 1e6:.1f} MB",
            *uses,
            "",
            "operators by own time",
            operators,
        ]
    )
