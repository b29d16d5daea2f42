"""Checkpoints in the background: what the loop waits for, what is copied, how failures arrive, who may still save."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint, errors
from pretrain import checkpoint_files as files
from pretrain.checkpoints import attempts, state, tensors
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.writing import Keep
from pretrain.errors import ProcessDied, UserError
from pretrain.world import World


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"tests_{name}", Path(__file__).parents[1] / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


base = _load("test_checkpoint")
ONE = base.ONE
KEEP = Keep(2)


class Held:
    """Stands in for `tensors.write`: nothing is written before it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.write = threading.Event(), tensors.write
        monkeypatch.setattr(tensors, "write", self)

    def __call__(self, *args: Any) -> dict[str, int | str]:
        assert self.go.wait(30)
        return self.write(*args)


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, saver, state = Held(monkeypatch), Saver(tmp_path, ONE, None, KEEP), base.make(3)
    saver.save(lambda: state, "")
    for values in (state.weights, state.optimizer, state.average, state.objective, state.rng):
        for tensor in values.values():
            tensor.zero_()
    assert not list(tmp_path.rglob("*.safetensors"))
    assert saver.finished() == []
    held.go.set()
    saver.wait()
    [facts] = saver.finished()
    assert list(facts) == ["step", "bytes", "staging_s", "waited_s", "writing_s"]
    found = checkpoint.newest(tmp_path, ONE)
    assert found is not None
    base.assert_same(checkpoint.load(found, ONE), base.make(3))
    listed = files.manifest(found)
    assert facts["bytes"] == sum(entry["size"] for entry in listed.values())


def test_the_next_save_waits_and_uses_the_buffers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, saver = Held(monkeypatch), Saver(tmp_path, ONE, None, KEEP)
    saver.save(lambda: base.make(1), "")
    buffers = {key: tensor.data_ptr() for key, tensor in saver._stage._buffers.items()}
    threading.Timer(0.3, held.go.set).start()
    saver.save(lambda: base.make(2), "")
    saver.save(lambda: base.make(3), "")
    saver.wait()
    assert {key: tensor.data_ptr() for key, tensor in saver._stage._buffers.items()} == buffers
    first, second, third = saver.finished()
    assert second["waited_s"] > 0.2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    for step in (2, 3):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        base.assert_same(checkpoint.load(folder, ONE), base.make(step))
    assert (first["step"], third["step"]) == (1, 3)


def test_a_failure_arrives_once_and_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = checkpoint.save(tmp_path, base.make(1), ONE, "")
    saver = Saver(tmp_path, ONE, None, KEEP)
    monkeypatch.setattr(tensors, "write", base._full)
    saver.save(lambda: base.make(2), "")
    while not saver.failed:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"saving checkpoint .*step_00000002: .*No space left on device"):
        saver.wait()
    assert saver.finished() == []
    assert [p.name for p in good.parent.iterdir()] == [good.name]
    monkeypatch.undo()
    saver.save(lambda: base.make(2), "")
    saver.wait()
    assert checkpoint.newest(tmp_path, ONE) == good.with_name("step_00000002")


def test_what_ends_a_run_waits_for_what_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, saver = Held(monkeypatch), Saver(tmp_path, ONE, None, KEEP)
    threading.Timer(0.2, held.go.set).start()
    saver.save(lambda: base.make(2), "")
    with pytest.raises(RuntimeError, match="the data is gone"), saver:
        raise RuntimeError("the data is gone")
    assert checkpoint.newest(tmp_path, ONE) is not None


def _fails_on_one(folder: Path) -> list[str]:
    world = base._world()
    saver = Saver(folder, world, None, KEEP)
    if world.rank == 1:
        tensors.write = base._full
    try:
        saver.save(lambda: base._of_rank(3, world.rank), "")
        # The ranks' main threads go on with collectives of their own.
        counts = [world.share(n) for n in range(20)]
        while not world.any(saver.failed)[0]:
            time.sleep(0.01)
        saver.wait()
    except UserError as error:
        return [str(error), str(counts[-1])]
    finally:
        tensors.write = base._write
    return ["saved"]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_failure_in_the_background_of_one_rank_is_everyones(ranks: Any, tmp_path: Path) -> None:
    told = ranks(2).run(_fails_on_one, tmp_path)
    assert all("No space left on device" in text for text, _ in told), told
    assert [counts for _, counts in told] == ["[19, 19]"] * 2
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_attempts_are_numbered_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    first, second = attempts.take([tmp_path]), attempts.take([tmp_path, tmp_path / "elsewhere"])
    assert (first.number, second.number) == (1, 2)
    second.refuse_late()
    with pytest.raises(ProcessDied, match=rf"attempt 1 .* attempt 2 \(process {os.getpid()} on .*saves nothing more"):
        first.refuse_late()
    facts = json.loads((tmp_path / "elsewhere" / "attempts" / second.file).read_text())
    assert (facts["attempt"], facts["pid"], facts["slurm_restart_count"]) == (2, os.getpid(), "4")


