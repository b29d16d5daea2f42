"""Which model a config names: open_clip's description of both towers, and the preprocessing that belongs to it."""

from __future__ import annotations

import copy
import difflib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import config
from pretrain.compat import open_clip
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.images.transforms import ImageSpec

SHIPPED = Path(__file__).parents[1] / "configs" / "models"
"""Model descriptions of this project."""
_PARTS = ("embed_dim", "vision_cfg", "text_cfg")


@dataclass(frozen=True)
class Architecture:
    """Both towers, in open_clip's words."""

    name: str
    """The name open_clip knows it by, also for its tokenizer."""
    towers: dict[str, Any]
    """open_clip's model_cfg: embed_dim, vision_cfg, text_cfg, quick_gelu, custom_text."""
    preprocess: dict[str, Any]
    """open_clip's preprocess_cfg: size, mode, mean, std, interpolation, resize_mode, fill_color."""


def find(model: config.Model) -> Architecture:
    """The architecture that `model.name` means, with `model.quick_gelu` in force. No network, no weights.

    A name is a JSON of configs/models, else an open_clip built-in; a path ending in .json is read where it lies.

    Raises:
        UserError: nothing has that name (the message gives the nearest), or the JSON is not a dual encoder.
    """
    name = register(model.name)
    towers = open_clip.get_model_config(name)
    if "multimodal_cfg" in towers:
        raise UserError(
            f"model.name {model.name} has a captioning decoder, which no objective here trains: take one without coca"
        )
    towers["quick_gelu"] = bool(towers.get("quick_gelu")) or model.quick_gelu
    preprocess = asdict(open_clip.transform.PreprocessCfg())
    return Architecture(name, towers, preprocess | {"size": image_size(towers)})


def recall(saved: Mapping[str, Any]) -> Architecture:
    """The architecture that a checkpoint holds as a dictionary, whatever became of the files that it was read from."""
    described = Architecture(**saved)
    if open_clip.get_model_config(described.name) is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{described.name}.json"
            path.write_text(json.dumps(described.towers))
            open_clip.add_model_config(path)
    return described


def register(name: str) -> str:
    """Make a model known to open_clip, its tokenizers included, and return the name it has there.

    Raises:
        UserError: nothing has that name, or the JSON is not a dual encoder.
    """
    path = Path(name) if name.endswith(".json") else SHIPPED / f"{name}.json"
    if path.is_file():
        return _register_file(path)
    if name.endswith(".json"):
        raise UserError(f"model.name {name}: there is no such file; give the path of an open_clip model JSON")
    if name in open_clip.list_models():
        return name
    if ":" in name:
        raise UserError(f"model.name {name}: name the architecture here, and the weights in model.pretrained")
    known = sorted({*open_clip.list_models(), *(item.stem for item in SHIPPED.glob("*.json"))})
    folded = {item.casefold().replace("_", "-").replace("/", "-"): item for item in known}
    near = difflib.get_close_matches(name.casefold().replace("_", "-").replace("/", "-"), folded, 3, 0.5)
    nearest = ", ".join(folded[item] for item in near) or ", ".join(known[:5]) + ", ..."
    raise UserError(
        f"model.name {name!r} is neither an open_clip model nor a JSON in configs/models; nearest: {nearest}"
    )


def image_size(towers: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of what the image tower takes."""
    size = towers["vision_cfg"].get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_spec(preprocess: Mapping[str, Any]) -> ImageSpec:
    """The preprocessing as the data pipeline takes it."""
    from pretrain.data.images.transforms import ImageSpec

    size = preprocess["size"]
    return ImageSpec(
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        interpolation=preprocess["interpolation"],
        resize_mode=preprocess["resize_mode"],
        fill_color=preprocess["fill_color"],
    )


def _register_file(path: Path) -> str:
    towers = _read(path)
    known = open_clip.get_model_config(path.stem)
    if known is None:
        open_clip.add_model_config(path)
    elif known != towers:
        raise UserError(f"model.name {path}: open_clip already has another model called {path.stem}; rename the file")
    return path.stem


def _read(path: Path) -> dict[str, Any]:
    try:
        towers = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"model.name {path}: not readable as JSON ({' '.join(str(error).split())})") from None
    missing = [key for key in _PARTS if not isinstance(towers, dict) or key not in towers]
    if missing:
        raise UserError(f"model.name {path}: an open_clip model JSON needs {', '.join(missing)}")
    # open_clip picks the tokenizer of a model called *siglip* by that name, and downloads it; the same weights
    # exported would then come back with another tokenizer.
    if "siglip" in path.stem.lower() and not towers["text_cfg"].get("hf_tokenizer_name"):
        raise UserError(
            f"model.name {path}: a model called siglip needs text_cfg.hf_tokenizer_name; add it, or rename the file"
        )
    return copy.deepcopy(towers)
