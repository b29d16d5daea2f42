"""Sample counts that are written down (open_clip's sizes.json), so that a run starts before its shards are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pretrain.config import Data
from pretrain.data.shards import facts as shards
from pretrain.data.shards.facts import Shard
from pretrain.data.storage import Storage
from pretrain.errors import UserError

_THREADS = 16


def sized(names: Sequence[str], data: Data, storage: Storage, start: int = 0) -> list[Shard]:
    """The shards with the counts of data.sizes; nothing but their sizes in bytes is asked of the storage.

    Such a shard's facts do not depend on whether it has an index by now; `digest` and `check` are ''.

    Raises:
        UserError: a shard is gone or is not named in the file, or that is no such file.
    """
    counts = _counts(data.sizes or "", storage)
    missing = [name for name in names if shards.base_name(name) not in counts]
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"data.sizes {data.sizes}: has no count for {len(missing)} shards ({few}); add them to the file"
        )

    def one(name: str) -> Shard:
        stat = storage.stat(name)
        place, samples = shards.index_path(name, stat, data), counts[shards.base_name(name)]
        return Shard(name, place, stat.size, stat.version, samples, 0, 0, (), "", "")

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, names))


def mismatch(found: Shard, expected: Shard, sizes: str | None) -> UserError:
    """What to say where a shard holds another number of samples than is written down."""
    damage = f"; {found.damage[0]}" if found.damage else ""
    return UserError(
        f"data.sizes {sizes}: {found.name} has {found.samples} samples, not {expected.samples} as written "
        f"there{damage}; correct the file, or leave data.sizes out"
    )


def _counts(name: str, storage: Storage) -> dict[str, int]:
    stat = storage.stat(name)
    blob = storage.open(name, stat)
    try:
        found = json.loads(blob.read(0, stat.size))
    except ValueError as error:
        raise UserError(f"data.sizes {name}: is no JSON ({error}); write {{shard: samples}}") from None
    finally:
        blob.close()
    if not isinstance(found, dict):
        raise UserError(f"data.sizes {name}: is a {type(found).__name__}; write {{shard: samples}}")
    for shard, count in found.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise UserError(f"data.sizes {name}: {shard} has {count!r} samples; write a whole number")
    return found
