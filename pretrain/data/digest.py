"""Fingerprints of batches: equal for the same samples, pixels, tokens and further columns, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from pretrain.values import Batch


def row_digests(batch: Batch) -> list[str]:
    """A hash of each row's key, pixels, tokens and further columns by name; copies the batch to the CPU."""
    further = [batch.extra[name] for name in sorted(batch.extra)]
    columns = [column.cpu().numpy() for column in (batch.images, batch.texts, *further)]
    rows = zip(batch.keys, *columns, strict=True)
    return [xxhash.xxh3_128_hexdigest(key.encode() + b"".join(part.tobytes() for part in row)) for key, *row in rows]


def combine(rows: Iterable[str]) -> str:
    """One hash of row hashes in the order of the global batch: rank 0's rows, then rank 1's, ..."""
    return xxhash.xxh3_128_hexdigest("".join(rows).encode())


def batch_digest(batch: Batch) -> str:
    """The digest of a batch that lies whole on this rank."""
    return combine(row_digests(batch))
