"""The file name is the registry: methods are found by the name of their file, or, with a dot, anywhere on the path."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from pretrain.errors import UserError

VOCABULARY = {
    "base",
    "blocks",
    "card",
    "deepspeed_config",
    "graph",
    "layout",
    "ops",
    "probe",
    "proof",
    "relay",
    "shards",
    "state",
    "towers_hf",
    "transport",
    "trip",
    "vocabulary",
    "zero",
}
"""Files of a package that are no method."""


def names(package: ModuleType) -> list[str]:
    """Every method of a package, by name."""
    return sorted(item.name for item in pkgutil.iter_modules(package.__path__) if item.name not in VOCABULARY)


def module(package: ModuleType, name: str) -> ModuleType:
    """The file of a method.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    known = names(package)
    kind = package.__name__.rpartition(".")[2].removesuffix("s")
    if "." not in name and name not in known:
        near = difflib.get_close_matches(name, known, 1)
        guess = f"did you mean {near[0]}? There are" if near else "there are"
        raise UserError(f"{kind} {name!r} does not exist; {guess} {', '.join(known)}")
    try:
        return importlib.import_module(name if "." in name else f"{package.__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise UserError(f"{kind} {name!r} does not exist: no module {error.name!r} on the path") from None


def find(package: ModuleType, name: str, promise: type) -> type:
    """The class in a method's file that keeps a promise (its base class, or the protocol's methods)."""
    file = module(package, name)
    own = [item for item in vars(file).values() if isinstance(item, type) and item.__module__ == file.__name__]
    methods = [key for key, value in vars(promise).items() if callable(value) and not key.startswith("_")]
    for item in own:
        if all(callable(getattr(item, method, None)) for method in methods):
            return item
    raise UserError(f"{file.__name__} holds no {promise.__name__}: it must define {', '.join(methods)}")
