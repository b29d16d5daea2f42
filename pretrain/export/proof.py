"""The proof of an export: what its users' library makes of it in a fresh process, beside what the encoders make."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.data.images import transforms
from pretrain.data.texts import tokenizer
from pretrain.export import graph, probe
from pretrain.export.base import Asked, Format, Limit
from pretrain.model import DualEncoder

CONSUMERS = Path(__file__).parent / "consumers"
_PACKAGED = {"open_clip": "open_clip_torch"}
_FEATURES = ("image_features", "text_features", "patch_tokens")


def prove(encoder: DualEncoder, folder: Path, method: Format, asked: Asked) -> dict[str, Any]:
    """Load a folder as its users do, in a fresh process that knows nothing of this project, and compare.

    Returns:
        What was compared, by how much it differed at most, and with which versions.

    Raises:
        RuntimeError: it differs by more than the format allows, or that library cannot load it.
    """
    images = probe.images(encoder.image_spec.size, method.ROUNDS_CROPS)
    ours = here(encoder, asked, images)
    with tempfile.TemporaryDirectory() as name:
        lay_out(Path(name), asked, images, ours)
        consume(method.CONSUMER, [(folder, Path(name))])
        theirs, told = results(Path(name))
    return judge(ours, theirs, method.limit(asked), method.CONSUMER) | told


@torch.inference_mode()
def here(encoder: DualEncoder, asked: Asked, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What the encoders make of the images and of the probe's texts: pixels, tokens and features."""
    found: dict[str, Tensor] = {}
    if asked.image:
        spec = encoder.image_spec
        pixels = torch.stack([torch.from_numpy(transforms.eval_image(image, spec)) for image in images])
        found |= {"pixels": transforms.normalize(pixels, spec), "image_features": encoder.encode_image(pixels)}
    if asked.patch_tokens:
        found["patch_tokens"] = graph.image(encoder, True).module(found["pixels"])[1]
    if asked.text:
        tokens = tokenizer.build(encoder.architecture.name)(list(probe.TEXTS))
        found |= {"tokens": tokens, "text_features": encoder.encode_text(tokens)}
    head = {"logit_scale": encoder.towers.logit_scale, "logit_bias": encoder.towers.logit_bias}
    return found | {name: value.detach().reshape(1) for name, value in head.items() if value is not None}


def lay_out(place: Path, asked: Asked, images: Sequence[Image.Image], ours: Mapping[str, Tensor]) -> None:
    """Put into a folder what a consumer is to encode: images, texts, and tokens for want of a tokenizer."""
    for number, image in enumerate(images if asked.image else ()):
        image.save(place / f"{number:02d}.png", compress_level=1)
    facts = {"texts": list(probe.TEXTS) if asked.text else [], "threads": torch.get_num_threads()}
    (place / "probe.json").write_text(json.dumps(facts))
    save_file({"tokens": ours["tokens"]} if asked.text else {}, place / "here.safetensors")


def consume(consumer: str, pairs: Iterable[tuple[Path, Path]]) -> None:
    """Have a fresh process load exports, each with the folder that was laid out for it, where it leaves its results.

    Raises:
        RuntimeError: it cannot.
    """
    words = [str(path.resolve()) for pair in pairs for path in pair]
    command = [sys.executable, str(CONSUMERS / f"{consumer}.py"), *words]
    done = subprocess.run(command, cwd=words[-1], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip()[-2000:] or f"it ended with {done.returncode}"
        raise RuntimeError(f"{library(consumer)} cannot load the export, so nothing was exported: {said}")


def results(place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the consumer made of it, by the names of `here` ('image_features/3' in batches of 3), and its remarks."""
    return load_file(place / "there.safetensors"), json.loads((place / "told.json").read_text())


def judge(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], limit: Limit, consumer: str) -> dict[str, Any]:
    """The facts for parity.json.

    Raises:
        RuntimeError: a difference exceeds the limit, or something was not compared.
    """
    compared = {name.partition("/")[0] for name in theirs}
    missing = [name for name in _FEATURES if name in ours and name not in compared]
    found = {name: difference(ours.get(name.partition("/")[0]), theirs[name]) for name in sorted(theirs)}
    found |= dict.fromkeys(missing, "not compared")
    lossy = [name for name in theirs if limit.cosine is not None and name.startswith(_FEATURES)]
    cosines = {n: _cosine(ours[n.partition("/")[0]], theirs[n]) for n in lossy if isinstance(found[n], float)}
    far = [name for name, value in cosines.items() if not value > (limit.cosine or 0.0)]
    far += [name for name, value in found.items() if name not in cosines and not _within(name, value, limit)]
    facts: dict[str, Any] = {"largest_difference": found} | ({"least_cosine": cosines} if cosines else {})
    if far:
        raise RuntimeError(
            f"{library(consumer)} gives other results than this model ({', '.join(far)}): nothing exported: {facts}"
        )
    counts = {"images": len(ours.get("pixels", ())), "texts": len(ours.get("tokens", ()))}
    versions = {name: metadata.version(_PACKAGED.get(name, name)) for name in (library(consumer), "torch")}
    allowed = {"cosine": limit.cosine} if limit.cosine is not None else {"largest_difference": limit.largest}
    return counts | facts | {"allowed": allowed, "versions": versions}


def difference(ours: Tensor | None, theirs: Tensor) -> float | str:
    """Largest absolute difference, 0.0 only where all bits agree; or what keeps two tensors from comparison."""
    if ours is None:
        return "only there"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {list(ours.shape)} here, {theirs.dtype} {list(theirs.shape)} there"
    if ours.numpy().tobytes() == theirs.numpy().tobytes():
        return 0.0
    largest = float((ours.double() - theirs.double()).abs().max())
    return largest or "another sign of zero"


def _within(name: str, value: float | str, limit: Limit) -> bool:
    """Tokens must be the same ones; other sounds of zero are equal where bits need not be."""
    if isinstance(value, str):
        return value == "another sign of zero" and limit.largest > 0
    return value == 0.0 if name == "tokens" else value <= limit.largest


def _cosine(ours: Tensor, theirs: Tensor) -> float:
    return float(F.cosine_similarity(ours.double(), theirs.double(), dim=-1).min())


def library(consumer: str) -> str:
    """The module whose users a consumer stands for."""
    return consumer.removeprefix("with_")
