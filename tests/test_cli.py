"""The command itself: help, exit codes, one line on the user's mistakes, and one rank that speaks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import cli, errors

ROOT = Path(__file__).resolve().parents[1]


def pretrain(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain", *args]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == errors.DONE
    said = capsys.readouterr().out
    assert all(f"pretrain {verb}" in said for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # how the parser ends after printing help
        cli.run([verb, "--help"])
    said = capsys.readouterr()
    assert verb in said.out
    assert not said.err


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["fly"]) == errors.USER_ERROR
    assert (
        capsys.readouterr().err == "pretrain fly: there is no such verb; one of train, evaluate, export, pack, index\n"
    )


def test_a_mistake_ends_with_2_and_one_line() -> None:
    done = pretrain("train", "configs/debug.yaml", "--optim.lrr", "1")
    assert (done.returncode, done.stdout) == (errors.USER_ERROR, "")
    assert done.stderr.count("\n") == 1
    assert "optim.lrr" in done.stderr


def test_only_the_first_rank_speaks() -> None:
    done = pretrain("train", "configs/debug.yaml", "--optim.lrr", "1", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (errors.USER_ERROR, "")


def test_print_config_reloads(tmp_path: Path) -> None:
    done = pretrain("train", "configs/debug.yaml", "--print-config", "--optim.lr", "0.5")
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout)
    assert pretrain("train", str(path), "--print-config").stdout == done.stdout
    assert "lr: 0.5" in done.stdout


def test_help_needs_neither_torch_nor_tyro() -> None:
    heavy = "{'torch', 'tyro', 'numpy'} & set(sys.modules)"
    code = f"import sys; from pretrain import cli; cli.run(['--help']); sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
