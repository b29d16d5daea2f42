"""One parser (tyro) for every verb, with its errors brought down to one line."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pretrain.errors import UserError

T = TypeVar("T")


def parse(schema: type[T], args: Sequence[str], prog: str, default: T) -> T:
    """A frozen dataclass from flags; booleans are written out, `--x True`, so that a YAML file can hold them.

    Raises:
        UserError: an argument is unknown, missing or does not parse; one line.
        SystemExit: help was asked for and printed.
    """
    import tyro

    parsed: T = _run(schema, args, prog, default=default, config=(tyro.conf.FlagConversionOff,))
    return parsed


def command(function: Callable[..., T], args: Sequence[str], prog: str) -> T:
    """Call a function with its arguments read from the command line; errors as in `parse`."""
    positional, named = bind(function, args, prog)
    return function(*positional, **named)


def bind(function: Callable[..., T], args: Sequence[str], prog: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that `command` would call a function with."""

    @functools.wraps(function)
    def bound(*positional: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return positional, named

    return _run(bound, args, prog)  # type: ignore[no-any-return]


def _run(target: Callable[..., Any], args: Sequence[str], prog: str, **options: Any) -> Any:
    import tyro

    if {"-h", "--help"} & set(args):
        return tyro.cli(target, args=args, prog=prog, **options)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(target, args=args, prog=prog, **options)
    except SystemExit:
        raise UserError(f"{_gist(said.getvalue())} (see {prog} --help)") from None


def _gist(boxed: str) -> str:
    """The sentence inside tyro's box."""
    rule = "─-═━"
    inside = [line.strip(" │|╭╮╰╯\n") for line in boxed.splitlines()]
    rules = [n for n, line in enumerate(inside) if line and not line.strip(rule)]
    body = inside[rules[0] + 1 : rules[1]] if len(rules) > 1 else inside
    return " ".join(" ".join(body).split()) or "the arguments do not parse"
