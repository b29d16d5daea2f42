"""A folder as open_clip's users load it."""

from __future__ import annotations

from pathlib import Path

import place
import torch

place.mend_torchvision()

import open_clip  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


@torch.inference_mode()
def main(folder: Path, work: Path) -> None:
    asked = place.facts(work)
    torch.set_num_threads(asked["threads"])
    towers, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(asked["texts"])
    pixels = torch.stack([preprocess(image) for image in place.images(work)])
    towers.eval()
    image, text = towers.encode_image(pixels, normalize=True), towers.encode_text(tokens, normalize=True)
    found = {"pixels": pixels, "tokens": tokens, "image_features": image, "text_features": text}
    head = {"logit_scale": towers.logit_scale, "logit_bias": towers.logit_bias}
    found |= {name: value.detach().reshape(1) for name, value in head.items() if value is not None}
    save_file({name: value.clone().contiguous() for name, value in found.items()}, work / "there.safetensors")
    place.tell(work)


if __name__ == "__main__":
    place.each(main)
