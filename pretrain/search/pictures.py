"""Small pictures of samples, read again from the shards that were embedded, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.config import Data
from pretrain.data.images.decode import BadSample, decode
from pretrain.data.shards.reader import ShardSource
from pretrain.errors import ProcessDied, UserError
from pretrain.search import identity
from pretrain.search.index import Entry

_SIDE, _LEAST = 160, 96
"""Pixels: no picture is wider or higher than the one; one that is smaller than the other in both is enlarged."""


def thumbnails(meta: dict[str, Any], entries: Sequence[Entry]) -> list[str | UserError]:
    """For each entry a data URI, or why there is none: a shard that is gone takes only its own pictures along."""
    opened = {shard: _open(meta, shard) for shard in sorted({entry.shard for entry in entries})}
    return [_of(opened[entry.shard], entry) for entry in entries]


def of_file(path: Path) -> str:
    """Data URI of an image file that was read before."""
    return data_uri(path.expanduser().read_bytes())


def data_uri(encoded: bytes) -> str:
    """A small JPEG of an image.

    Raises:
        BadSample: it is none.
    """
    image = decode(encoded)
    image.thumbnail((_SIDE, _SIDE))
    factor = _LEAST // max(image.size)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _open(meta: dict[str, Any], shard: int) -> ShardSource | UserError:
    known, path = identity.facts(meta)[shard], meta["shards"][shard]["path"]
    data = Data(image_keys=tuple(meta["image_keys"]), text_keys=tuple(meta["text_keys"]))
    try:
        source = ShardSource([path], data, field="shards")
    except (UserError, OSError, ProcessDied) as error:
        return UserError(str(error))
    if source.facts[0][:4] != known[:4]:
        return UserError(f"{path} was replaced since it was embedded")
    return source


def _of(source: ShardSource | UserError, entry: Entry) -> str | UserError:
    if isinstance(source, UserError):
        return source
    try:
        return data_uri(source.sample(entry.sample).image_bytes)
    except (BadSample, OSError, UserError) as error:
        return UserError(f"{entry.key}: {error}")
