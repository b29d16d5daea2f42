"""The command itself: help, exit codes, one line on the user's mistakes, and one rank that speaks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import cli, errors, verbs

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
    assert capsys.readouterr().err == f"pretrain fly: there is no such verb; one of {', '.join(cli.VERBS)}\n"


def test_a_mistake_ends_with_2_and_one_line() -> None:
    done = pretrain("train", "configs/debug.yaml", "--optim.lrr", "1")
    assert (done.returncode, done.stdout) == (errors.USER_ERROR, "")
    assert done.stderr.count("\n") == 1
    assert "optim.lrr" in done.stderr


def test_only_the_first_rank_speaks() -> None:
    done = pretrain("train", "configs/debug.yaml", "--optim.lrr", "1", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (errors.USER_ERROR, "")


CRASHES = """
import atexit, os
from pretrain import cli

class Crash:
    def __del__(self):
        os.abort()

crash = Crash()
cli.run = lambda words: atexit.register(print, "a library has ended in order") and 85
print("said before")
cli.main()
"""
"""A library that fails while the interpreter is torn down, as gloo's threads do."""


@pytest.mark.parametrize(("ranks", "code"), [("2", errors.REQUEUE), ("1", -6)])
def test_a_rank_ends_with_its_code_whatever_libraries_do_at_the_end(ranks: str, code: int) -> None:
    variables = os.environ | {"RANK": "0", "WORLD_SIZE": ranks}
    command = [sys.executable, "-c", CRASHES]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert ranks == "1" or done.stdout == "said before\na library has ended in order\n"


def test_help_is_no_failure_on_several_ranks() -> None:
    assert pretrain("export", "--help", RANK="0", WORLD_SIZE="2").returncode == errors.DONE


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


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "bench nothing: name what to measure, one of loss, step, data, overlap"),
        (["speed"], "bench speed: name what to measure, one of loss, step, data, overlap"),
        (["loss", "--rounds", "many"], "invalid int value: 'many' (see pretrain bench loss --help)"),
        (["overlap", "--turns", "3"], "unrecognized arguments: --turns 3 (see pretrain bench overlap --help)"),
    ],
)
def test_bench_tells_a_mistake_in_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *args]) == errors.USER_ERROR
    found = capsys.readouterr()
    assert said in found.err
    assert (found.out, found.err.count("\n")) == ("", 1)


def test_bench_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verbs, "__file__", str(tmp_path / "site-packages" / "pretrain" / "verbs.py"))
    assert cli.run(["bench", "loss"]) == errors.USER_ERROR
    assert "clone the repository and run `pip install -e .` there" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_prints_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--sizes", "64", "--widths", "16", "--losses", "siglip", "--rounds", "1", "--threads", "1"]
    assert cli.run(["bench", "loss", *small, "--out", str(tmp_path), "--json"]) == errors.DONE
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "loss_cpu.json").read_text()) | {"header": printed["header"]}
    assert {record["case"] for record in printed["records"]} == {"siglip B=64 d=16 float32"}
