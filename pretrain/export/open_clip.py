"""open_clip's own folder: `open_clip.create_model_and_transforms("local-dir:OUT")` loads it.

open_clip_config.json holds the architecture, its activation (QuickGELU or not), the bias and the preprocessing;
open_clip_model.safetensors the weights; a Hugging Face tokenizer lies beside them, CLIP's comes with open_clip.

Run as a module, this file is the fresh process that loads such a folder and writes down what it gives.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.compat import Towers, open_clip
from pretrain.data.images import transforms
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError
from pretrain.export.base import TEXTS, Tower, differences, probe_images
from pretrain.model import DualEncoder

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_SOURCE = Path(__file__).resolve().parents[2]

log = logging.getLogger("pretrain")


def write(encoder: DualEncoder, folder: Path, tower: Tower) -> None:
    """Fill a folder with config, weights and, where the model has its own, tokenizer.

    Raises:
        UserError: one tower alone is asked for.
    """
    if tower != "both":
        raise UserError(f"tower {tower}: an open_clip folder holds both towers, or it does not load; export both")
    config = {"model_cfg": model_cfg(encoder), "preprocess_cfg": encoder.architecture.preprocess}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.towers.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    made = open_clip.get_tokenizer(encoder.architecture.name)
    if hasattr(made, "save_pretrained"):
        made.save_pretrained(folder)


def model_cfg(encoder: DualEncoder) -> dict[str, Any]:
    """The architecture as open_clip must build it to hold these weights."""
    towers = encoder.architecture.towers
    vision, text = dict(towers["vision_cfg"]), dict(towers["text_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
        if Path(text["hf_model_name"]).exists():
            log.warning(
                "the export needs the folder %s wherever it is loaded: open_clip reads the text tower's shape from it",
                text["hf_model_name"],
            )
    head: dict[str, float] = {"init_logit_scale": float(encoder.towers.logit_scale.detach())}
    if encoder.towers.logit_bias is not None:
        # Without this open_clip builds no bias at all, and then refuses the weights that have one.
        head["init_logit_bias"] = float(encoder.towers.logit_bias.detach())
    kept = {key: value for key, value in towers.items() if not key.startswith("init_logit_")}
    return kept | {"vision_cfg": vision, "text_cfg": text} | head


def check(encoder: DualEncoder, folder: Path) -> dict[str, Any]:
    """Compare tokens, pixels, fp32 features, scale and bias bit for bit with a fresh process that has open_clip alone.

    Raises:
        RuntimeError: they differ, or open_clip cannot load the folder.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        images = probe_images(encoder.image_spec.size)
        for number, image in enumerate(images):
            image.save(place / f"{number}.png")
        theirs = _in_fresh_process(folder, place)
    found = differences(here(encoder, images), theirs)
    if any(value != 0.0 for value in found.values()):
        raise RuntimeError(f"open_clip gives other results than this model, so nothing was exported: {found}")
    versions = {"open_clip": open_clip.__version__, "torch": torch.__version__}
    return {"images": len(images), "texts": len(TEXTS), "largest_difference": found, "versions": versions}


@torch.inference_mode()
def here(encoder: DualEncoder, images: list[Image.Image]) -> dict[str, Tensor]:
    """What this project makes of images and of the probe's texts."""
    spec = encoder.image_spec
    pixels = torch.stack([torch.from_numpy(transforms.eval_image(image, spec)) for image in images])
    tokens = tokenizer.build(encoder.architecture.name)(list(TEXTS))
    features = {"image_features": encoder.encode_image(pixels), "text_features": encoder.encode_text(tokens)}
    inputs = {"pixels": transforms.normalize(pixels, spec), "tokens": tokens}
    return inputs | features | _head(encoder.towers)


@torch.inference_mode()
def there(folder: Path, images: list[Image.Image]) -> dict[str, Tensor]:
    """What open_clip alone makes of the same, from the folder."""
    towers, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    towers.eval()
    pixels = torch.stack([preprocess(image) for image in images])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(TEXTS))
    image_features, text_features = (
        towers.encode_image(pixels, normalize=True),
        towers.encode_text(tokens, normalize=True),
    )
    features = {"image_features": image_features, "text_features": text_features}
    return {"pixels": pixels, "tokens": tokens} | features | _head(towers)


def _head(towers: Towers) -> dict[str, Tensor]:
    named = {"logit_scale": towers.logit_scale, "logit_bias": towers.logit_bias}
    return {name: value.detach().reshape(1) for name, value in named.items() if value is not None}


def _in_fresh_process(folder: Path, place: Path) -> dict[str, Tensor]:
    path = os.pathsep.join(filter(None, (str(_SOURCE), os.environ.get("PYTHONPATH"))))
    # Sums split over another number of threads may round differently.
    command = [sys.executable, "-m", __name__, str(folder.resolve()), str(place), str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"open_clip cannot load the export, so nothing was exported: {done.stderr.strip()[-2000:]}")
    return load_file(place / "there.safetensors")


def _main(folder: str, place: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    images: list[Image.Image] = [Image.open(path) for path in sorted(Path(place).glob("*.png"))]
    found = there(Path(folder), images)
    save_file({name: value.clone().contiguous() for name, value in found.items()}, Path(place) / "there.safetensors")


if __name__ == "__main__":
    _main(*sys.argv[1:])
