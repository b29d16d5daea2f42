"""What is minimised: one file per method; the file name is the name in the config."""

from __future__ import annotations

import sys

from pretrain import named
from pretrain.objectives.base import Objective


def names() -> list[str]:
    """Every built-in objective."""
    return named.names(sys.modules[__name__])


def find(name: str) -> type[Objective]:
    """The objective class of a file; a dotted name may live outside this package. UserError where there is none."""
    return named.find(sys.modules[__name__], name, Objective)
