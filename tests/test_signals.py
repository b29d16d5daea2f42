"""Signals as schedulers, launchers and people send them: any time, often, to every process; what each may do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pretrain import errors, phases, runfile
from pretrain.errors import Stopped, UserError
from pretrain.signals import StopRequest, interruptible

ROOT = Path(__file__).resolve().parents[1]
SENT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@contextmanager
def sent_when(ready: threading.Event, number: int) -> Iterator[None]:
    """A signal to this process once it is where it waits."""

    def wait() -> None:
        assert ready.wait(60)
        time.sleep(0.05)
        send(number)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def test_asking_often_is_asking_once() -> None:
    with StopRequest() as stop:
        assert not stop.asked()
        for _ in range(50):
            send(signal.SIGUSR2, *SENT)
        assert stop.received == "SIGUSR2", "the first one"
    send(*SENT)  # after the end: nothing is broken off
    for number in SENT:
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def test_handlers_return_where_nobody_asked() -> None:
    before = [signal.getsignal(number) for number in SENT]
    with StopRequest() as stop:
        stop.choose("HUP")
        assert signal.getsignal(signal.SIGHUP) == stop._hear
    assert [signal.getsignal(number) for number in SENT] == before
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_what_the_config_does_not_mean_is_told_and_kills_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        send(signal.SIGUSR1)  # before the config is read, it may be meant
        assert stop.asked()
        stop.choose("SIGUSR2")
        assert not stop.asked()
        send(signal.SIGUSR1, signal.SIGUSR1)
        assert not stop.asked()
        told = capfd.readouterr().err
        assert told == "pretrain: SIGUSR1 came and changes nothing: train.stop_signal is SIGUSR2\n"
    with StopRequest() as stop:
        send(signal.SIGUSR1)
        stop.choose("USR1")
        assert stop.received == "SIGUSR1"
    for number in SENT[2:]:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_start_is_not_ended_by_what_the_config_does_not_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came before the config was read, and the start then takes longer than a start that is to end may take."""
    ended = threading.Event()
    monkeypatch.setattr("pretrain.signals.GRACE_S", 0.2)
    monkeypatch.setattr("os._exit", lambda code: ended.set())
    with StopRequest() as stop:
        send(signal.SIGUSR1)
        stop.choose("USR2")
        assert not ended.wait(1)
        send(signal.SIGUSR2)
        assert ended.wait(60), "what it means, ends it"
    for number in SENT:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


@pytest.mark.parametrize("name", ["KILL", "STOP", "SEGV", "USR3", "usr1", ""])
def test_a_signal_that_cannot_stop_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"train\.stop_signal {name} must be one of USR1, USR2"):
        runfile.load(None, ["--data.train", "synthetic:8", "--train.samples", "8", "--train.stop-signal", name])


def leave(cleaned: list[bool]) -> None:
    with interruptible():
        try:
            send(signal.SIGTERM)
            time.sleep(10)
        finally:
            send(signal.SIGTERM, signal.SIGUSR2)  # a storm does not break off the cleaning
            cleaned.append(True)


def test_interruptible_code_is_left_once_and_cleans_up() -> None:
    cleaned: list[bool] = []
    with interruptible():
        pass  # nobody is armed: nothing changes
    with StopRequest():
        with interruptible(when=False):
            pass
        with pytest.raises(Stopped, match="SIGTERM came"):
            leave(cleaned)
        with pytest.raises(Stopped), interruptible():
            pytest.fail("what begins after the signal does not begin")
    assert cleaned == [True]
    for number in SENT:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


STUCK = """
import hashlib, os, signal, sys
from pretrain import signals
signals.GRACE_S = 0.3
with signals.StopRequest() as stop:
    stop.nothing_to_lose = sys.argv[1] == "True"
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))  # no Python runs in the main thread
    print(stop.received, flush=True)
"""


def stuck(*arguments: object, shell: str = "", number: int = signal.SIGUSR1) -> tuple[int, str]:
    """Exit code and output of a process that is signalled where no handler of Python can run."""
    words = [sys.executable, "-c", STUCK, *map(str, arguments)]
    command = ["bash", "-c", f'{shell} exec "$@"', "bash", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        job.send_signal(number)
        said = job.communicate(timeout=60)[0]
    return job.returncode, said


def test_a_start_that_does_not_end_is_ended() -> None:
    code, said = stuck(True, 10**9)
    assert code == errors.REQUEUE
    assert said.startswith("pretrain: SIGUSR1 came, and the start did not end within 0.3 s: ended; there was nothing")
    assert said.count("\n") == 1


def test_steps_that_are_not_saved_are_waited_for_also_under_a_launcher_that_ignores_the_signal() -> None:
    assert stuck(False, 3 * 10**6, shell='trap "" USR1;') == (0, "SIGUSR1\n")


def test_helpers_outlive_signals_from_their_first_moment(tmp_path: Path) -> None:
    """What indexes and packs gets each signal before it could do anything about it."""
    from pretrain.data.processes import spread
    from pretrain.data.shards.index_helpers import Helpers

    shard = tmp_path / "a.tar"
    (tmp_path / "x.txt").write_text("a")
    with tarfile.open(shard, "w") as tar:
        tar.add(tmp_path / "x.txt", "x.txt")
    with Helpers(1, None) as helpers:
        for number in SENT:
            os.kill(helpers._all[0].pid, number)
        helpers.index(str(shard))
    assert list(spread(signalled, range(3), 2, lambda *_: None)) == [None] * 3


def signalled(task: int, tick: Any) -> None:
    send(*SENT)


DEBUG = ("--train.samples", 320, "--log.progress", False, "--data.workers", 0, "--checkpoint.every-steps", "None")


def tiny(folder: Path, *flags: object) -> Any:
    words = ["--folder", folder, *DEBUG, *flags]
    return runfile.load(ROOT / "configs" / "debug.yaml", [str(word) for word in words])


def last_words(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "debug" / "ranks" / "rank_00000.json").read_text())
    return found


