"""Check of the shards: that some of them, spread over all, can be read from here, how fast, and that they have indexes.

Every rank reads the same ones, so that a shard that is not there fails everywhere, and a node that cannot reach the
storage fails alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import xxhash

from pretrain.config import Data
from pretrain.data import held_out, storage
from pretrain.data.patterns import expand
from pretrain.data.shards.index import known
from pretrain.data.storage import Storage
from pretrain.doctor.base import Finding, Patient, Status
from pretrain.errors import UserError

SHARDS, PIECE, RETRY_S = 8, 4 << 20, 20.0
"""Shards read of each set, bytes read of each, seconds for which a transfer is tried again."""
SLOW_MB, SLOW = 1.0, 0.05
"""A node is at fault that reads less MB/s than this, and than this share of the ranks' median."""


def shards(patient: Patient) -> Iterator[Finding]:
    """The first bytes of shards of data.train and data.eval."""
    data = replace(patient.run.data, retry_s=min(RETRY_S, patient.run.data.retry_s))
    if data.synthetic is not None or not data.train:
        yield Finding("data.train", "skipped: it names no shards", "skip")
    else:
        yield from of_set("data.train", data.train, data)
    if shards := held_out.entries(data):
        yield from of_set("data.eval", shards, data)


def of_set(field: str, patterns: Sequence[str], data: Data) -> Iterator[Finding]:
    """Of one knob's shards. Raises: UserError: a pattern names nothing."""
    store = storage.make(data)
    names = expand(patterns, field, store)
    if any(name.startswith("pipe:") for name in names):
        yield Finding(field, "skipped: a pipe is run by the training alone", "skip")
        return
    taken = spread(names)
    read, failed, began, facts = 0, list[str](), time.perf_counter(), list[tuple[str, int]]()
    for name in taken:
        try:
            count, whole = _first_bytes(name, store)
        except (UserError, OSError) as error:
            failed.append(str(error) if name in str(error) else f"{name}: {error}")
            continue
        read += count
        facts.append((name, whole))
    speed = read / 1e6 / (time.perf_counter() - began)
    yield _finding(field, names, taken, failed, speed, facts)
    if not failed:
        yield _indexes(field, taken, data, store)


def spread(names: Sequence[str], most: int = SHARDS) -> list[str]:
    """At most so many of them, the first and the last among them."""
    count = min(most, len(names))
    return [names[n * (len(names) - 1) // max(1, count - 1)] for n in range(count)]


def _first_bytes(name: str, store: Storage) -> tuple[int, int]:
    """(bytes read, bytes of the shard). UserError: it is no tar."""
    blob = store.open(name)
    try:
        size = min(PIECE, blob.stat.size)
        content = blob.read(0, size)
        whole = blob.stat.size
    finally:
        blob.close()
    if content[257:262] != b"ustar":
        raise UserError(f"{name}: does not begin as a tar file does")
    if len(content) < size:
        raise UserError(f"{name}: only {len(content)} of the first {size} bytes could be read")
    return size, whole


def _finding(
    field: str, names: Sequence[str], taken: Sequence[str], failed: list[str], speed: float, facts: object
) -> Finding:
    needed, mend = "shards that can be read from every node", "look at paths, mounts and credentials on this node"
    if failed:
        return Finding(field, f"{len(failed)} of {len(taken)} cannot be read: {failed[0]}", "fail", needed, mend)
    said = f"first bytes of {len(taken)} of {len(names)} shards"
    digest = xxhash.xxh3_64_hexdigest(repr((len(names), facts)).encode())
    least = SLOW if speed < SLOW_MB else 0.0
    return Finding(field, said, "ok", needed, mend, digest, speed, "MB/s", least)


def _indexes(field: str, taken: Sequence[str], data: Data, store: Storage) -> Finding:
    without = sum(known(name, data, store) is None for name in taken)
    said = f"{len(taken) - without} of {len(taken)} shards looked at have one"
    status: Status = "warn" if without and data.sizes is None else "ok"
    mend = f"run `pretrain index` on {field} once: otherwise the start reads every shard's headers"
    return Finding(f"{field} indexes", said, status, "an index for each shard", mend)
