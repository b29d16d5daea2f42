"""The output on docs/plan.md is what the command above it prints. As a script: renews it."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest

from pretrain.verbs_plan import plan

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "plan.md"
COMMAND, BLOCK, END = "pretrain plan ", "```text\n", "```\n"


def printed() -> str:
    """What the first command of the page prints."""
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(COMMAND))
    os.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plan(line.removeprefix(COMMAND).split())
    return out.getvalue()


def parts() -> tuple[str, str, str]:
    """The page before, in and after its output."""
    before, rest = PAGE.read_text().split(BLOCK, 1)
    inside, after = rest.split(END, 1)
    return before + BLOCK, inside, END + after


@pytest.mark.slow
def test_the_output_on_the_page_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert [line.split() for line in printed().splitlines()] == [line.split() for line in parts()[1].splitlines()]


if __name__ == "__main__":
    first, _, last = parts()
    PAGE.write_text(first + printed().rstrip("\n") + "\n" + last)
