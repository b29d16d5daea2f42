"""Whether features are of the same model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.data.shards import fingerprint
from pretrain.data.shards.fingerprint import Fact
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError
from pretrain.evaluate.base.cache import identity_of
from pretrain.evaluate.base.sources import LOCAL, Opened
from pretrain.search import store
from pretrain.search.job import Job


def describe(job: Job) -> dict[str, Any]:
    """What meta.json tells of features, beside which are finished."""
    known, source = job.opened.facts, job.source
    shards = zip(source.shards, source.facts, strict=True)
    return {
        "format": store.FORMAT,
        "model": {**known, "checkpoint": _absolute(known["checkpoint"]), "fingerprint": of_model(job.opened)},
        "towers": list(job.how.towers),
        "dtype": job.how.dtype,
        "dimensions": job.width,
        "image_keys": list(job.data.image_keys),
        "text_keys": list(job.data.text_keys),
        "fingerprint": source.fingerprint,
        "shards": [{"path": shard.path, **fact._asdict()} for shard, fact in shards],
    }


def of_model(opened: Opened) -> str:
    """Hash of all that features depend on: weights, preprocessing, precision, tokenizer."""
    encoder, probe = opened.encoder, opened.tokenize(list(tokenizer.PROBE)).tolist()
    return identity_of(encoder.towers, encoder.architecture.preprocess, encoder.precision, probe)


def facts(meta: dict[str, Any]) -> list[Fact]:
    """What is known of each shard."""
    return [Fact(**{name: shard[name] for name in Fact._fields}) for shard in meta["shards"]]


def refuse_another(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError where a folder holds features of another model, of other shards, or of another form."""
    changed = [f"{name} {before[name]} -> {now[name]}" for name in ("towers", "dtype", "image_keys", "text_keys")
               if before[name] != now[name]]  # fmt: skip
    if before["model"]["fingerprint"] != now["model"]["fingerprint"]:
        models = [f"{meta['model']['checkpoint']}{' (average)' * meta['model']['average']}" for meta in (before, now)]
        told = " -> ".join(models) if models[0] != models[1] else f"{models[0]} is not what it was"
        changed.insert(0, f"model {told}")
    if before["fingerprint"] != now["fingerprint"]:
        changed.append(fingerprint.summary(fingerprint.differences(facts(before), facts(now))))
    if changed:
        raise UserError(f"{out} holds other features ({'; '.join(changed)}): name another folder, or remove this one")


def _absolute(source: str) -> str:
    return source if "://" in source else str(Path(source.removeprefix(LOCAL)).resolve())
