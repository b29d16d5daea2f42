"""A run as text: a YAML file is flags written down, and flags come after it.

`load` flattens the file to `--section.key value`, appends the user's flags, and gives the lot to one parser; the later
wins, so a file, an override and a sweep's `--optim.lr=3e-4` obey one rule. `dump` writes a run that loads back equal.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pretrain import flags
from pretrain.config import Choice, Run
from pretrain.errors import UserError
from pretrain.named import VOCABULARY


def load(path: str | Path | None, args: list[str]) -> Run:
    """A run: the defaults, then the file, then the flags; the later wins.

    Raises:
        UserError: the file cannot be read, a key is unknown, a value does not fit, or a combination is impossible.
    """
    tree = _read(Path(path)) if path is not None else {}
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    choices, args = _choices(tree.pop("objective", "clip"), args)
    schema, default = _schema([choice["name"] for choice in choices])
    written = _flatten(tree) + _flatten({"objective": {_field(c["name"]): _without(c, "name") for c in choices}})
    known = dict(_knobs(default))
    _check_names(known, written, f" in {path}")
    _check_names(known, args, " on the command line")
    parsed = flags.parse(schema, _spelled(known, [*written, *args]), "pretrain train CONFIG", default)
    values = {item.name: getattr(parsed, item.name) for item in dataclasses.fields(Run)}
    _check_method("engines", parsed.engine)
    _check_method("exchange", parsed.exchange)
    objective = tuple(Choice(c["name"], getattr(parsed.objective, _field(c["name"]))) for c in choices)
    return Run(**values | {"objective": objective})


def dump(run: Run) -> str:
    """YAML with every knob at its resolved value; `load` of it gives a run equal to this one."""
    tree = {item.name: _plain(getattr(run, item.name)) for item in dataclasses.fields(Run)}
    tree["objective"] = [{"name": c.name} | _plain(c.options) for c in run.objective]
    return yaml.safe_dump(tree, sort_keys=False, width=120)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _Once)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: a config is a mapping of knobs, not a {type(tree).__name__}")
    return tree or {}


class _Once(yaml.SafeLoader):
    """YAML that refuses a key written twice, where YAML itself would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"{twice[0]} is written twice{str(node.start_mark).partition('file>')[2]}: keep one")
        return super().construct_mapping(node, deep)


def _check_method(kind: str, name: str) -> None:
    """An engine or exchange is a file of its folder, known without importing it; a dotted name lies elsewhere."""
    known = sorted(path.stem for path in (Path(__file__).parent / kind).glob("*.py") if path.stem[0] != "_")
    known = ["auto", *(stem for stem in known if stem not in VOCABULARY)]
    if "." not in name and name not in known:
        raise UserError(f"{kind.removesuffix('s')} {name!r} does not exist; there are {', '.join(known)}")


def _choices(written: Any, args: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The objectives as dictionaries with a name, and the flags without the one that chooses them."""
    listed = written if isinstance(written, list) else [written]
    choices = [{"name": item} if isinstance(item, str) else item for item in listed]
    for item in choices:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise UserError(f"objective {item!r} must be a name or a mapping with one, such as {{name: clip}}")
    while "--objective" in args:
        at = args.index("--objective")
        names = args[at + 1].split(",") if at + 1 < len(args) else [""]
        choices = [next((c for c in choices if c["name"] == name), {"name": name}) for name in names]
        args = args[:at] + args[at + 2 :]
    names = [c["name"] for c in choices]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"objective {name!r} is listed twice; raise its weight instead")
    return choices, args


def _schema(names: list[str]) -> tuple[type, Any]:
    """Run with `objective` narrowed to the options of the chosen objectives, and its defaults."""
    from pretrain import objectives

    options = {_field(name): objectives.find(name).Options for name in names}
    parts = dataclasses.make_dataclass(
        "Objectives",
        [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in options.items()],
        frozen=True,
        kw_only=True,
    )
    body = {"__annotations__": {"objective": parts}, "objective": dataclasses.field(default_factory=parts)}
    schema: Any = type("Run", (Run,), body | {"__doc__": Run.__doc__, "__post_init__": lambda self: None})
    schema = dataclasses.dataclass(frozen=True, kw_only=True)(schema)
    return schema, schema()


def _check_names(known: dict[str, str], args: list[str], where: str) -> None:
    for arg in args:
        name = _name(arg)
        if not arg.startswith("--") or name in known or name == "help":
            continue
        if any(knob.startswith(f"{name}.") for knob in known):
            raise UserError(f"{name} is a section{where}: set one of its knobs, such as {_nearest(name, known)}")
        raise UserError(f"{name} is not a knob{where}; did you mean {_nearest(name, known)}?")


def _spelled(known: dict[str, str], args: list[str]) -> list[str]:
    """Truth and absence as Python spells them, where YAML and people write true, false, none or null."""
    spelled, kind = [], ""
    for arg in args:
        kind = known.get(_name(arg), "") if arg.startswith("--") else kind
        truth = {"true": "True", "false": "False"} if kind == "bool" else {}
        absence = {"none": "None", "null": "None"} if kind.endswith("None") else {}
        spelled.append((truth | absence).get(arg.lower(), arg))
    return spelled


def _name(arg: str) -> str:
    return arg.removeprefix("--").replace("-", "_")


def _nearest(name: str, known: dict[str, str]) -> str:
    inside = [knob for knob in known if knob.startswith(f"{name}.")]
    close = difflib.get_close_matches(name, list(known), 1, 0.8)
    by_last_word = {knob.rpartition(".")[2]: knob for knob in reversed(known)}
    words = [by_last_word[word] for word in difflib.get_close_matches(name.rpartition(".")[2], by_last_word, 1, 0.7)]
    same_section = [knob for knob in known if knob.rpartition(".")[0] == name.rpartition(".")[0]]
    return (inside or close or words or same_section or list(known))[0]


def _knobs(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, type as written) of every leaf."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from _knobs(value, f"{prefix}{item.name}.")
        else:
            yield (
                f"{prefix}{item.name}",
                item.type if isinstance(item.type, str) else getattr(item.type, "__name__", ""),
            )


def _flatten(tree: dict[str, Any], prefix: str = "--") -> list[str]:
    args: list[str] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            args += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            args += [f"{prefix}{key}", *map(str, value)]
        else:
            args += [f"{prefix}{key}", str(value)]
    return args


def _field(name: str) -> str:
    """An objective's name as a flag's: a dotted module path keeps its last part."""
    return name.rpartition(".")[2]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _without(tree: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in tree.items() if k != key}
