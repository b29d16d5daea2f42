"""Memory of a loader's processes over a stream of samples no two of which share a word: it has to stay flat.

A process of its own, told folder, samples and step; prints a line of JSON each `step` samples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import data_shards
from benchmarks.report import ROOT

STORED = 1024
WORDS = 4
BATCH = 100


def resident(samples: int, step: int, folder: Path) -> Iterator[tuple[int, int, int]]:
    """(samples so far, bytes of the training process, bytes of its worker), each `step` samples."""
    command = [sys.executable, "-m", "benchmarks.data_memory", str(samples), str(step), str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            done, trainer, worker = json.loads(line)
            yield done, trainer, worker
    if process.returncode:
        raise RuntimeError(f"the loader died: exit status {process.returncode}")


def write(folder: Path) -> str:
    """A shard of STORED tiny photographs."""
    with tarfile.open(folder / "tiny.tar", "w") as tar:
        for number in range(STORED):
            pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC)
            data_shards.add(tar, f"{number:06d}.jpg", data_shards.jpeg(image))
            data_shards.add(tar, f"{number:06d}.txt", b"a caption")
    return str(folder / "tiny.tar")


def distinct(number: int) -> str:
    """WORDS words that no other number has."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    found = []
    for word in range(number * WORDS, number * WORDS + WORDS):
        text = ""
        while word or len(text) < 6:
            word, letter = divmod(word, 26)
            text += letters[letter]
        found.append(text)
    return " ".join(found)


def main(argv: list[str]) -> None:
    import torch

    from pretrain.config import Data, Run, Train
    from pretrain.data.images.transforms import ImageSpec
    from pretrain.data.loader import train_loader, train_source
    from pretrain.data.texts.tokenizer import build
    from pretrain.world import World

    torch.set_num_threads(1)
    samples, step = int(argv[0]), int(argv[1])
    spec, world = ImageSpec((32, 32), (0.5,) * 3, (0.5,) * 3), World(0, 1, 0, torch.device("cpu"))
    run = Run(data=Data(train=(write(Path(argv[2])),), workers=1), train=Train(samples=samples, global_batch=BATCH))
    source = Distinct(train_source(run.data, world, spec), samples)
    done = 0
    with train_loader(run, world, spec, build("ViT-B-32"), 0, samples, source=source) as loader:
        for batch in loader:
            done += len(batch)
            if done % step == 0:
                print(json.dumps([done, rss("self"), sum(map(rss, children()))]), flush=True)


class Distinct:
    """The stored samples again and again, each time under a caption of its own."""

    def __init__(self, stored: Any, samples: int) -> None:
        self._stored, self._samples = stored, samples
        self.counts, self.entries, self.weights = [samples], [1], list[float]()
        self.fingerprint, self.facts, self.damage = stored.fingerprint, stored.facts, stored.damage

    def __len__(self) -> int:
        return self._samples

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def key(self, number: int) -> str:
        return str(self._stored.key(number % STORED))

    def sample(self, number: int) -> Any:
        return replace(self._stored.sample(number % STORED), texts={"txt": [distinct(number)]})


def children() -> list[str]:
    """Process ids of the workers."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def rss(process: str) -> int:
    """Resident bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


if __name__ == "__main__":
    main(sys.argv[1:])
