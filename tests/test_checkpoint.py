"""Checkpoints: round trips, damage, crashes at every file system event, and the peers' known failures by name."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint, claim, runfile
from pretrain import checkpoint_files as files
from pretrain.checkpoint import State
from pretrain.checkpoints import places, tensors, writing
from pretrain.checkpoints import state as names
from pretrain.config import Run
from pretrain.errors import UserError
from pretrain.world import World

ONE = World(0, 1, 0, torch.device("cpu"))
PARTS = (
    *("weights/model.safetensors", "weights/ema.safetensors", "state/optimizer.safetensors"),
    *("state/objective.safetensors", "state/rng_00000.safetensors", "state/trainer.json", "config.yaml"),
)


def make(step: int, **changes: Any) -> State:
    generator = torch.Generator().manual_seed(step)
    weights = {"visual.proj": torch.randn(5, 3, generator=generator), "logit_scale": torch.tensor(2.0 + step)}
    state = State(
        step=step,
        samples=step * 32,
        weights=weights,
        average={"visual.proj": torch.randn(5, 3, generator=generator)},
        optimizer={
            "exp_avg/visual.proj": torch.randn(5, 3, generator=generator),
            "step/visual.proj": torch.tensor(1.0),
        },
        objective={"0.queue": torch.arange(4)},
        rng={"torch": torch.arange(9, dtype=torch.uint8)},
        facts={"data": "f00", "skipped": 3},
    )
    return dataclasses.replace(state, **changes)


def assert_same(one: State, other: State) -> None:
    for item in dataclasses.fields(State):
        a, b = getattr(one, item.name), getattr(other, item.name)
        if isinstance(a, Mapping) and item.name != "facts":
            assert a.keys() == b.keys(), item.name
            for name in a:
                assert a[name].dtype == b[name].dtype
                assert torch.equal(a[name], b[name]), (item.name, name)
        else:
            assert a == b, item.name


def test_round_trip_is_bitwise_and_complete(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, make(7), ONE, "seed: 1\n")
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    assert_same(checkpoint.load(folder, ONE), make(7))
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {*PARTS, "manifest.json", "COMMIT"}
    assert (folder / "config.yaml").read_text() == "seed: 1\n"
    assert json.loads((folder / "manifest.json").read_text()).keys() == set(PARTS)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_optional_parts_are_left_out(tmp_path: Path) -> None:
    state = make(1, average=None, objective={})
    folder = checkpoint.save(tmp_path, state, ONE, "")
    assert not checkpoint.has_average(folder)
    assert not (folder / "state/objective.safetensors").exists()
    assert_same(checkpoint.load(folder, ONE), state)


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {
        "tied": base,
        "tied_too": base,
        "view": base[2:7],
        "transposed": base.view(3, 4).t(),
        "scalar": torch.tensor(3.5, requires_grad=True),
        "empty": torch.empty(0, 4),
        "empty_too": torch.empty(0),
        "bool": torch.tensor([True, False]),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "double": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float64),
    }
    files.write_tensors(tmp_path / "x.safetensors", tensors)
    back = files.read_tensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].shape == value.shape
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name].nan_to_num(7.0), value.detach().nan_to_num(7.0)), name
    assert torch.signbit(back["double"][2])


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = checkpoint.save(tmp_path, make(1), ONE, "")
    finally:
        os.umask(before)
    for path in folder.rglob("*.*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044, path


def test_no_pickle_in_a_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, make(1), ONE, "")
    for path in folder.rglob("*"):
        assert path.is_dir() or path.suffix in (".safetensors", ".json", ".yaml") or path.name == "COMMIT"


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(handle: int) -> None:
        happened.append(os.readlink(f"/proc/self/fd/{handle}").rpartition("/checkpoints")[2])
        fsync(handle)

    def recorded_rename(a: Any, b: Any) -> None:
        happened.append("rename")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    checkpoint.save(tmp_path, make(1), ONE, "")
    at = happened.index("rename")
    temp = "/.saving_00000_step_00000001"
    names = {f"{temp}/{name}" for name in (*PARTS, "manifest.json", "COMMIT", "weights", "state")} | {temp}
    assert names <= set(happened[:at])
    commit = happened.index(f"{temp}/COMMIT")
    assert all(happened.index(name) < commit for name in names - {f"{temp}/COMMIT"})
    assert happened[at + 1] == ""


@pytest.mark.parametrize("name", [*PARTS, "manifest.json", "COMMIT"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_damage_falls_back_and_is_reported(tmp_path: Path, caplog: Any, name: str, damage: str) -> None:
    good, bad = (checkpoint.save(tmp_path, make(step), ONE, "seed: 1\n") for step in (1, 2))
    content = bytearray((bad / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x10
    content = {"flip": content, "truncate": content[:-1], "empty": b"", "remove": b""}[damage]
    (bad / name).write_bytes(content)
    if damage == "remove":
        (bad / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path, ONE) == good
    assert "step_00000002" in caplog.text
    assert Path(name).name in caplog.text
    assert checkpoint.locate(tmp_path) == good
    with pytest.raises(UserError, match="step_00000002"):
        checkpoint.locate(bad)


def test_none_good_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, ONE) is None
    for step in (1, 2):
        (checkpoint.save(tmp_path, make(step), ONE, "") / "weights/model.safetensors").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"no good one .*step_00000002: weights/model.safetensors: 1 bytes.*step_00000001"
    ):
        checkpoint.newest(tmp_path, ONE)


def test_d6_leftovers_are_never_mistaken_for_checkpoints(tmp_path: Path) -> None:
    """open_clip's `--resume latest` takes the highest name: a half-written epoch, or tmp.pt."""
    good = checkpoint.save(tmp_path, make(1), ONE, "")
    for name in (".saving_00000_step_00000009", ".removing_step_00000008", "tmp", "step_00000002.tmp", "step_2"):
        shutil.copytree(good, good.with_name(name))
    assert checkpoint.newest(tmp_path, ONE) == good
    checkpoint.save(tmp_path, make(2), ONE, "")
    assert not list(good.parent.glob(".*"))


