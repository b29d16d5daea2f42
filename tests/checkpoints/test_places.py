"""Checkpoints in stores without a rename, in other folders, and through the command line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from pretrain import checkpoint, cli, errors
from pretrain import checkpoint_files as files
from pretrain.checkpoints import attempts, places, report, writing
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.staging import Stage
from pretrain.checkpoints.url import Url, folder_of
from pretrain.checkpoints.writing import Keep
from pretrain.errors import ProcessDied, UserError

_spec = importlib.util.spec_from_file_location(
    "tests_test_checkpoint", Path(__file__).parents[1] / "test_checkpoint.py"
)
assert _spec is not None
assert _spec.loader is not None
base: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = base
_spec.loader.exec_module(base)
ONE = base.ONE


@pytest.fixture
def store() -> Url:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return Url("memory://bucket/run")


def listed(store: Url) -> list[str]:
    return files.names_in(store / "checkpoints")


def save(store: Url, step: int, number: int, **changes: Any) -> None:
    attempt = attempts.Attempt(number, (), "")
    saver = Saver(store, ONE, attempt, Keep(2))
    saver.save(lambda: base.make(step, **changes), "seed: 1\n")
    saver.wait()


def test_a_store_holds_what_a_disk_holds(store: Url) -> None:
    for step in (1, 2, 3):
        save(store, step, 1)
    assert listed(store) == ["step_00000002.1", "step_00000003.1"]
    found = checkpoint.newest(store, ONE)
    assert str(found) == "memory://bucket/run/checkpoints/step_00000003.1"
    assert found is not None
    base.assert_same(checkpoint.load(found, ONE), base.make(3))
    assert checkpoint.locate(str(store)) == found == checkpoint.locate(str(found))
    assert checkpoint.step_of(found) == 3
    assert (found / "config.yaml").read_text() == "seed: 1\n"


def test_without_commit_it_is_no_checkpoint_and_is_swept_by_later_attempts_alone(store: Url) -> None:
    save(store, 1, 1)
    save(store, 2, 2)
    (store / "checkpoints" / "step_00000002.2" / "COMMIT").remove()
    assert str(checkpoint.newest(store, ONE)).endswith("step_00000001.1")
    save(store, 3, 1)
    assert "step_00000002.2" in listed(store), "what a later attempt is writing is not for this one to touch"
    save(store, 4, 3)
    assert listed(store) == ["step_00000003.1", "step_00000004.3"]


def test_a_step_saved_again_replaces_the_older_one(store: Url) -> None:
    save(store, 5, 1, samples=1)
    save(store, 5, 1, samples=2)
    save(store, 5, 2, samples=3)
    assert listed(store) == ["step_00000005.2"]
    found = checkpoint.newest(store, ONE)
    assert found is not None
    assert checkpoint.load(found, ONE).samples == 3


@pytest.mark.parametrize("name", ["weights/model.safetensors", "state/trainer.json", "manifest.json"])
def test_damage_in_a_store_falls_back(store: Url, name: str) -> None:
    save(store, 1, 1)
    save(store, 2, 1)
    path = store / "checkpoints" / "step_00000002.1" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write(lambda: [bytes(content)])
    assert str(checkpoint.newest(store, ONE)).endswith("step_00000001.1")
    path.remove()
    assert str(checkpoint.newest(store, ONE)).endswith("step_00000001.1")


def test_what_a_store_refuses_is_one_line() -> None:
    with pytest.raises(UserError, match=r"nowhere://x/run.*cannot be read"):
        checkpoint.newest(folder_of("nowhere://x/run"), ONE)


FLAGS = ("--train.samples", "640", "--checkpoint.every-steps", "5", "--data.workers", "0", "--optim.ema-decay", "0.9")


def train(folder: Path, *flags: str) -> int:
    return cli.run(["train", "configs/debug.yaml", "--folder", str(folder), *FLAGS, *flags])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder) == 0
    return folder / "debug"


@pytest.mark.slow
def test_a_run_saves_to_a_store_and_goes_on_from_there(store: Url, trained: Path, tmp_path: Path) -> None:
    """Its last two checkpoints are taken away; it goes on from the one before, bit for bit."""
    to = ("--checkpoint.to", "memory://bucket")
    assert train(tmp_path, *to) == 0
    run, home = tmp_path / "debug", Url("memory://bucket/debug/checkpoints")
    assert not (run / "checkpoints").exists()
    (home / "step_00000020.1").remove()
    (home / "step_00000015.1" / "COMMIT").remove()
    assert train(tmp_path, *to) == 0
    assert files.names_in(home) == ["step_00000010.1", "step_00000015.2", "step_00000020.2"]
    whole = trained / "checkpoints" / "step_00000020"
    for name in files.manifest(whole):
        if name.endswith(".safetensors"):
            assert (home / "step_00000020.2" / name).read_bytes() == (whole / name).read_bytes(), name
    assert str(checkpoint.locate(run)) == str(home / "step_00000020.2")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "start"] == [0, 10]
    assert train(tmp_path) == 0, "what was saved elsewhere is found though the config no longer says so"
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_checkpoints_in_another_folder(tmp_path: Path) -> None:
    assert train(tmp_path / "runs", "--checkpoint.to", f"file://{tmp_path}/elsewhere") == 0
    found = checkpoint.locate(tmp_path / "runs" / "debug")
    assert found == tmp_path / "elsewhere/debug/checkpoints/step_00000020"
    assert list((tmp_path / "elsewhere/debug/attempts").iterdir())


@pytest.mark.slow
def test_inspect_verify_consolidate(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = trained / "checkpoints" / "step_00000020"
    assert cli.run(["checkpoint", "inspect", str(trained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        [f"step_{n:08d}", "complete", str(n * 32), "samples"] for n in (20, 15, 10)
    ]
    assert cli.run(["checkpoint", "inspect", str(step), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["samples"], found["world_size"], found["attempt"]) == (20, 640, 1, 1)
    weights = load_file(step / "weights" / "model.safetensors")
    told = {name: facts for name, facts in found["tensors"].items() if name.startswith("weights/model ")}
    assert {name.split()[1]: facts["shape"] for name, facts in told.items()} == {
        name: list(value.shape) for name, value in weights.items()
    }
    assert found["parts"]["state/rng"]["files"] == 1
    assert cli.run(["checkpoint", "consolidate", str(step), str(tmp_path / "out")]) == 0
    for plain, name in (("model", "model"), ("ema", "ema")):
        out, stored = (
            load_file(tmp_path / "out" / f"{plain}.safetensors"),
            load_file(step / f"weights/{name}.safetensors"),
        )
        assert all((out[key] == value).all() for key, value in stored.items())
        assert out.keys() == weights.keys()
    assert cli.run(["checkpoint", "consolidate", str(step), str(tmp_path / "out")]) == errors.USER_ERROR
    assert cli.run(["checkpoint", "verify", str(trained)]) == 0
    assert cli.run(["checkpoint", "mend", str(trained)]) == errors.USER_ERROR


def test_verify_names_every_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = (checkpoint.save(tmp_path, base.make(step), ONE, "") for step in (1, 2))
    assert isinstance(bad, Path)
    content = bytearray((bad / "weights/model.safetensors").read_bytes())
    content[-1] ^= 1
    (bad / "weights/model.safetensors").write_bytes(content)
    (bad / "config.yaml").write_text("more")
    assert cli.run(["checkpoint", "verify", str(tmp_path)]) == errors.USER_ERROR
    told = capsys.readouterr()
    assert "weights/model.safetensors: contents changed" in told.out
    assert "config.yaml: 4 bytes instead of 0" in told.out
    assert "1 of 2 checkpoints are damaged" in told.err
    assert report.verify(str(good)) == {str(good): []}
    assert report.inspect(str(tmp_path))["checkpoints"][bad.name]["condition"].startswith("damaged: config.yaml")
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint"):
        report.inspect(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("weights/model.safetensors", b"\x80\x04" + b"N" * 30 + b".", "is no safetensors file"),
        ("state/trainer.json", b"{}", "lacks format"),
        ("state/trainer.json", b'{"format": "two"}', "has 'two' for format"),
        ("state/trainer.json", b"7", "is no JSON object"),
        ("config.yaml", b"!!python/object/apply:os.getpid []", "is no YAML"),
    ],
)
def test_a_forged_file_of_another_form_is_one_line(
    tmp_path: Path, name: str, content: bytes, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint.save(tmp_path, base.make(1), ONE, "")
    assert isinstance(folder, Path)
    (folder / name).write_bytes(content)
    entries = json.loads((folder / "manifest.json").read_text())
    files.write_manifest(folder, entries | {name: files.digest(folder / name)})
    files.commit(folder)
    assert cli.run(["checkpoint", "verify", str(folder)]) == errors.USER_ERROR
    assert told in capsys.readouterr().out
    assert told in report.inspect(str(tmp_path))["checkpoints"][folder.name]["condition"]
    if name != "config.yaml":
        with pytest.raises(UserError, match=told):
            report.consolidate(str(folder), tmp_path / "out")


@pytest.mark.parametrize("entry", [7, None, {"size": 7}])
def test_a_forged_manifest_of_another_form_is_one_line(
    tmp_path: Path, entry: object, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint.save(tmp_path, base.make(1), ONE, "")
    assert isinstance(folder, Path)
    entries = json.loads((folder / "manifest.json").read_text())
    files.write_manifest(folder, entries | {"config.yaml": entry})
    files.commit(folder)
    told = f"manifest.json: holds no size and hash of config.yaml, but {str(entry)!r}"
    assert cli.run(["checkpoint", "verify", str(folder)]) == errors.USER_ERROR
    assert told in capsys.readouterr().out
    assert told in report.inspect(str(tmp_path))["checkpoints"][folder.name]["condition"]
    with pytest.raises(UserError, match="holds no size and hash of config"):
        report.consolidate(str(folder), tmp_path / "out")


def test_consolidate_makes_a_folder_on_a_disk_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = checkpoint.save(tmp_path, base.make(1), ONE, ""), tmp_path / "file"
    file.write_text("")
    for out, told in (("memory://bucket/out", "is a URL"), (str(file / "out"), "cannot be written")):
        assert cli.run(["checkpoint", "consolidate", str(folder), out]) == errors.USER_ERROR
        assert told in capsys.readouterr().err


def test_a_process_held_up_right_before_commit_withdraws_it(store: Url) -> None:
    save(store, 1, 1)
    place = places.of(store / "checkpoints", 1)

    def may() -> None:  # the later attempt starts between the last question and COMMIT
        if (place.working(2) / files.COMMIT).exists():
            raise ProcessDied("followed by attempt 2")

    with pytest.raises(ProcessDied, match="attempt 2"):
        writing.write(Stage().take(base.make(2), ONE, ""), place, ONE, may, Keep(1))
    assert listed(store) == ["step_00000001.1"]
