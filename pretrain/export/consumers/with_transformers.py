"""A folder as transformers' users load it: by its own classes, its own preprocessing and its own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import place
import torch

place.mend_torchvision()

import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@torch.inference_mode()
def main(folder: Path, work: Path) -> None:
    asked, kept = place.facts(work), json.loads((folder / "config.json").read_text())
    torch.set_num_threads(asked["threads"])
    built, left = getattr(transformers, kept["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    if lost := {name: sorted(map(str, found)) for name, found in left.items() if found}:
        raise SystemExit(f"weights and model do not fit: {lost}")
    built.eval()
    found, remarks = _images(folder, work, built)
    if asked["texts"]:
        texts, remarks["tokenizer"] = _texts(folder, work, built, asked["texts"])
        found |= texts
    head = {name: getattr(built, name, None) for name in ("logit_scale", "logit_bias")}
    found |= {name: value.detach().reshape(1) for name, value in head.items() if value is not None}
    save_file({name: value.clone().contiguous() for name, value in found.items()}, work / "there.safetensors")
    place.tell(work, **remarks)


def _images(folder: Path, work: Path, built: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if not (images := place.images(work)):
        return {}, {}
    load: Any = transformers.AutoImageProcessor.from_pretrained
    made = {kind: load(folder, backend=kind)(images=images, return_tensors="pt") for kind in ("pil", "torchvision")}
    pixels, tensors = made["pil"]["pixel_values"], made["torchvision"]["pixel_values"]
    encode = getattr(built, "get_image_features", built)
    found = {"pixels": pixels}
    for size, slices in place.batched(len(pixels)):
        found[f"image_features/{size}"] = torch.cat([_unit(encode(pixel_values=pixels[part])) for part in slices])
    return found, {"largest_difference_with_torchvision": float((pixels - tensors).abs().max())}


def _texts(folder: Path, work: Path, built: Any, texts: list[str]) -> tuple[dict[str, torch.Tensor], str]:
    found, remark = load_file(work / "here.safetensors"), "none in this folder: the tokens were given"
    made: Any = {"input_ids": found["tokens"]}
    if (folder / "tokenizer_config.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        made = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        ids, remark = made["input_ids"], type(tokenizer).__name__
        # CLIP's features do not depend on what pads a text; open_clip pads with zeros.
        found["tokens"] = ids * made["attention_mask"] if built.config.model_type.startswith("clip") else ids
    encode = getattr(built, "get_text_features", built)
    for size, slices in place.batched(len(texts)):
        batches = [{name: rows[part] for name, rows in made.items()} for part in slices]
        found[f"text_features/{size}"] = torch.cat([_unit(encode(**batch)) for batch in batches])
    return found, remark


def _unit(given: Any) -> torch.Tensor:
    """Unit-norm features, wherever a class has them: joint models return them or pool them, single towers name them."""
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        if getattr(given, name, None) is not None:
            given = getattr(given, name)
            break
    return F.normalize(given, dim=-1)


if __name__ == "__main__":
    place.each(main)