def test_a_late_attempt_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off while it writes; meanwhile another one starts, sweeps, and is itself in the middle of a save."""
    held, zombie = Held(monkeypatch), attempts.take([tmp_path])
    late = Saver(tmp_path, ONE, zombie, Keep(1))
    late.save(lambda: base.make(4), "")
    while not list(tmp_path.glob("checkpoints/.saving*")):
        time.sleep(0.01)
    live = attempts.take([tmp_path])
    (tmp_path / "checkpoints" / f".saving_{live.number:05d}_step_00000005").mkdir()
    held.go.set()
    with pytest.raises(ProcessDied, match="has been followed by attempt 2"):
        late.wait()
    late.save(lambda: base.make(6), "")
    with pytest.raises(ProcessDied, match="has been followed by attempt 2"):
        late.wait()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [".saving_00002_step_00000005"]
    saver = Saver(tmp_path, ONE, live, Keep(1))
    saver.save(lambda: base.make(7), "")
    saver.wait()
    [folder] = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.read_trainer(folder)["attempt"] == 2


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights/model.safetensors", "weights/model.pt", "state/optimizer.safetensors"])
@pytest.mark.parametrize("forged", [False, True])
def test_a_malicious_file_is_never_run(tmp_path: Path, name: str, forged: bool) -> None:
    """A pickle in place of a file, or beside the files; and with a manifest and COMMIT that vouch for it."""
    folder, trap = checkpoint.save(tmp_path, base.make(1), ONE, ""), tmp_path / "trap"
    (folder / name).write_bytes(pickle.dumps(Bomb(trap)))
    if forged:
        entries = json.loads((folder / "manifest.json").read_text())
        files.write_manifest(folder, entries | {name: files.digest(folder / name)})
        files.commit(folder)
    if name.endswith(".pt"):
        state = checkpoint.load(checkpoint.locate(tmp_path), ONE)
        assert torch.equal(state.weights["visual.proj"], base.make(1).weights["visual.proj"])
    elif forged:
        with pytest.raises(UserError, match="is no safetensors file"):
            checkpoint.load(checkpoint.locate(tmp_path), ONE)
    else:
        with pytest.raises(UserError, match=f"no good one .*{Path(name).name}"):
            checkpoint.locate(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["weights/model.safetensors", "state/trainer.json", "config.yaml", None])
def test_what_the_manifest_does_not_list_is_not_read(tmp_path: Path, name: str | None) -> None:
    folder = checkpoint.save(tmp_path, base.make(1), ONE, "")
    entries = json.loads((folder / "manifest.json").read_text())
    found = [] if name is None else {key: entry for key, entry in entries.items() if key != name}
    files.write_plain(folder / "manifest.json", json.dumps(found))
    files.commit(folder)
    with pytest.raises(UserError, match="holds a list" if name is None else f"does not list {name}"):
        checkpoint.locate(tmp_path)


def test_a_file_of_several_writers_is_missed(tmp_path: Path) -> None:
    listed = ["config.yaml", "state/trainer.json", "state/optimizer.safetensors"]
    listed += [f"weights/model-{n:05d}-of-00003.safetensors" for n in (1, 3)]
    assert state.absent(listed) == ["weights/model-00002-of-00003.safetensors"]
    assert state.absent([*listed, "weights/model-00002-of-00003.safetensors"]) == []


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname"])
def test_a_manifest_does_not_point_outside(tmp_path: Path, name: str) -> None:
    folder = checkpoint.save(tmp_path, base.make(1), ONE, "")
    entries = json.loads((folder / "manifest.json").read_text())
    files.write_plain(folder / "manifest.json", json.dumps(entries | {name: {"size": 1, "xxh3_64": "0"}}))
    files.commit(folder)
    with pytest.raises(UserError, match="lies outside of the checkpoint"):
        checkpoint.locate(tmp_path)


@pytest.mark.slow
def test_a_process_cut_off_from_its_successor_saves_nothing(program: Any, tmp_path: Path) -> None:
    """Stopped by SIGSTOP while another start goes on, past a lock that a cut-off node does not see; then continued."""
    folder = tmp_path / "debug"
    words = ("train", "configs/debug.yaml", "--folder", tmp_path, "--train.samples", 640_000)
    words = (*words, "--checkpoint.every-steps", 5, "--data.workers", 0)
    with program.start(*words) as zombie:
        program.until_step(zombie, folder, 7)
        zombie.send_signal(signal.SIGSTOP)
        (folder / ".lock").unlink()
        with program.start(*words) as live:
            program.until_step(live, folder, 12)
            live.terminate()
            said = live.communicate(timeout=60)[1]
        assert live.returncode == errors.REQUEUE, said
        before = {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")}
        zombie.send_signal(signal.SIGCONT)
        told = zombie.communicate(timeout=60)[1]
    assert zombie.returncode == errors.FAILURE, told
    assert told.count("has been followed by attempt 2") == 1
    assert "Traceback" not in told
    assert {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")} == before
    assert checkpoint.newest(folder, World(0, 1, 0, torch.device("cpu"))) is not None