@pytest.fixture
def quiet() -> Iterator[None]:
    """Handlers as they were, whatever came."""
    yield
    for number in SENT:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def test_a_stuck_wait_for_data_is_left_and_the_steps_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    from pretrain import train

    waits, real = threading.Event(), train.train_loader

    def loader(*arguments: Any) -> Any:
        found = real(*arguments)
        batches = found._batches

        def slow() -> Iterator[Any]:
            for n, batch in enumerate(batches):
                if n == 3:
                    waits.set()
                    time.sleep(60)
                yield batch

        found._batches = slow()
        return found

    monkeypatch.setattr(train, "train_loader", loader)
    began = time.monotonic()
    with StopRequest() as stop, sent_when(waits, signal.SIGUSR2):
        stop.choose("USR2")
        with pytest.raises(Stopped, match="SIGUSR2 came: saved after step 3"):
            train.train(tiny(tmp_path), stop)
    assert time.monotonic() - began < 50
    assert (tmp_path / "debug" / "checkpoints" / "step_00000003" / "COMMIT").exists()
    assert (last_words(tmp_path)["code"], last_words(tmp_path)["step"]) == (errors.REQUEUE, 3)


def test_a_start_is_left_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None) -> None:
    from pretrain import train

    waits = threading.Event()

    def build(*arguments: Any) -> Any:
        waits.set()
        time.sleep(60)

    monkeypatch.setattr(train, "build", build)
    found = pytest.raises(Stopped, match="SIGTERM came: there was nothing to save, start again")
    with StopRequest() as stop, sent_when(waits, signal.SIGTERM), found:
        train.train(tiny(tmp_path), stop)
    assert last_words(tmp_path)["code"] == errors.REQUEUE
    with StopRequest() as stop:  # one that came during the imports
        send(signal.SIGTERM)
        with pytest.raises(Stopped, match="nothing to save"):
            train.train(tiny(tmp_path), stop)


def test_an_evaluation_is_left_between_two_batches(monkeypatch: pytest.MonkeyPatch, quiet: None) -> None:
    import torch

    from pretrain import config, evaluate
    from pretrain.model import build
    from pretrain.objectives.clip import Clip
    from pretrain.world import World

    world = World(0, 1, 0, torch.device("cpu"))
    model = build(config.Model(name="debug-tiny"), [Clip(Clip.Options())], 0, world.device)
    held_out, waits = config.Data(train=("synthetic:64",), workers=0), threading.Event()
    monkeypatch.setattr(model, "encode_image", lambda images: (waits.set(), time.sleep(60)))
    with StopRequest(), sent_when(waits, signal.SIGINT), pytest.raises(Stopped, match="SIGINT came"):
        evaluate.measure(model, "retrieval", held_out, world, batch_size=8)


class Counter:
    """Small collectives entered."""

    def __init__(self) -> None:
        self.calls = 0

    def enter(self, name: str, detail: str) -> None:
        self.calls += name == "agreeing"

    def leave(self, name: str) -> None: ...


def agreements(folder: str, steps: int) -> int:
    """Small CPU collectives of a run of so many steps, none of them logged but the last."""
    import torch
    import torch.distributed as dist

    from pretrain import train
    from pretrain.profiling.recorder import Recorder
    from pretrain.world import World

    world = World(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))
    run = tiny(Path(folder), "--train.samples", 32 * steps, "--log.every-steps", 1000, "--exchange", "gather")
    (Path(folder) / "debug").mkdir(parents=True, exist_ok=True)
    counter = Counter()
    with phases.listening(counter):
        training = train.Training(run, world, {})
        training.fit(StopRequest(), Recorder(None, Path(folder), world, steps))
    return counter.calls


@pytest.mark.ranks
def test_a_step_has_one_vote(ranks: Any, tmp_path: Path) -> None:
    few = ranks(2).run(agreements, str(tmp_path / "few"), 3)
    many = ranks(2).run(agreements, str(tmp_path / "many"), 8)
    assert [more - less for more, less in zip(many, few, strict=True)] == [5, 5]
