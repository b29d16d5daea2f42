"""Loading image-text shards, beside open_clip's own pipeline on the same shards: `make bench`, `pretrain bench data`.

Per CPU second of the process and its workers, so that neighbours do not count, and by the clock. Ours hands on uint8,
which is normalised on the device; open_clip's workers make floats. What the scaled decoding changes of the pixels, and
of the features of a ViT-B/32 with random weights, is measured against data.exact_pixels on the same crops.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import data_memory, data_shards, report
from benchmarks.data_sides import BATCH, MODEL, SIZE, Side, Task, Took
from benchmarks.report import Record, Report
from pretrain.compat import open_clip
from pretrain.config import Data
from pretrain.data.draws import sample_random
from pretrain.data.images.pixels import Pixels
from pretrain.data.images.transforms import ImageSpec, normalize
from pretrain.data.shards.index import make_index
from pretrain.errors import UserError

SIZES = ("1024x768", "512x384")
HARDEST = "640x480"
"""Pixels of images that are scaled down to hardly more than the result differ most."""
SHOWN = ("samples_per_cpu_second", "open_clip_samples_per_cpu_second", "ratio_per_cpu_second", "ratio_per_second",
         "pixel_error_mean", "pixel_error_max", "feature_cosine_min", "bytes_per_second", "read_bytes_per_second",
         "worker_growth_of_last_half")  # fmt: skip
SPEC = ImageSpec((SIZE, SIZE), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def main(argv: Sequence[str] | None = None) -> list[Record]:
    parser = report.Parser("data", __doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="WIDTHxHEIGHT of the images")
    parser.add_argument("--workers", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--samples", type=int, default=512, help=f"of each size, a multiple of {BATCH} times workers")
    parser.add_argument("--photos", type=int, default=32, help="different images")
    parser.add_argument("--memory", type=int, default=0, metavar="SAMPLES", help="also memory over so many samples")
    parser.set_defaults(rounds=3)
    asked = parser.read(argv)
    check(asked)
    taken = Report.of("data", asked)
    sizes = {name: size_of(name) for name in asked.sizes}
    for name in dict.fromkeys([*sizes, HARDEST]):
        taken.add(quality(name, data_shards.encoded(size_of(name), asked.photos)))
    with tempfile.TemporaryDirectory() as folder:
        shards = {n: data_shards.write(Path(folder) / n, s, asked.samples, asked.photos) for n, s in sizes.items()}
        taken.add(indexing(list(shards.values()), asked.rounds))
        with ExitStack() as processes:
            sides = [processes.enter_context(Side(name)) for name in ("ours", "open_clip")]
            for name, workers in ((name, workers) for name in sizes for workers in asked.workers):
                if taken.budget.allows(f"{name} workers={workers}", seconds=15):
                    taken.add(speed(name, Task(shards[name], asked.samples, workers), sides, asked.rounds))
        if asked.memory:
            taken.add(memory(asked.memory, Path(folder)))
    return taken.finish(SHOWN)


def check(asked: argparse.Namespace) -> None:
    """UserError: numbers that one of the sides would round."""
    for workers in asked.workers:
        if asked.samples < 1 or asked.samples % (BATCH * workers):
            raise UserError(
                f"--samples {asked.samples} must be a multiple of {BATCH * workers} with --workers {workers}"
            )
    if asked.memory % (10 * data_memory.BATCH):
        raise UserError(f"--memory {asked.memory} must be a multiple of {10 * data_memory.BATCH}")


def size_of(name: str) -> tuple[int, int]:
    """'WIDTHxHEIGHT'. UserError: it is not."""
    width, _, height = name.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UserError(f"--sizes {name} must be WIDTHxHEIGHT, such as 512x384")
    return int(width), int(height)


def speed(name: str, task: Task, sides: Sequence[Side], rounds: int) -> list[Record]:
    """Samples a second of both sides, by turns, after a turn that builds indexes and fills the page cache."""
    took: dict[str, list[Took]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides:
            found = side.load(task)
            assert found.samples == task.samples, f"{side.name} loaded {found.samples} of {task.samples} samples"
            took[side.name] += [found] if turn else []
    record = partial(Record, "data", f"{name} workers={task.workers}")
    records = []
    for what, attribute in (("cpu_second", "cpu_s"), ("second", "wall_s")):
        seconds = {side: [getattr(one, attribute) for one in found] for side, found in took.items()}
        records += [
            record(f"samples_per_{what}", task.samples / median(seconds["ours"]), "samples/s"),
            record(f"open_clip_samples_per_{what}", task.samples / median(seconds["open_clip"]), "samples/s"),
            record(f"ratio_per_{what}", median(seconds["open_clip"]) / median(seconds["ours"]), "1"),
        ]
    return records


def quality(name: str, images: Sequence[bytes]) -> list[Record]:
    """Fast pixels against exact ones of the same crops, and what an image tower makes of both.

    Features of random weights are alike for all images: so their distance is also given with the mean over the images
    taken off, beside which the images are as far apart as they get.
    """
    fast, exact = (pixels(images, Data(train=("synthetic:1024",), exact_pixels=knob)) for knob in (False, True))
    apart = (fast.int() - exact.int()).abs().float()
    left, right = features(fast), features(exact)
    cosine, centred = F.cosine_similarity(left, right), F.cosine_similarity(left - right.mean(0), right - right.mean(0))
    record = partial(Record, "data", f"{name} pixels")
    return [
        record("pixel_error_mean", float(apart.mean()), "1"),
        record("pixel_error_max", float(apart.max()), "1"),
        record("feature_cosine_mean", float(cosine.mean()), "1"),
        record("feature_cosine_min", float(cosine.min()), "1"),
        record("centred_feature_cosine_mean", float(centred.mean()), "1"),
        record("centred_feature_cosine_min", float(centred.min()), "1"),
    ]


def pixels(images: Sequence[bytes], data: Data) -> Tensor:
    """[N, 3, SIZE, SIZE] uint8."""
    make, rows = Pixels(SPEC, data), torch.empty(len(images), 3, SIZE, SIZE, dtype=torch.uint8)
    for number, (image, row) in enumerate(zip(images, rows, strict=True)):
        make.train(image, sample_random(0, number), row)
    return rows


@torch.inference_mode()
def features(images: Tensor) -> Tensor:
    """[N, D] fp64 of a MODEL with the weights of seed 0."""
    return towers().encode_image(normalize(images, SPEC)).double()


@cache
def towers() -> Any:
    described = open_clip.get_model_config(MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.CLIP(**{key: value for key, value in described.items() if key != "custom_text"}).eval()


def indexing(patterns: Sequence[str], rounds: int) -> list[Record]:
    """Bytes a second of shards that are indexed, and that are only read, by turns; both from the page cache."""
    paths = [path for pattern in patterns for path in Path(pattern).parent.glob("*.tar")]
    size, building, reading = sum(path.stat().st_size for path in paths), list[float](), list[float]()
    samples = 0
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            since = time.perf_counter()
            samples = make_index([str(path) for path in paths], index_dir=folder).samples
            building.append(time.perf_counter() - since)
        since = time.perf_counter()
        for path in paths:
            with path.open("rb") as file:
                while file.read(1 << 22):
                    pass
        reading.append(time.perf_counter() - since)
    record = partial(Record, "data", f"index of {len(paths)} shards")
    seconds, read = median(building[1:]), median(reading[1:])
    return [
        record("bytes_per_second", size / seconds, "B/s"),
        record("read_bytes_per_second", size / read, "B/s"),
        record("samples_per_second", samples / seconds, "samples/s"),
    ]


def memory(samples: int, folder: Path) -> list[Record]:
    """Resident bytes of a training process and its worker each tenth of the samples; how much the last half grew."""
    found = list(data_memory.resident(samples, samples // 10, folder))
    record = partial(Record, "data", f"memory over {samples} samples of distinct words")
    sides = {"trainer": [line[1] for line in found], "worker": [line[2] for line in found]}
    records = [record(f"{side}_bytes_at_{line[0]}", float(line[at]), "B")
               for at, side in ((1, "trainer"), (2, "worker")) for line in found]  # fmt: skip
    growth = {side: values[-1] - values[len(values) // 2 - 1] for side, values in sides.items()}
    return [*records, *(record(f"{side}_growth_of_last_half", float(value), "B") for side, value in growth.items())]


if __name__ == "__main__":
    report.start(main)
