"""JSON files of published benchmarks: what they say of which image, told by their form and not by their name.

Forms, each with the images in the folder named behind '@', or else in the JSON's own:

    captions      COCO's {"images", "annotations"}; Karpathy's {"images": [{"filename", "sentences", "split"}]}
    composition   SugarCrepe's {"0": {"filename", "caption", "negative_caption"}}; ARO's [{"image_path",
                  "true_caption", "false_caption", "bbox_x"...}] or [{"image_path", "caption_options"}]
    conditional   GeneCIS's [{"reference", "target", "gallery", "condition"}]

Sources: Lin et al. 2014 (arXiv:1405.0312); Karpathy and Fei-Fei 2015 (arXiv:1412.2306); Hsieh et al. 2023
(arXiv:2306.14610); Yuksekgonul et al. 2023 (arXiv:2210.01936); Vaze et al. 2023 (arXiv:2306.07969).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.errors import UserError
from pretrain.evaluate.base.pictures import Box, Picture

Kind = Literal["captions", "composition", "conditional"]
GENECIS_DILATE = 0.7
_SPLIT = "test"


@dataclass(frozen=True)
class Choice:
    """An image with one right caption and wrong ones."""

    texts: tuple[str, ...]
    """The right one first."""
    name: str
    """Of the JSON, without its ending."""
    group: str | None = None
    """ARO's relation or attributes."""


@dataclass(frozen=True)
class Query:
    """Which picture of a gallery resembles a reference under a condition; pictures by number."""

    reference: int
    gallery: tuple[int, ...]
    """The target first."""
    condition: str
    name: str


@dataclass(frozen=True)
class Annotated:
    """What files of one kind say."""

    kind: Kind
    pictures: list[Picture]
    records: list[Any]
    """composition: a Choice for each picture; conditional: Query; captions: none."""
    left_out: int = 0
    """GeneCIS's questions whose gallery has not the usual size, which its own evaluation leaves out too."""


def read(entries: Iterable[str]) -> Annotated:
    """All files together, which must be of one kind.

    Args:
        entries: 'FILE.json' or 'FILE.json@FOLDER'.

    Raises:
        UserError: a file is not readable, of no known form, or of another kind than the first.
    """
    parts = [_parsed(entry) for entry in entries]
    if len({part.kind for part in parts}) > 1:
        raise UserError(f"data: {', '.join(part.kind for part in parts)} files in one evaluation; name one kind")
    return _joined(parts)


def kind_of(entry: str) -> Kind | None:
    """What a file holds; None where it is a list of weighted shards.

    Raises:
        UserError: it is not readable, or of no known form.
    """
    path = split(entry)[0]
    found = _load(path)
    if isinstance(found, dict) and found and all(isinstance(weight, int | float) for weight in found.values()):
        return None
    for kind, (fits, _) in _FORMS.items():
        if fits(found):
            return kind
    raise UserError(
        f"data {path}: of no known form; COCO or Karpathy captions, SugarCrepe, ARO and GeneCIS are (docs/evaluate.md)"
    )


def split(entry: str) -> tuple[Path, Path]:
    """(JSON, folder of images)."""
    name, at, folder = entry.partition(".json@")
    path = Path(name + ".json" if at else name).expanduser()
    return path, Path(folder).expanduser() if at else path.parent


def is_annotation(entry: str) -> bool:
    """Whether an entry of data.eval may be an annotation file, by its name."""
    return "://" not in entry and (entry.endswith(".json") or ".json@" in entry)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"data {path}: not readable as JSON ({' '.join(str(error).split())})") from None


def _parsed(entry: str) -> Annotated:
    path, folder = split(entry)
    kind = kind_of(entry)
    if kind is None:
        raise UserError(f"data {path}: lists weighted shards, not images; name it alone")
    try:
        return _FORMS[kind][1](_load(path), folder, path.stem)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"data {path}: an entry is not of the file's form ({error!r})") from None


