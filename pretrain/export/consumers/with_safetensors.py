"""Weights as safetensors gives them, under open_clip's names, put into what their metadata describes."""

from __future__ import annotations

import json
from pathlib import Path

import place
import torch

place.mend_torchvision()

import open_clip  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pixels import preprocess  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@torch.inference_mode()
def main(folder: Path, work: Path) -> None:
    asked = place.facts(work)
    torch.set_num_threads(asked["threads"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        described = {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}
    towers = open_clip.CLIP if not described["model_cfg"].get("custom_text") else open_clip.CustomTextCLIP
    config = {name: value for name, value in described["model_cfg"].items() if name != "custom_text"}
    built = towers(**config).eval()
    left = built.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    sides = {"image": bool(place.images(work)), "text": bool(asked["texts"])}
    lost = [name for name in left.missing_keys if sides["image" if name.startswith("visual.") else "text"]]
    if lost or left.unexpected_keys:
        raise SystemExit(f"weights that are missing: {lost}; that nothing takes: {left.unexpected_keys}")
    found: dict[str, torch.Tensor] = {}
    if sides["image"]:
        inputs = [torch.from_numpy(preprocess(image, described["preprocess_cfg"])) for image in place.images(work)]
        found["pixels"] = torch.stack(inputs)
        found["image_features"] = F.normalize(built.encode_image(found["pixels"]), dim=-1)
    if sides["text"]:
        found["tokens"] = load_file(work / "here.safetensors")["tokens"]
        found["text_features"] = F.normalize(built.encode_text(found["tokens"]), dim=-1)
    save_file({name: value.clone().contiguous() for name, value in found.items()}, work / "there.safetensors")
    place.tell(work, tokenizer="none in this format: the tokens were given")


if __name__ == "__main__":
    place.each(main)
