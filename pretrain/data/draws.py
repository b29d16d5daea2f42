"""Randomness as a pure function: words and permutations keyed by integers, the same under every version of Python.

Only integer arithmetic that is written out here is used, never a library's generator.
"""

from __future__ import annotations

import random

SHARDS, WINDOW, AUGMENT, REPLACE, CHUNKS, DRAW, VIEW, SOURCE = range(1, 9)
"""What a draw is for: draws for different purposes never share a key."""
_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 8


def mix(*words: int) -> int:
    """64 bits that look random and depend on every one of the integers. Source: Steele et al. 2014 (SplitMix64)."""
    state = 0
    for word in words:
        state = _finish(((state ^ (word & _MASK)) + 0x9E3779B97F4A7C15) & _MASK)
    return state


def sample_random(seed: int, position: int, attempt: int = 0) -> random.Random:
    """The randomness of one position (caption, crop, flip). Use `.random()` only: Python promises its sequence."""
    return random.Random(mix(seed, AUGMENT, position, attempt))


def view_random(seed: int, position: int, attempt: int, view: int) -> random.Random:
    """The randomness of a further view of the image or caption at a position, apart from the first view's."""
    return random.Random(mix(seed, VIEW, position, attempt, view))


def scatter(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of range(size) sends `index`, without the others being computed.

    A Feistel network permutes the next power of two; what falls outside is permuted again until it falls inside
    (on average less than twice). Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    value = _feistel(index, low, bits - low, key)
    while value >= size:
        value = _feistel(value, low, bits - low, key)
    return value


def _feistel(value: int, low: int, high: int, key: int) -> int:
    low_mask, high_mask = (1 << low) - 1, (1 << high) - 1
    left, right = value >> low, value & low_mask
    for turn in range(0, _FEISTEL_ROUNDS, 2):
        left ^= _finish(key ^ (turn << 56) ^ right) & high_mask
        right ^= _finish(key ^ ((turn + 1) << 56) ^ left) & low_mask
    return left << low | right


def _finish(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