def _captions(found: Mapping[str, Any], folder: Path, name: str) -> Annotated:
    if "annotations" in found:
        texts: dict[Any, list[str]] = defaultdict(list)
        for item in found["annotations"]:
            texts[item["image_id"]].append(item["caption"])
        listed = [(image["file_name"], texts[image["id"]]) for image in found["images"]]
    else:
        kept = [image for image in found["images"] if image.get("split", _SPLIT) == _SPLIT]
        listed = [
            (Path(image.get("filepath", "")) / image["filename"], [item["raw"] for item in image["sentences"]])
            for image in kept
        ]
    pictures = [Picture(folder / file, captions=tuple(captions)) for file, captions in listed]
    return Annotated("captions", pictures, [])


def _composition(found: Any, folder: Path, name: str) -> Annotated:
    items = list(found.values()) if isinstance(found, dict) else found
    pictures = [Picture(folder / (item.get("filename") or item["image_path"]), _aro_box(item)) for item in items]
    return Annotated("composition", pictures, [Choice(_options(item), name, _group(item)) for item in items])


def _options(item: Mapping[str, Any]) -> tuple[str, ...]:
    if "caption_options" in item:
        return tuple(item["caption_options"])
    if "true_caption" in item:
        return item["true_caption"], item["false_caption"]
    return item["caption"], item["negative_caption"]


def _group(item: Mapping[str, Any]) -> str | None:
    if "attributes" in item:
        return "_".join(item["attributes"])
    return item.get("relation_name")


def _aro_box(item: Mapping[str, Any]) -> Box | None:
    return Box(item["bbox_x"], item["bbox_y"], item["bbox_w"], item["bbox_h"]) if "bbox_x" in item else None


def _conditional(found: Any, folder: Path, name: str) -> Annotated:
    usual = Counter(len(item["gallery"]) for item in found).most_common(1)[0][0]
    numbers: dict[Picture, int] = {}

    def number(item: Mapping[str, Any]) -> int:
        return numbers.setdefault(_genecis_picture(item, folder), len(numbers))

    kept = [item for item in found if len(item["gallery"]) == usual]
    queries = [
        Query(
            number(item["reference"]),
            tuple(number(image) for image in (item["target"], *item["gallery"])),
            item["condition"],
            name,
        )
        for item in kept
    ]
    return Annotated("conditional", list(numbers), queries, len(found) - len(kept))


def _genecis_picture(item: Mapping[str, Any], folder: Path) -> Picture:
    if "instance_bbox" in item:
        return Picture(folder / f"{item['image_id']}.jpg", _genecis_box(*item["instance_bbox"]))
    if "val_image_id" in item:
        return Picture(folder / f"{int(item['val_image_id']):012d}.jpg")
    return Picture(folder / Path(item.get("filepath") or item["filename"]).name)


def _genecis_box(left: float, top: float, width: float, height: float) -> Box:
    return Box(left, top, width, height, GENECIS_DILATE, square=True)


def _joined(parts: list[Annotated]) -> Annotated:
    pictures: list[Picture] = []
    records: list[Any] = []
    for part in parts:
        first = len(pictures)
        pictures += part.pictures
        records += [
            Query(item.reference + first, tuple(n + first for n in item.gallery), item.condition, item.name)
            if isinstance(item, Query)
            else item
            for item in part.records
        ]
    return Annotated(parts[0].kind, pictures, records, sum(part.left_out for part in parts))


def _first(found: Any) -> Mapping[str, Any]:
    items = list(found.values()) if isinstance(found, dict) else found
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def _is_composition(found: Any) -> bool:
    keys = _first(found).keys()
    return {"caption", "negative_caption"} <= keys or "true_caption" in keys or "caption_options" in keys


_FORMS: dict[Kind, tuple[Callable[[Any], bool], Callable[[Any, Path, str], Annotated]]] = {
    "captions": (lambda found: isinstance(found, dict) and isinstance(found.get("images"), list), _captions),
    "composition": (_is_composition, _composition),
    "conditional": (lambda found: {"reference", "gallery", "condition"} <= _first(found).keys(), _conditional),
}
