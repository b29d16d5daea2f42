"""Which steps `--profile` records."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pretrain.errors import UserError

MOST = 100
"""Steps of a trace that a viewer still opens."""


@dataclass(frozen=True)
class Window:
    """Steps of a start, the first of which is 1; both ends are recorded."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """'10..12'.

        Raises:
            UserError: it is no range, or one that no trace can hold.
        """
        found = re.fullmatch(r"(\d+)\.\.(\d+)", text.strip())
        if found is None:
            raise UserError(f"--profile {text}: give the first and the last step of this start, as in --profile 10..12")
        window = cls(int(found[1]), int(found[2]))
        if not 1 <= window.first <= window.last:
            raise UserError(f"--profile {text}: steps count from 1, and the first comes before the last")
        if len(window) > MOST:
            raise UserError(f"--profile {text}: {len(window)} steps make a trace no viewer opens; take at most {MOST}")
        return window

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"


def take_from(args: list[str]) -> tuple[Window | None, list[str]]:
    """The window that a command line asks for with `--profile A..B` or `--profile=A..B`, and the other arguments.

    Raises:
        UserError: see `Window.parse`.
    """
    window, others, words = None, [], iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--profile":
            others.append(word)
        else:
            window = Window.parse(value if equals else next(words, "without steps"))
    return window, others
