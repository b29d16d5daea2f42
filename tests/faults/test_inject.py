"""What PRETRAIN_FAULT may say, and when it happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import cli, errors, phases
from pretrain.drill import faults, outcome, ranks, table
from pretrain.drill.acts import ACTS
from pretrain.drill.inject import HAPPENS, armed
from pretrain.drill.spec import Spec, parse


def test_specs_are_read() -> None:
    assert parse("kill@backward:step=7:rank=1,slow@writing:times=0:value=0.5:detail=weights/*:edge=leave", ACTS) == [
        Spec("kill", "backward", step=7, rank=1),
        Spec("slow", "writing", edge="leave", times=0, value=0.5, detail="weights/*"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("melt@loss", "'melt' is no fault; one of kill, "),
        ("kill", "'' is no phase; one of start, "),
        ("kill@lunch", "'lunch' is no phase"),
        ("kill@loss:when=3", "when=3; give edge=..., step=..."),
        ("kill@loss:edge=middle", "edge=middle; give"),
        ("kill@loss:step=soon", "step=soon is not a number"),
    ],
)
def test_what_is_not_understood_is_refused_before_the_run(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRETRAIN_FAULT", text)
    assert cli.run(["train", "configs/debug.yaml"]) == errors.USER_ERROR
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"pretrain train: PRETRAIN_FAULT {text}: ")
    assert said in told[0]


def steps(count: int) -> list[str]:
    """Where a run of so many steps is broken off by the armed faults, step by step."""
    broken = []
    for step in range(1, count + 1):
        with phases.phase("data"):
            pass
        for name in ("text_tower", "loss"):
            try:
                with phases.phase(name, f"of {step}"):
                    broken.append(f"in {name} {step}")
            except RuntimeError:
                broken.append(f"{name} {step}")
    return [entry for entry in broken if not entry.startswith("in ")]


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("raise@loss", ["loss 1"]),
        ("raise@loss:step=3", ["loss 3"]),
        ("raise@loss:step=2:nth=2:times=2", ["loss 3", "loss 4"]),
        ("raise@loss:times=0:step=4", ["loss 4", "loss 5"]),
        ("raise@loss:detail=*2", ["loss 2"]),
        ("raise@loss:edge=leave:nth=5", ["loss 5"]),
        ("raise@loss:step=2,raise@text_tower:step=4", ["loss 2", "text_tower 4"]),
        ("raise@loss:rank=1", []),
        ("raise@loss:step=6", []),
    ],
)
def test_a_fault_happens_when_it_should(text: str, broken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with armed(text):
        assert steps(5) == broken
    assert steps(5) == [], "nothing is left behind"


def test_a_fault_is_told_once_and_not_in_forks(capfd: pytest.CaptureFixture[str]) -> None:
    with armed("raise@loss:times=0"):
        assert len(steps(2)) == 2
        pid = os.fork()
        if not pid:
            os._exit(len(steps(2)))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert capfd.readouterr().err == f"{HAPPENS} raise@loss enter of 1\n"


def test_an_ordinary_run_imports_nothing_of_the_drill() -> None:
    code = (
        "import sys\nfrom pretrain import verbs\nwith verbs.faults(): print([n for n in sys.modules if 'drill.' in n])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PRETRAIN_FAULT"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_catalogue_holds_what_is_promised() -> None:
    names = [fault.name for fault in faults.catalogue(2)]
    assert len(names) == len(set(names)) >= 25
    for phase in ("data", "exchange", "backward", "optimizer", "staging", "writing", "committing", "pruning"):
        assert any(name.startswith(f"kill-{phase}") for name in names), phase


def test_ends_have_words() -> None:
    assert [ranks.word(code) for code in (0, 1, 2, 85, 3, -9, -15)] == [
        *("done", "failed", "refused", "saved", "exit 3"),
        *("SIGKILL", "SIGTERM"),
    ]


def test_a_difference_is_named() -> None:
    one = {"a w": "float32 [2] 00", "b w": "float32 [2] 01"}
    assert outcome.difference(one, dict(one)) is None
    assert outcome.difference(one | {"b w": "float32 [2] 02"}, one) == "1 of 2 tensors differ, the first is b w"
    assert outcome.difference({}, one) == "2 of 2 tensors differ, the first is a w"


def test_one_bit_of_one_tensor_is_another_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "step_00000012"
    (folder / "weights").mkdir(parents=True)
    monkeypatch.setattr(outcome.checkpoint, "locate", lambda path: folder)
    tensors = {"w": torch.arange(4, dtype=torch.bfloat16), "scale": torch.tensor(2.0), "none": torch.empty(0)}
    save_file(tensors, folder / "weights" / "model.safetensors")
    before = outcome.fingerprint(tmp_path, 12)
    assert len(before) == 3
    tensors["w"].view(torch.int16)[2] ^= 1
    save_file(tensors, folder / "weights" / "model.safetensors")
    said = outcome.difference(outcome.fingerprint(tmp_path, 12), before)
    assert said == "1 of 3 tensors differ, the first is weights/model.safetensors w"
    assert outcome.difference(outcome.fingerprint(tmp_path, 15), before) is not None, "not the last checkpoint"


def test_the_table_tells_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    good = table.Row("kill", "SIGKILL", ("SIGKILL+failed", "done"), "equal", 2.0, ())
    bad = table.Row("flip", "a bit", ("done",), "different", 1.0, ("3 of 9 tensors differ",))
    for row in (good, bad):
        table.tell(row, as_json=False, first=row is good)
    table.tell_end([good, bad], 3.0, as_json=False)
    head, first, second, problem, total, failed = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "fault"
    assert first.split() == ["kill", "SIGKILL", "SIGKILL+failed,", "done", "equal", "2.0"]
    assert "different" in second
    assert problem == "    FAILED: 3 of 9 tensors differ"
    assert (total, failed) == ("2 faults, 1 as they should be, 3 s", "failed: flip")


def test_a_drill_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["drill", "--only", "nothing"]) == errors.USER_ERROR
    assert cli.run(["drill", "--ranks", "1"]) == errors.USER_ERROR
    told = capsys.readouterr().err.splitlines()
    assert "no fault has such a name" in told[0]
    assert "at least 2" in told[1]
