"""What is minimised: one file per method; the file name is the name in the config.

A name with a dot is imported as it stands, so that a method may live outside this repository.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from pretrain.errors import UserError
from pretrain.objectives.base import Objective

_VOCABULARY = {"base", "ops", "state"}


def names() -> list[str]:
    """Every built-in objective."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _VOCABULARY)


def find(name: str) -> type[Objective]:
    """The objective class of a file.

    Raises:
        UserError: there is no such file; the message names the nearest.
    """
    if "." not in name and name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        raise UserError(f"objective {name!r} does not exist; {f'did you mean {near[0]}?' if near else 'there are'} {', '.join(names())}")
    module = importlib.import_module(name if "." in name else f"{__name__}.{name}")
    return next(
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Objective) and item.__module__ == module.__name__
    )
