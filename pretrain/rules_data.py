"""Rules about where samples come from; see rules.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.data.images import augmentations
from pretrain.data.texts import edits

if TYPE_CHECKING:
    from pretrain.config import Data

Rules = list[tuple[bool, str]]


def sources(data: Data) -> Rules:
    low, high = data.crop_scale
    return [
        (not data.train, "data.train is empty: name the training shards, or synthetic:1024, which needs no disk"),
        (
            data.synthetic is None and any(entry.partition(":")[0] == "synthetic" for entry in data.train),
            f"data.train {list(data.train)}: the synthetic source stands alone, as synthetic:SAMPLES, 1 or more",
        ),
        (
            data.synthetic is not None and bool(data.weights),
            f"data.weights {data.weights} means nothing to the synthetic source: leave it out",
        ),
        (data.workers < 0, f"data.workers {data.workers} is negative: 0 decodes in the training process"),
        (data.prefetch < 1, f"data.prefetch {data.prefetch} must be at least 1 batch"),
        (
            data.shuffle_window < 0,
            f"data.shuffle_window {data.shuffle_window} must not be negative: 0 keeps the order of the shards",
        ),
        (
            data.shuffle_window == 0 and data.replacement,
            "data.replacement True draws inside windows, and data.shuffle_window is 0: raise it",
        ),
        (
            data.shuffle_window == 0 and data.shuffle_chunk is not None,
            f"data.shuffle_chunk {data.shuffle_chunk} means nothing to data.shuffle_window 0: leave it out",
        ),
        (not 0 < low <= high <= 1, f"data.crop_scale {data.crop_scale} must rise within (0, 1]"),
        (
            not 0 < data.crop_ratio[0] <= data.crop_ratio[1],
            f"data.crop_ratio {data.crop_ratio} must rise and be positive",
        ),
        (not 0 <= data.max_bad <= 1, f"data.max_bad {data.max_bad} is a share: give a number between 0 and 1"),
        *numbers(data),
        *((True, problem) for problem in edits.problems(data.text_edits)),
        *((True, problem) for problem in augmentations.problems("data.augment", data.augment)),
        *((True, problem) for problem in augmentations.problems("data.view_augment", data.view_augment)),
    ]


def numbers(data: Data) -> Rules:
    weights, texts = data.weights, data.text_weights
    odd = [key for key in data.text_keys if ":" in key and key.partition(":")[0] not in ("json", "parquet")]
    return [
        (
            bool(odd),
            f"data.text_keys {odd} must be a member's extension such as txt, 'json:FIELD' or 'parquet:COLUMN'",
        ),
        (any(w <= 0 for w in weights), f"data.weights {weights} must all be positive: leave a source out instead"),
        (
            bool(texts) and len(texts) != len(data.text_keys),
            f"data.text_weights has {len(texts)} numbers for {len(data.text_keys)} data.text_keys: give one for each",
        ),
        (
            bool(texts) and (min(texts) < 0 or max(texts) <= 0),
            f"data.text_weights {texts} must not be negative, and one of them positive",
        ),
        (
            data.shuffle_chunk is not None and data.shuffle_chunk < 0,
            f"data.shuffle_chunk {data.shuffle_chunk} must not be negative: 0 is whole shards",
        ),
        (data.sentences < 0, f"data.sentences {data.sentences} must not be negative: 0 takes whole captions"),
        (data.cache_gb <= 0, f"data.cache_gb {data.cache_gb} must be positive"),
        (data.retry_s < 0, f"data.retry_s {data.retry_s} must not be negative: 0 never tries again"),
        (data.read_ahead < 1, f"data.read_ahead {data.read_ahead} must be at least 1 thread"),
    ]