def test_d7_killed_between_the_two_renames(tmp_path: Path) -> None:
    """open_clip's latest swap: only _trash_latest and _tmp_latest are left, and it restarts from epoch 0."""
    folder = checkpoint.save(tmp_path, make(5), ONE, "")
    aside = folder.rename(folder.with_name(".aside_step_00000005"))
    shutil.copytree(aside, folder.with_name(".saving_step_00000005"))
    assert checkpoint.newest(tmp_path, ONE) == aside
    assert_same(checkpoint.load(aside, ONE), make(5))
    assert checkpoint.locate(tmp_path) == aside
    checkpoint.save(tmp_path, make(6), ONE, "")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step_00000005", "step_00000006"]
    assert_same(checkpoint.load(folder, ONE), make(5))


def test_d8_without_its_last_file_it_is_no_checkpoint(tmp_path: Path) -> None:
    """open_clip's sharded checkpoint without _metadata_extra.pt loads as start_epoch 0, without an error."""
    for name in ("COMMIT", "state/trainer.json"):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        folder = checkpoint.save(tmp_path, make(5), ONE, "")
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{Path(name).name}: missing"):
            checkpoint.newest(tmp_path, ONE)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make(3, samples=1), ONE, "")
    folder = checkpoint.save(tmp_path, make(3, samples=2), ONE, "")
    assert checkpoint.load(folder, ONE).samples == 2
    assert [p.name for p in folder.parent.iterdir()] == ["step_00000003"]


