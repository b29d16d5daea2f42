"""Fingerprints of batches: equal for the same samples, pixels and tokens, however many ranks held them."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from pretrain.values import Batch


def row_digests(batch: Batch) -> list[str]:
    """A hash of each row's key, pixels and tokens; copies the batch to the CPU."""
    images, texts = batch.images.cpu().numpy(), batch.texts.cpu().numpy()
    rows = zip(batch.keys, images, texts, strict=True)
    return [xxhash.xxh3_128_hexdigest(key.encode() + image.tobytes() + text.tobytes()) for key, image, text in rows]


def combine(rows: Iterable[str]) -> str:
    """One hash of row hashes in the order of the global batch: rank 0's rows, then rank 1's, ..."""
    return xxhash.xxh3_128_hexdigest("".join(rows).encode())


def batch_digest(batch: Batch) -> str:
    """The digest of a batch that lies whole on this rank."""
    return combine(row_digests(batch))
