"""The doctor on one rank: what it says of a good config, of bad ones, and how it reads its command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain import cli, runfile
from pretrain.doctor import examination, registry, towers
from pretrain.doctor.base import Check, Finding, Patient
from pretrain.errors import UserError
from pretrain.verbs_doctor import Asked, read
from pretrain.world import World

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "configs" / "debug.yaml")
ALONE = World(0, 1, 0, torch.device("cpu"))


def test_a_good_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["--folder", str(tmp_path), "--bad-nodes", str(tmp_path / "bad"), "--json"]
    assert cli.run(["doctor", DEBUG, "--model.speed", "causal", *asked]) == 0
    told = json.loads(capsys.readouterr().out)
    found = {line["name"]: line for line in told["findings"]}
    assert "fail" not in {line["status"] for line in found.values()}
    assert "torch 2." in found["packages"]["found"]
    assert "debug-tiny" in found["image tower"]["found"]
    assert found["speed causal"]["found"] == "on"
    assert "no convolutions" in found["speed channels_last"]["found"]
    assert found["graph breaks, text tower"]["found"] == "none"
    assert found["disk of run folder"]["status"] == "ok"
    assert found["all-reduce"]["found"] == "skipped: one rank"
    made = {line["check"] for line in found.values()}
    assert made == {"config", *(check.name for check in registry.CHECKS)}
    assert told["bad_nodes"] == [] == list((tmp_path / "bad").iterdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "bad"], "it left something behind"


def test_an_option_that_does_not_apply_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", DEBUG, "--model.speed", "channels_last", "--only", "speed"]) == 2
    said = capsys.readouterr()
    assert "fail  speed channels_last" in said.out
    assert "mend: leave channels_last out of model.speed" in said.out
    assert "to be mended first: speed channels_last" in said.err


def test_without_a_config_only_the_machine_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--only", "limits", "cores", "disk"]) == 0
    told = capsys.readouterr().out
    assert "open files" in told
    assert "cores" in told
    assert "disk" not in told


def test_a_config_that_cannot_be_is_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "no.yaml", "--only", "limits", "disk"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "fail config file no.yaml: cannot be read as a config" in said
    assert "open files" in said, "the machine can be looked at all the same"


def test_help_lists_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(check.name in said for check in registry.CHECKS)


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("", Asked()),
        ("c.yaml --seed 3 --json", Asked(("c.yaml", "--seed", "3"), json=True)),
        ("c.yaml --only a b --seed 3", Asked(("c.yaml", "--seed", "3"), only=("a", "b"))),
        ("--only a --json --only=b --skip c", Asked(json=True, only=("a", "b"), skip=("c",))),
        ("c.yaml --bad-nodes x --limit=2.5", Asked(("c.yaml",), bad_nodes=Path("x"), limit_s=2.5)),
        ("--json c.yaml --data.train a b", Asked(("c.yaml", "--data.train", "a", "b"), json=True)),
    ],
)
def test_the_command_line(line: str, asked: Asked) -> None:
    assert read(line.split()) == asked


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--seed 3", "--seed: which config?"),
        ("c.yaml --bad-nodes", "--bad-nodes needs a value"),
        ("--limit soon", "--limit soon must be a number of seconds"),
        ("--limit inf", "--limit inf must be a number of seconds"),
        ("--only rings", "there is no check 'rings'; there are packages, pairs"),
    ],
)
def test_mistakes_on_the_command_line(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", *line.split()]) == 2
    assert said in capsys.readouterr().err


def test_breaks_are_told_with_their_place() -> None:
    def broken(rows: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return rows + 1

    said = towers.breaks(lambda rows: broken(rows * 2), torch.ones(2))
    assert len(said) >= 1
    assert f"{__file__}:" in said[0]


@pytest.mark.parametrize("error", [UserError("no such thing"), OSError("no such thing")])
def test_what_a_check_raises_is_a_finding(error: Exception) -> None:
    def look(patient: Patient) -> Iterator[Finding]:
        raise error
        yield

    check = Check("check", look, "it", "why")
    (found,) = examination.look(check, Patient(ALONE, ("here",)))
    assert (found.name, found.status) == ("check", "fail")
    assert "no such thing" in found.found


def test_a_check_of_a_config_is_left_out_where_it_cannot_be_read() -> None:
    check = Check("check", lambda patient: iter([Finding("check", patient.run.name)]), "it", "why", config=True)
    patient = Patient(ALONE, ("here",))
    assert list(examination.look(check, patient)) == []
    assert [found.found for found in examination.look(check, replace(patient, config=runfile.load(DEBUG, [])))]


PAGE, MARK, END = ROOT / "docs" / "doctor.md", "<!-- checks: written by tests -->\n", "<!-- end of checks -->\n"


def renewed(text: str) -> str:
    before, _, rest = text.partition(MARK)
    return before + MARK + registry.table() + END + rest.partition(END)[2]


def test_the_table_of_checks_is_fresh() -> None:
    text = PAGE.read_text()
    assert text == renewed(text), f"run `python {Path(__file__).relative_to(ROOT)}`"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
