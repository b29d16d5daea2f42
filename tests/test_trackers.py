"""TensorBoard and Weights & Biases: the same numbers by samples, and no way to stop or hang a run."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain import trackers
from pretrain.config import Data, Log, Run, Train

RECORD = {
    "step": 2,
    "samples": 64,
    "loss": 2.5,
    "terms": {"clip": 2.5},
    "grad_norm": {"total": 1.0},
    "batch_digest": "ab",
}


def a_run(folder: Path) -> Run:
    train = Train(samples=320, global_batch=32)
    return Run(
        name="mine", folder=str(folder), data=Data(train=("synthetic:1024",)), train=train, log=Log(wandb="pairs")
    )


class FakeRun:
    def __init__(self, fake: FakeWandb) -> None:
        self.fake = fake

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.fake.metrics[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        self.fake.step("log")
        self.fake.logged.append(values)

    def finish(self) -> None:
        self.fake.step("finish")
        self.fake.finished += 1


class FakeWandb:
    """Stands in for the module; fails or hangs in one place."""

    Settings = SimpleNamespace

    def __init__(self, fails: str = "", error: type[BaseException] = RuntimeError, hangs: str = "") -> None:
        self.fails, self.error, self.hangs = fails, error, hangs
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.metrics: dict[str, str | None] = {}
        self.finished = 0
        self.free = threading.Event()

    def step(self, place: str) -> None:
        if place == self.fails:
            raise self.error("no")
        if place == self.hangs:
            self.free.wait(60)

    def init(self, **options: Any) -> FakeRun:
        self.inits.append(options)
        self.step("init")
        self.step(f"init {options['mode']}")
        return FakeRun(self)


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def put(monkeypatch: pytest.MonkeyPatch, fake: Any) -> Any:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_the_same_numbers_by_samples_and_one_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = put(monkeypatch, FakeWandb())
    for _ in range(2):
        sink = trackers.Wandb(a_run(tmp_path))
        sink.write(RECORD)
        sink.close()
    values = {"step": 2, "loss": 2.5, "terms/clip": 2.5, "grad_norm/total": 1.0, "samples": 64}
    assert fake.logged == [values, values]
    assert fake.metrics == {"samples": None, "*": "samples"}
    assert fake.finished == 2
    first, second = fake.inits
    assert first["project"] == "pairs"
    assert first["id"] == second["id"] == (tmp_path / "mine/wandb_id").read_text().strip()
    assert first["mode"] == "offline"
    assert first["resume"] == "allow"
    assert first["config"]["train"]["global_batch"] == 32


@pytest.mark.parametrize("place", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_failure_anywhere_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any, place: str, error: type[BaseException]
) -> None:
    put(monkeypatch, FakeWandb(fails=place, error=error))
    with caplog.at_level(logging.WARNING):
        sink = trackers.Wandb(a_run(tmp_path))
        for _ in range(3):
            sink.write(RECORD)
        sink.close()
    assert [r.getMessage() for r in caplog.records] == [
        f"wandb failed and is off for the rest of the run: {error.__name__}: no"
    ]


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_hang_anywhere_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any, place: str
) -> None:
    fake = put(monkeypatch, FakeWandb(hangs=place))
    with caplog.at_level(logging.WARNING):
        sink = trackers.Wandb(a_run(tmp_path), close_s=0.2, backlog=4)
        for _ in range(10):
            sink.write(RECORD)
        sink.close()
    told = [r.getMessage() for r in caplog.records]
    fake.free.set()
    assert sink._thread.daemon
    assert len(told) == len(set(told))
    assert any("did not" in text for text in told), told
    assert place == "finish" or "wandb is too slow, and records are dropped" in told


def test_missing_wandb_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    put(monkeypatch, None)
    with caplog.at_level(logging.WARNING):
        sink = trackers.Wandb(a_run(tmp_path))
        sink.write(RECORD)
        sink.close()
    assert len(caplog.records) == 1
    assert "ModuleNotFoundError" in caplog.text


def test_online_with_a_login_and_offline_when_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    fake = put(monkeypatch, FakeWandb(fails="init online", error=ConnectionError))
    with caplog.at_level(logging.WARNING):
        sink = trackers.Wandb(a_run(tmp_path))
        sink.write(RECORD)
        sink.close()
    assert [options["mode"] for options in fake.inits] == ["online", "offline"]
    assert len(fake.logged) == 1
    assert "runs offline" in caplog.text


def test_a_mode_the_user_set_is_obeyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fake = put(monkeypatch, FakeWandb())
    trackers.Wandb(a_run(tmp_path)).close()
    assert fake.inits[0]["mode"] == "disabled"


def test_logins_are_found_without_asking(tmp_path: Path) -> None:
    assert not trackers.logged_in({"NETRC": str(tmp_path / "none")})
    assert trackers.logged_in({"WANDB_API_KEY": "x"})
    file = tmp_path / "login"
    file.write_text("machine api.wandb.ai login user password x\n")
    assert trackers.logged_in({"NETRC": str(file)})
    assert not trackers.logged_in({"NETRC": str(file), "WANDB_BASE_URL": "https://wandb.example.org"})
    file.write_text("machine\n")
    assert not trackers.logged_in({"NETRC": str(file)})


def test_flat_leaves_out_what_is_no_number() -> None:
    assert trackers.flat({"samples": 3, "a": {"b": 1, "samples": 4}, "c": None, "d": "x", "e": 2.5}) == {
        "a/b": 1,
        "a/samples": 4,
        "e": 2.5,
    }


def test_tensorboard_goes_by_samples_and_hides_what_was_undone(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = trackers.TensorBoard(tmp_path / "tb")
    for samples in (32, 64, 96):
        sink.write(RECORD | {"samples": samples, "loss": float(samples)})
    sink.close()
    sink = trackers.TensorBoard(tmp_path / "tb", samples=64)
    sink.write(RECORD | {"samples": 96, "loss": 1.0})
    sink.close()
    found = events.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(32, 32.0), (64, 64.0), (96, 1.0)]
    assert "terms/clip" in found.Tags()["scalars"]


REAL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_trackers import RECORD, a_run
from pretrain import trackers
sink = trackers.Wandb(a_run(Path(sys.argv[1])))
sink.write(RECORD)
sink.close()
print("closed", sink._told)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_the_real_wandb_offline(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REAL, str(tmp_path), str(Path(__file__).parent)]
    home = os.environ | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=home)
    assert done.returncode == 0, done.stderr
    assert "closed set()" in done.stdout
    found = list((tmp_path / "mine/wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 1
    assert (tmp_path / "mine/wandb_id").read_text().strip() in found[0].name
