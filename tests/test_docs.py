"""What README and docs show is true: every example runs, every flag exists, every table is fresh.

A `console` block is run, line by line, in an empty folder; a `python` block, as it stands. An `sh` block needs a
cluster: its configs and flags are parsed. `python tests/test_docs.py` rewrites the table of knobs.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain import config
from pretrain.plan import table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = "<!-- knobs: written by `make golden` -->\n"
PREDICTIONS, PREDICTIONS_END = "<!-- predictions: written by `make golden` -->\n", "<!-- end of predictions -->\n"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "console") for line in block.replace("\\\n", "").splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=lambda page: page.name)
def test_console_examples_run(program: Any, page: Path, tmp_path: Path) -> None:
    """A page's first command, and launchers, as its reader starts them; the others in forks, which are cheaper."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def shell(command: str) -> str:
        how: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, shell=True, timeout=300, **how)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return str(done.stdout)

    first, *others = commands(page)
    shell(first)
    for command in others:
        if command.startswith("pretrain "):
            program.run(*shell(f"printf '%s\\n' {command}").splitlines()[1:], cwd=tmp_path)
        else:
            shell(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_other_examples_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `pretrain` command of an `sh` block has a verb, flags and a config that exist; nothing is carried out."""
    from pretrain import flags, runfile, train, verbs, verbs_doctor, verbs_launch, verbs_plan

    done: list[str] = []
    monkeypatch.setattr(train, "train", lambda run, *_: done.append(run.name))
    monkeypatch.setattr(verbs, "show", lambda *result, **how: None)
    monkeypatch.setattr(verbs, "bench", lambda args: done.append(args[0]))

    def launch(args: list[str]) -> None:
        want, _ = verbs_launch.read(args[0], args[1:])
        done.append(runfile.load(want.config, list(want.knobs)).name)

    monkeypatch.setattr(verbs, "launch", launch)
    monkeypatch.setattr(verbs, "plan", lambda args: done.append(verbs_plan.read(args)[1].name))
    monkeypatch.setattr(verbs, "doctor", lambda args: done.append(str(verbs_doctor.read(args))))
    monkeypatch.setattr(flags, "command", lambda call, args, prog: done.append(str(flags.bind(call, args, prog))))
    monkeypatch.chdir(ROOT)
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", "").splitlines()]
    commands = [words for line in lines if "pretrain" in (words := shlex.split(line, comments=True))]
    for words in commands:
        verb, *args = words[words.index("pretrain") + 1 :]
        getattr(verbs, verb)(args)
    assert len(done) == len(commands)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_examples_run(page: Path) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(
        r"`((?:pretrain|kernels|tests|configs|docs|benchmarks|docker)/[\w./-]+\.\w+)`", page.read_text()
    ):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def knob_table() -> str:
    lines = ["| knob | default | free | meaning |", "|---|---|---|---|"]
    for section in (
        None,
        *[item for item in dataclasses.fields(config.Run) if isinstance(item.default, dataclasses._MISSING_TYPE)],
    ):
        owner = config.Run if section is None else section.default_factory  # type: ignore[union-attr]
        if not dataclasses.is_dataclass(owner):
            continue
        meanings = described(owner.__name__)  # type: ignore[union-attr]
        for item in dataclasses.fields(owner):
            if item.name in meanings and item.default is not dataclasses.MISSING:
                name = item.name if section is None else f"{section.name}.{item.name}"
                free = "yes" if item.metadata.get("resume") == "free" else ""
                default = "empty" if item.default == () else item.default
                lines.append(f"| `{name}` | {default} | {free} | {meanings[item.name]} |")
    return "\n".join(lines) + "\n"


def described(section: str) -> dict[str, str]:
    """The doc line under each attribute of a section of config.py."""
    tree = ast.parse((ROOT / "pretrain" / "config.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == section)
    pairs = itertools.pairwise(body)
    return {
        ast.unparse(one.target): " ".join(ast.literal_eval(doc.value).split()).replace("|", "\\|")
        for one, doc in pairs
        if isinstance(one, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def with_predictions(text: str) -> str:
    """docs/engines.md with its table as it is predicted now."""
    before, rest = text.split(PREDICTIONS)
    return f"{before}{PREDICTIONS}{table.engines()}{PREDICTIONS_END}{rest.split(PREDICTIONS_END)[1]}"


def test_the_predictions_of_engines_are_fresh() -> None:
    text = (ROOT / "docs" / "engines.md").read_text()
    assert with_predictions(text) == text, "run `make golden`"


def test_the_table_of_knobs_is_fresh() -> None:
    assert (ROOT / "docs" / "config.md").read_text().split(MARK)[1] == knob_table(), "run `make golden`"


if __name__ == "__main__":
    page = ROOT / "docs" / "config.md"
    page.write_text(page.read_text().split(MARK)[0] + MARK + knob_table())
    page = ROOT / "docs" / "engines.md"
    page.write_text(with_predictions(page.read_text()))