def test_disk_full_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = checkpoint.save(tmp_path, make(1), ONE, "")
    write = files.write_plain

    def full(path: Path, value: Any) -> None:
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device", str(path))
        write(path, value)

    monkeypatch.setattr(files, "write_plain", full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(tmp_path, make(2), ONE, "")
    assert [p.name for p in good.parent.iterdir()] == [good.name]
    assert checkpoint.newest(tmp_path, ONE) == good


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from pretrain import checkpoint_files as files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    files.write_tensors(Path(sys.argv[1]) / "x.safetensors", {"a": torch.zeros(100_000)})
except OSError as error:
    print("OSError", error)
"""


@pytest.mark.slow
def test_a_refused_write_of_tensors_is_an_oserror(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OSError")
    assert "x.safetensors" in done.stdout


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_checkpoint import ONE, assert_same, files, make
from pretrain import checkpoint
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.writing import Keep

root, again = Path(sys.argv[1]), sys.argv[3] == "again"
new = 1 if again else 2

def attempt(run, at):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = [0]
    def hook(event, args):
        if event == "open" or event.split(".")[0] in ("os", "shutil"):
            if any(str(run) in str(a) for a in args):
                seen[0] += 1
                if seen[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    if sys.argv[3] == "background":
        saver = Saver(run, ONE, None, Keep(1))
        saver.save(lambda: make(new, samples=77), "x: 1")
        saver.wait()
    else:
        checkpoint.save(run, make(new, samples=77), ONE, "x: 1")
        checkpoint.prune(run, 1)
    os._exit(0)

at, outcomes = 1, []
while True:
    run = root / f"run{at}"
    checkpoint.save(run, make(1), ONE, "x: 0")
    code = attempt(run, at)
    found = checkpoint.newest(run, ONE)
    state = checkpoint.load(found, ONE)
    old = state.samples == 32
    assert_same(state, make(1) if old else make(new, samples=77))
    outcomes.append("old" if old else "new")
    assert all(files.fault(folder) is None for folder in checkpoint.whole_checkpoints([run]))
    last = checkpoint.save(run, make(9), ONE, "x: 2")
    checkpoint.prune(run, 1)
    assert [p.name for p in last.parent.iterdir()] == [last.name], list(last.parent.iterdir())
    assert_same(checkpoint.load(checkpoint.newest(run, ONE), ONE), make(9))
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    at += 1
print(at, outcomes.count("old"), outcomes.count("new"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["next", "again", "background"])
def test_killed_at_every_file_system_event(tmp_path: Path, how: str) -> None:
    """SIGKILL at each event of a save and a prune: the newest checkpoint is the old one or the new one, whole."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    events, old, new = map(int, done.stdout.split())
    assert events > 25
    assert old > 15
    assert new > 2


def test_prune_keeps_the_last_and_the_milestones(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint.save(tmp_path, make(step), ONE, "")
    gone = checkpoint.prune(tmp_path, 2, 3)
    assert [p.name for p in gone] == ["step_00000001", "step_00000002", "step_00000004", "step_00000005"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step_{n:08d}" for n in (3, 6, 7)]
    assert checkpoint.prune(tmp_path, 2, 3) == []


def test_prune_keeps_the_one_that_a_run_would_go_back_to(tmp_path: Path) -> None:
    folders = [checkpoint.save(tmp_path, make(step), ONE, "") for step in range(1, 8)]
    (folders[3] / "weights/model.safetensors").write_bytes(b"")
    place = places.of(tmp_path / "checkpoints")
    writing.prune(place, writing.Keep(2, before=5))
    assert sorted(place.listed()) == [3, 6, 7], "4 is damaged"
    writing.prune(place, writing.Keep(2, before=7))
    assert sorted(place.listed()) == [6, 7]


def test_prune_never_counts_a_damaged_one(tmp_path: Path) -> None:
    folders = [checkpoint.save(tmp_path, make(step), ONE, "") for step in (1, 2, 3)]
    (folders[2] / "weights/model.safetensors").write_bytes(b"")
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.newest(tmp_path, ONE) == folders[1]
    assert not folders[0].exists()
    (folders[1] / "COMMIT").unlink()
    assert checkpoint.prune(tmp_path, 1) == []


def test_locate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint"):
        checkpoint.locate(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint.locate(tmp_path)
    folder = checkpoint.save(tmp_path, make(4), ONE, "")
    assert checkpoint.locate(tmp_path) == folder
    assert checkpoint.locate(str(folder)) == folder
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert checkpoint.locate(copied) == copied


def test_averaged_weights_are_completed_by_the_frozen_ones(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, make(4), ONE, "")
    plain, average = checkpoint.read_weights(folder, False), checkpoint.read_weights(folder, True)
    assert torch.equal(plain["visual.proj"], make(4).weights["visual.proj"])
    assert torch.equal(average["visual.proj"], make(4).average["visual.proj"])  # type: ignore[index]
    assert torch.equal(average["logit_scale"], plain["logit_scale"])
    folder = checkpoint.save(tmp_path, make(5, average=None), ONE, "")
    with pytest.raises(UserError, match="ema_decay"):
        checkpoint.read_weights(folder, True)


@pytest.mark.parametrize(
    ("written", "rule"), [(3, "later than 2; update pretrain"), (1, "older than 2; use the version")]
)
def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, rule: str) -> None:
    monkeypatch.setattr(names, "FORMAT", written)
    folder = checkpoint.save(tmp_path, make(4), ONE, "")
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"format {written} is {rule}"):
        checkpoint.load(folder, ONE)


def a_run(*args: str) -> Run:
    defaults = [
        "--data.train",
        "synthetic:1024",
        "--train.samples",
        "64",
        "--train.global-batch",
        "32",
        "--name",
        "mine",
    ]
    return runfile.load(None, [*defaults, *args])


def test_claim_refuses_another_run(tmp_path: Path) -> None:
    first = a_run("--optim.lr", "0.1")
    claim.claim(tmp_path / "mine", first, ONE, runfile.dump(first))
    claim.claim(tmp_path / "mine", first, ONE, runfile.dump(first))
    free = a_run("--optim.lr", "0.1", "--log.every-steps", "3")
    claim.claim(tmp_path / "mine", free, ONE, runfile.dump(free))
    other = a_run("--optim.lr", "0.2")
    with pytest.raises(UserError, match=r"optim\.lr: 0\.1 -> 0\.2.*use another name, or remove"):
        claim.claim(tmp_path / "mine", other, ONE, runfile.dump(other))
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [".lock", "attempts", "config.yaml"]
    assert runfile.load(tmp_path / "mine/config.yaml", []) == free


def test_read_run_is_the_run_that_was_saved(tmp_path: Path) -> None:
    run = a_run("--seed", "3")
    folder = checkpoint.save(tmp_path, make(1), ONE, runfile.dump(run))
    assert checkpoint.read_run(folder) == run


def _world() -> World:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return World(rank, size, rank, torch.device("cpu"))


def _of_rank(step: int, rank: int) -> State:
    return make(step, rng={"torch": torch.full((3,), rank, dtype=torch.uint8)})


def _save_and_load(folder: Path) -> list[Any]:
    world = _world()
    for step in (1, 2):
        checkpoint.save(folder, _of_rank(step, world.rank), world, "")
    if world.is_main:
        (folder / "checkpoints/step_00000002/state/rng_00001.safetensors").write_bytes(b"")
    world.share(None)
    found = checkpoint.newest(folder, world)
    assert found is not None
    state = checkpoint.load(found, world)
    assert_same(state, _of_rank(1, world.rank))
    return [found, state.rng["torch"].tolist(), checkpoint.load(found, World(5, 1, 0, world.device)).rng]


def _fail_on_one(folder: Path) -> str:
    world = _world()
    if world.rank == 1:
        tensors.write = _full
    try:
        checkpoint.save(folder, _of_rank(3, world.rank), world, "")
    except UserError as error:
        return str(error)
    finally:
        tensors.write = _write
    return "saved"


_write = tensors.write


def _full(path: Path, tensors: Any) -> None:
    raise OSError(28, "No space left on device")


def _claim_other(folder: Path) -> str:
    world = _world()
    run = a_run("--optim.lr", "0.2")
    try:
        claim.claim(folder, run, world, runfile.dump(run))
    except UserError as error:
        return str(error)
    return "claimed"


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_save_load_and_fall_back_together(ranks: Any, tmp_path: Path) -> None:
    found = ranks(2).run(_save_and_load, tmp_path)
    good = tmp_path / "checkpoints/step_00000001"
    assert found == [[good, [rank] * 3, {}] for rank in range(2)]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_disk_full_on_one_rank_raises_on_all(ranks: Any, tmp_path: Path) -> None:
    told = ranks(2).run(_fail_on_one, tmp_path)
    assert all("No space left on device" in text for text in told), told
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.ranks
@pytest.mark.slow
def test_d17_a_folder_of_another_run_is_refused_on_all_ranks(ranks: Any, tmp_path: Path) -> None:
    """open_clip returns from rank 0 alone and leaves the others waiting, with a literal {} in the message."""
    first = a_run("--optim.lr", "0.1")
    (tmp_path / "config.yaml").write_text(runfile.dump(first))
    told = ranks(2).run(_claim_other, tmp_path)
    assert all("optim.lr: 0.1 -> 0.2" in text and "mine" in text for text in told), told
