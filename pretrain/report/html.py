"""HTML that is safe by its making: whatever is not `Html` is text, and is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

EMPTY = ("img", "meta", "link", "br", "rect", "path", "line", "circle", "use")


class Html(str):
    """Markup; only `tag`, `join` and `raw` make it."""

    __slots__ = ()


def tag(element: str, *inside: str, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        inside: children; a plain string is text.
        attributes: `class_` is class, `aria_label` is aria-label; None and False leave one out, True has no value.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if element in EMPTY and not inside:
        return Html(f"<{element}{given}/>")
    return Html(f"<{element}{given}>{join(inside)}</{element}>")


def join(parts: Iterable[str], between: str = "") -> Html:
    """Parts after each other, plain strings escaped."""
    return raw(between.join(part if isinstance(part, Html) else text(part) for part in parts))


def raw(markup: str) -> Html:
    """Our own markup, such as a style sheet: nothing that was read from anywhere."""
    return Html(markup)


def text(words: str) -> Html:
    """Escaped, without control characters, which no document may hold, and without reordering of what follows."""
    return Html(escape("".join(c for c in words if c.isprintable() or c in " \n\t"), quote=True))


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None, class_: str | None = None
) -> Html:
    """A table whose first column names its rows; a region of its own that scrolls, so the page does not."""
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in heads)))
    lines = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    named = tag("caption", caption) if caption else ""
    inside = tag("table", named, head, tag("tbody", *lines), class_=class_)
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption or "table")


def picture(jpeg: bytes, alt: str, side: int, kind: str = "jpeg", **attributes: str | None) -> Html:
    """An image that is in the page itself."""
    source = f"data:image/{kind};base64,{base64.b64encode(jpeg).decode()}"
    return tag("img", src=source, alt=alt, width=side, height=side, **attributes)


def _attribute(key: str, value: str | float | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    if isinstance(value, bool):
        return f" {name}" if value else ""
    return f' {name}="{text(str(value))}"'
