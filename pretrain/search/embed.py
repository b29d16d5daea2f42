"""`pretrain embed`: features of every image and caption of a data set, on all ranks, a shard at a time.

Batches end with their shard, so a shard's features do not depend on the number of ranks, on workers, or on where an
earlier start was stopped. Ranks wait for each other after each of their shards: what fails on one, or a signal that
came to one, then ends all, and no rank waits longer than for a shard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from pretrain.data.stream import stream
from pretrain.errors import UserError
from pretrain.phases import phase
from pretrain.search import identity, store
from pretrain.search.growing import Growing
from pretrain.search.job import How, Job, open_job
from pretrain.search.rows import Rows
from pretrain.signals import interruptible
from pretrain.watch.watcher import Watch
from pretrain.world import World

log = logging.getLogger(__name__)


def embed(
    source: str | Path, shards: Sequence[str], out: Path, *, world: World, watch: Watch | None = None, **how: Any
) -> dict[str, Any]:
    """Write what is missing of the features of `shards` into `out`. Collective.

    Args:
        source: as `sources.open_source` takes it.
        shards: patterns, as in data.train.
        watch: keeps its heartbeats in OUT/ranks.
        how: fields of `How`.

    Returns:
        What is there now, and what this call has added: the same on every rank.

    Raises:
        UserError: on every rank: the model or a shard cannot be read, `out` belongs to another model, to other shards
            or to a start that is still running, or features are not finite.
    """
    started = time.monotonic()
    with phase("start"), world.together(f"opening {source}"), interruptible():
        job = open_job(source, shards, world, How(**how))
        meta = identity.describe(job)
    for note in job.source.damage[:3] if world.is_main else ():
        log.warning("%s: %s", note.shard, note.reason)
    done: list[store.Part] = []
    with ExitStack() as held:
        with world.together(f"opening {out}"):
            if world.is_main:
                held.enter_context(store.locked(out))
                done = _claim(out, meta)
        if watch is not None:
            watch.open(out / "ranks", world)
        done = world.share(done)[0]
        before = len(done)
        done += _embed(job, out, meta, done, world)
    return _report(job, out, done, before, world) | {"seconds": round(time.monotonic() - started, 3)}


def _claim(out: Path, meta: dict[str, Any]) -> list[store.Part]:
    """What is finished already of these very features; remains of a killed start are removed."""
    if (out / store.META).exists():
        identity.refuse_another(out, store.read_meta(out), meta)
    elif others := sorted(path.name for path in out.iterdir() if not path.name.startswith(".")):
        raise UserError(f"{out} is not empty ({others[0]}) and holds no features: name another folder")
    done = store.parts(out)
    store.sweep(out, done)
    store.write_meta(out, meta, done)
    return done


def _embed(job: Job, out: Path, meta: dict[str, Any], done: Sequence[store.Part], world: World) -> list[store.Part]:
    """What all ranks add. Collective."""
    known, added = {part.shard for part in done}, list[store.Part]()
    counts = job.source.counts
    left = sorted((n for n, count in enumerate(counts) if count and n not in known), key=lambda n: -counts[n])
    with closing(_embedded(job, left[world.rank :: world.size], out, world)) as made:
        for _ in range(-(-len(left) // world.size)):
            with world.together(f"embedding into {out}"), interruptible(), torch.inference_mode():
                own = next(made, None)
            added += [part for part in world.share(own) if part is not None]
            with world.together(f"writing {out / store.META}"):
                if world.is_main:
                    store.write_meta(out, meta, sorted([*done, *added], key=lambda part: part.shard))
    return added


def _embedded(job: Job, shards: Sequence[int], out: Path, world: World) -> Generator[store.Part, None, None]:
    """Each of the shards, once its part is written.

    Args:
        shards: the largest first: `stream` wants no batch larger than its first.
    """
    towers, opened = job.how.towers, job.opened
    tokenize = opened.tokenize if "text" in towers else None
    rows = Rows(job.source, opened.encoder.image_spec, tokenize, "image" in towers)
    places = [batch for shard in shards for batch in job.places(shard)]
    with closing(stream(rows, places, job.data, world.device, world.rank)) as batches:
        for shard in shards:
            growing = Growing(job, shard)
            for _ in job.places(shard):
                with phase("data"):
                    batch = next(batches)
                with phase("evaluating", f"shard {shard}"):
                    growing.add(batch)
            with phase("writing", f"shard {shard}"):
                part = growing.write(out, world.rank)
            yield part


def _report(job: Job, out: Path, done: Sequence[store.Part], before: int, world: World) -> dict[str, Any]:
    rows = {f"{tower}s": sum(part.rows[tower] for part in done) for tower in job.how.towers}
    return {
        "out": str(out),
        **job.opened.facts,
        "dimensions": job.width,
        "dtype": job.how.dtype,
        **rows,
        "shards": len(done),
        "embedded_now": len(done) - before,
        "left_out": sum(len(part.left_out) for part in done),
        "world_size": world.size,
    }
