"""What is asked for: a text, an image, and sets that answers are to lie in or outside of.

Set operations after SetCSE (Liu, ICLR 2024, 'SetCSE: Set Operations using Contrastive Learning of Sentence
Embeddings'): the similarity of x to a set is the mean of its similarities to the members; x is scored by the sum over
the sets to include less the sum over the sets to exclude. Similarities are cosines, so the score is the product of x
with one vector: the sum of the means of the included sets' features less that of the excluded ones'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.data.images.decode import BadSample, decode
from pretrain.data.images.transforms import eval_image
from pretrain.errors import UserError
from pretrain.evaluate.base.sources import Opened


@dataclass(frozen=True)
class Query:
    """One search. A set is a text, or '@FILE' with a member a line."""

    text: str | None = None
    image: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As it is shown."""
        asked = [self.text] if self.text is not None else []
        asked += [str(self.image)] if self.image is not None else []
        return " ∩ ".join([*asked, *self.include]) + "".join(f" \\ {each}" for each in self.exclude)


def queries(texts: Sequence[str], images: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> list[Query]:
    """A search for each text and each image, all with the same sets; for the sets alone where there is neither.

    Raises:
        UserError: nothing is asked for but what to leave out.
    """
    sets = tuple(include), tuple(exclude)
    found = [Query(text, None, *sets) for text in texts] + [Query(None, Path(image), *sets) for image in images]
    if not found and not include:
        raise UserError("nothing is asked for: give --text, --image or --include")
    return found or [Query(None, None, *sets)]


def vectors(asked: Sequence[Query], opened: Opened) -> Tensor:
    """[Q, D] fp32 on the encoder's device: the product with a feature is its score.

    Raises:
        UserError: a file of a set or an image cannot be read, or a set is empty.
    """
    known: dict[str, Tensor] = {}

    def of_set(name: str) -> Tensor:
        if name not in known:
            known[name] = _texts(members(name), opened).mean(0)
        return known[name]

    return torch.stack([_vector(query, of_set, opened) for query in asked])


def members(name: str) -> list[str]:
    """The texts of a set."""
    if not name.startswith("@"):
        found = [name]
    else:
        try:
            found = Path(name[1:]).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"set {name}: cannot be read ({' '.join(str(error).split())})") from None
    found = [text.strip() for text in found if text.strip()]
    if not found:
        raise UserError(f"set {name!r} is empty: give a text, or @FILE with a text a line")
    return found


def _vector(query: Query, of_set: Callable[[str], Tensor], opened: Opened) -> Tensor:
    wanted = [of_set(query.text)] if query.text is not None else []
    wanted += [_image(query.image, opened)] if query.image is not None else []
    wanted += [of_set(name) for name in query.include]
    return torch.stack([*wanted, *(-of_set(name) for name in query.exclude)]).sum(0)


def _texts(texts: list[str], opened: Opened) -> Tensor:
    device = opened.encoder.towers.logit_scale.device
    parts = [opened.tokenize(texts[start : start + 256]).to(device) for start in range(0, len(texts), 256)]
    return torch.cat([opened.encoder.encode_text(part) for part in parts]).float()


def _image(path: Path, opened: Opened) -> Tensor:
    try:
        pixels = eval_image(decode(path.expanduser().read_bytes()), opened.encoder.image_spec)
    except (OSError, BadSample) as error:
        raise UserError(f"--image {path}: cannot be used ({' '.join(str(error).split())})") from None
    device = opened.encoder.towers.logit_scale.device
    return opened.encoder.encode_image(torch.from_numpy(pixels)[None].to(device))[0].float()
