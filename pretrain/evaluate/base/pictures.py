"""Image files as a data set: whole, or a box of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from PIL import Image

from pretrain.config import Data
from pretrain.data.images.decode import BadSample, decode
from pretrain.data.shards.fingerprint import Fact
from pretrain.data.shards.reader import RawSample
from pretrain.errors import UserError
from pretrain.values import Skip


@dataclass(frozen=True)
class Box:
    """A part of an image, in pixels of the upright image."""

    left: float
    top: float
    width: float
    height: float
    dilate: float = 0.0
    """How much wider and higher the part is that is taken; GeneCIS starts that far above and left of the box."""
    square: bool = False
    """Whether the part is laid in the middle of a black square."""

    def cut(self, image: Image.Image) -> Image.Image:
        """The part, RGB.

        Raises:
            BadSample: nothing of it lies in the image.
        """
        left, top = max(0.0, self.left - self.dilate * self.width), max(0.0, self.top - self.dilate * self.height)
        right = min(image.width, left + (1 + self.dilate) * self.width)
        bottom = min(image.height, top + (1 + self.dilate) * self.height)
        edges = [round(edge) for edge in (left, top, right, bottom)]
        if edges[0] >= edges[2] or edges[1] >= edges[3]:
            raise BadSample(f"its box {edges} is empty in an image of {image.width} x {image.height}")
        part = image.crop((edges[0], edges[1], edges[2], edges[3]))
        return _squared(part) if self.square else part


@dataclass(frozen=True)
class Picture:
    """A sample that lies in a file of its own."""

    path: Path
    box: Box | None = None
    captions: tuple[str, ...] = ()
    label: int | None = None


@dataclass
class Pictures:
    """A `reader.Source` of image files."""

    items: Sequence[Picture]
    weights: list[float] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    damage: tuple[Skip, ...] = ()

    def __post_init__(self) -> None:
        self.counts, self.entries = [len(self.items)], [1]
        self.fingerprint: str = xxhash.xxh3_128_hexdigest(repr(list(self.items)).encode())
        """Of names, boxes, captions and labels; not of pixels."""

    def __len__(self) -> int:
        return len(self.items)

    def key(self, number: int) -> str:
        return str(self.items[number].path)

    def sample(self, number: int) -> RawSample:
        item = self.items[number]
        try:
            data = item.path.read_bytes()
        except OSError as error:
            raise BadSample(error.strerror or str(error)) from None
        if item.box is not None:
            data = _as_file(item.box.cut(decode(data)))
        return RawSample(str(item.path), data, {"": list(item.captions)}, {"label": item.label})


def of_folder(root: Path) -> tuple[Pictures, list[str]]:
    """ImageNet's layout, ROOT/CLASS/**/IMAGE: the class of an image is the number of its folder in the order of names.

    Returns:
        The images in the order of their paths, and the folders' names.

    Raises:
        UserError: there are no folders in it, or one holds no image.
    """
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise UserError(f"data.eval: {root} has no subfolders; lay images out as {root.name}/CLASS/IMAGE.jpg")
    items = []
    for label, name in enumerate(names):
        files = [path for path in (root / name).rglob("*") if path.suffix.lower().lstrip(".") in Data.image_keys]
        if not files:
            raise UserError(f"data.eval: {root / name} holds no image; remove the folder, or fill it")
        items += [Picture(path, label=label) for path in sorted(files)]
    return Pictures(items), names


def _squared(image: Image.Image) -> Image.Image:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _as_file(image: Image.Image) -> bytes:
    """RGB pixels as the plainest lossless file (PPM)."""
    return f"P6 {image.width} {image.height} 255\n".encode() + image.tobytes()
