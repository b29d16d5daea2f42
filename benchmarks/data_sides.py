"""Both loaders, each in a process of its own that is told what to load and says what it took: `Side`.

open_clip's side is its trainer's own `get_wds_dataset` with its own transform, tokenizer and shuffle buffers, on the
webdataset 0.2.86 that it pins, which lies in a folder of its own in front of everything else in that process.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT
from pretrain.errors import UserError

PINNED = "0.2.86"
BATCH, SIZE = 64, 224
MODEL = "ViT-B-32"


@dataclass(frozen=True)
class Task:
    """Samples to load."""

    shards: str
    """A brace pattern."""
    samples: int
    """In all, a multiple of BATCH."""
    workers: int


@dataclass(frozen=True)
class Took:
    cpu_s: float
    """User and system time of the process and of its workers, which have ended."""
    wall_s: float
    samples: int


class Side:
    """A process that loads. A context manager: leaving it ends the process."""

    def __init__(self, name: str) -> None:
        path = [str(pinned_webdataset())] if name == "open_clip" else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.data_sides", name]
        self.name = name
        self._process = subprocess.Popen(
            command, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def load(self, task: Task) -> Took:
        """RuntimeError: the process died; it has said why."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):  # then it does not answer either
            print(json.dumps(asdict(task)), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the loader of {self.name} died: exit status {self._process.wait()}")
        return Took(**json.loads(answer))

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it died, which `load` has said
            self._process.stdin.close()
        self._process.wait(60)


def pinned_webdataset() -> Path:
    """Folder of the webdataset that open_clip's trainer needs, installed into build/ at first use.

    Raises:
        UserError: it cannot be installed.
    """
    folder = ROOT / "build" / f"webdataset-{PINNED}"
    if not (folder / "webdataset").is_dir():
        command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"webdataset=={PINNED}"]
        try:
            subprocess.run([sys.executable, *command], check=True, timeout=120)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise UserError(f"bench data: open_clip's loader needs webdataset {PINNED}: {error}") from None
    return folder


def ours() -> Callable[[Task], int]:
    """A function that loads all of a task -> the samples that came."""
    import torch

    from pretrain.config import Data, Run, Train
    from pretrain.data.images.transforms import ImageSpec
    from pretrain.data.loader import train_loader
    from pretrain.data.texts.tokenizer import build
    from pretrain.world import World

    spec = ImageSpec((SIZE, SIZE), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    tokenize, world = build(MODEL), World(0, 1, 0, torch.device("cpu"))

    def load(task: Task) -> int:
        data = Data(train=(task.shards,), workers=task.workers)
        run = Run(data=data, train=Train(samples=task.samples, global_batch=BATCH))
        with train_loader(run, world, spec, tokenize, 0, task.samples) as loader:
            return sum(len(batch) for batch in loader)

    return load


def open_clips() -> Callable[[Task], int]:
    """The same with open_clip's trainer."""
    import webdataset

    from pretrain.compat import open_clip

    _without_pandas()
    from open_clip_train.data import get_wds_dataset

    if webdataset.__version__ != PINNED:
        raise UserError(f"bench data: webdataset is {webdataset.__version__}, not {PINNED}")
    transform, tokenizer = open_clip.image_transform(SIZE, is_train=True), open_clip.get_tokenizer(MODEL)

    def load(task: Task) -> int:
        args = argparse.Namespace(
            train_data=task.shards, train_num_samples=task.samples, train_data_upsampling_factors=None,
            dataset_resampled=False, batch_size=BATCH, workers=task.workers, world_size=1, seed=0,
        )  # fmt: skip
        loader = get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer).dataloader
        return sum(len(images) for images, _ in loader)

    return load


def _without_pandas() -> None:
    """open_clip's trainer imports it for its CSV data set alone."""
    if importlib.util.find_spec("pandas") is None:
        sys.modules["pandas"] = types.ModuleType("pandas")
        sys.modules["pandas"].__spec__ = ModuleSpec("pandas", None)


def serve(name: str) -> None:
    """Tasks from stdin, a line each, until it ends; answers to stdout, which nothing else may write to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    load = {"ours": ours, "open_clip": open_clips}[name]()
    for line in sys.stdin:
        print(json.dumps(asdict(timed(load, Task(**json.loads(line))))), file=answers, flush=True)


def timed(load: Callable[[Task], int], task: Task) -> Took:
    def cpu() -> float:
        return sum(os.times()[:4])

    before, since = cpu(), time.perf_counter()
    samples = load(task)
    wall = time.perf_counter() - since
    gc.collect()  # ends persistent workers
    return Took(cpu() - before, wall, samples)


def main(argv: list[str]) -> Any:
    return serve(argv[0])


if __name__ == "__main__":
    main(sys.argv[1:])
