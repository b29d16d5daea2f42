"""What can be evaluated: a run or a checkpoint of it, an open_clip folder, a transformers folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint, config, model
from pretrain.compat import open_clip
from pretrain.data.rows import Tokenize
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError
from pretrain.evaluate.base import transformers_folder
from pretrain.towers.architecture import Architecture

LOCAL = "local-dir:"


@dataclass(frozen=True)
class Opened:
    """Encoders that came from somewhere."""

    encoder: model.DualEncoder
    """In evaluation mode, on the device."""
    tokenize: Tokenize
    facts: dict[str, Any]
    """checkpoint, step, average: for the result."""
    data: config.Data = field(default_factory=config.Data)
    """The run's own; empty for a foreign folder."""
    folder: checkpoint.Folder | None = None
    """The run folder, where results go."""


def open_source(source: str | Path, average: bool | None, device: torch.device) -> Opened:
    """The encoders that a name stands for.

    Args:
        source: run or checkpoint (a folder or a URL); a folder with open_clip_config.json, 'local-dir:FOLDER' too; a
            folder in which transformers saved a CLIPModel or SiglipModel with its processor.
        average: whether to take a run's averaged weights; None: where there are any.

    Raises:
        UserError: it is none of these, is damaged, lacks its config or its tokenizer, or has one tower only.
    """
    text = str(source)
    folder = Path(text.removeprefix(LOCAL)).expanduser()
    if text.startswith(LOCAL) or (folder / "open_clip_config.json").is_file():
        _refuse_average(text, average)
        return of_open_clip(folder, device)
    if (folder / "config.json").is_file():
        _refuse_average(text, average)
        encoder, tokenize = transformers_folder.load(folder, device)
        return Opened(encoder, tokenize, _foreign(folder))
    if folder.is_file():
        raise UserError(
            f"{source} is a file of weights, which does not say of which model: give a run, or a folder with "
            "open_clip_config.json or config.json beside the weights"
        )
    if folder.is_dir() and list(folder.glob("*.safetensors")):
        raise UserError(f"{source} holds weights without open_clip_config.json or config.json: add the model's config")
    return of_run(source, average, device)


def of_run(source: str | Path, average: bool | None, device: torch.device) -> Opened:
    """A run's newest good checkpoint, or the one that is named."""
    folder = checkpoint.locate(source)
    average = checkpoint.has_average(folder) if average is None else average
    encoder = model.restore(folder, average, device)
    facts = {"checkpoint": str(folder), "step": checkpoint.step_of(folder), "average": average}
    data, tokenize = checkpoint.read_run(folder).data, tokenizer.build(encoder.architecture.name)
    return Opened(encoder, tokenize, facts, data, _run_folder(source, folder))


def of_open_clip(folder: Path, device: torch.device) -> Opened:
    """A folder as open_clip writes and reads it; its own loader, so its own numbers."""
    described = _description(folder)
    name = f"{LOCAL}{folder.resolve()}"
    try:
        towers = open_clip.create_model(name)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{folder}: open_clip cannot load it ({' '.join(str(error).split())[:300]})") from error
    size = {"size": described["model_cfg"]["vision_cfg"].get("image_size", 224)}
    known = {key: value for key, value in (described.get("preprocess_cfg") or {}).items() if value is not None}
    preprocess = asdict(open_clip.transform.PreprocessCfg()) | size | known
    architecture = Architecture(name, described["model_cfg"], preprocess)
    encoder = model.DualEncoder(towers, architecture, "fp32").to(device).eval()
    return Opened(encoder, tokenizer.build(name), _foreign(folder))


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "open_clip_config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in found["model_cfg"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable as an open_clip description ({error!r}); export it again") from None
    if missing:
        raise UserError(f"{path}: model_cfg lacks {', '.join(missing)}: an evaluation needs both towers")
    return found


def _foreign(folder: Path) -> dict[str, Any]:
    return {"checkpoint": str(folder), "step": None, "average": False}


def _refuse_average(source: str, average: bool | None) -> None:
    if average:
        raise UserError(f"{source} holds no averaged weights: leave --average at auto")


def _run_folder(source: str | Path, folder: checkpoint.Folder) -> checkpoint.Folder:
    """Where results go: the run folder that was named, or the one around the checkpoint that was."""
    named = checkpoint.folder_of(source)
    return folder.resolve().parent.parent if named == folder else named
