"""Class names and prompt templates: from files, from open_clip's ImageNet lists, or from the names of folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.compat import open_clip
from pretrain.errors import UserError

IMAGENET, FOLDERS = "imagenet", "folders"
TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


@dataclass(frozen=True)
class Classes:
    """Class names in the order of their labels, and templates with {} where the name goes."""

    names: list[str]
    templates: list[str]

    def prompts(self, name: str) -> list[str]:
        return [template.replace("{c}", "{}").replace("{}", name) for template in self.templates]

    @staticmethod
    def read(path: Path, folders: Sequence[str] | None = None) -> Classes:
        """Read {"names": [...], "templates": [...]}; names may also be {folder: name}.

        Args:
            folders: names of the class folders, by label, where the samples lie in such.

        Raises:
            UserError: the file is not of this form, or a template has no place for a name.
        """
        try:
            found = json.loads(path.read_text())
            names, templates = found["names"], list(found["templates"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'classes {path}: not readable as {{"names": [...], "templates": [...]}} ({error!r})'
            ) from None
        return _checked(Classes(_named(names, folders, path), templates), f"classes {path}")


def choose(given: str | Path, templates: str | None, folders: Sequence[str] | None) -> Classes:
    """The classes that a command line means.

    Args:
        given: a classes.json; a text file with a name a line; 'imagenet'; 'folders', where the samples lie in such.
        templates: a text file with a template a line, 'openai' or 'simple'; None: those of classes.json, or openai's
            for 'imagenet'.
        folders: names of the class folders.

    Raises:
        UserError: a file is not readable, there are no templates, or names and folders differ in number.
    """
    own: list[str] = []
    where = f"classes {given}"
    if str(given) == IMAGENET:
        names, templates = list(open_clip.IMAGENET_CLASSNAMES), templates or "openai"
    elif str(given) == FOLDERS:
        names = _of_folders(folders)
    elif str(given).endswith(".json"):
        read = Classes.read(Path(given), folders)
        names, own = read.names, read.templates
    else:
        names = _lines(Path(given), "classes")
    own = _templates(templates) if templates else own
    if not own:
        raise UserError(f"{where}: names alone; add --templates openai, --templates simple, or a file of them")
    return _checked(Classes(names, own), where, folders)


def _templates(given: str) -> list[str]:
    if given in TEMPLATES:
        return [template("{}") for template in getattr(open_clip, TEMPLATES[given])]
    return _lines(Path(given), "templates")


def _of_folders(folders: Sequence[str] | None) -> list[str]:
    if folders is None:
        raise UserError("classes folders: the samples do not lie in class folders; name a file of class names")
    return [name.replace("_", " ") for name in folders]


def _named(names: object, folders: Sequence[str] | None, path: Path) -> list[str]:
    if not isinstance(names, dict):
        return [str(name) for name in names] if isinstance(names, list) else []
    order = list(names) if folders is None else list(folders)
    if missing := [folder for folder in order if folder not in names]:
        raise UserError(f"classes {path}: names has no entry for folder {missing[0]!r}; add it")
    return [str(names[folder]) for folder in order]


def _lines(path: Path, what: str) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: not readable as text ({error!r})") from None


def _checked(classes: Classes, where: str, folders: Sequence[str] | None = None) -> Classes:
    for template in classes.templates:
        if "{}" not in template and "{c}" not in template:
            raise UserError(f"{where}: template {template!r} has no {{}} where the name goes")
    if not classes.names or not classes.templates:
        raise UserError(f"{where}: names and templates must not be empty")
    if folders is not None and len(folders) != len(classes.names):
        raise UserError(f"{where}: {len(classes.names)} names for {len(folders)} class folders; they must be as many")
    return classes
