"""A whole training step (towers, loss, backward, clipping, AdamW) against open_clip's on the same batch: `make bench`.

open_clip's side is what its trainer does in eager mode: `create_model`, `ClipLoss`, autocast, `clip_grad_norm_`, AdamW.
A small tower on the CPU in fp32, ViT-B/32 on a GPU in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, report
from benchmarks.report import Record, Report
from pretrain import config, engines, exchange, objectives, step
from pretrain.compat import open_clip
from pretrain.data.images.transforms import normalize
from pretrain.model import DualEncoder, build
from pretrain.optim import undecayed
from pretrain.values import Batch
from pretrain.world import World

GPU_BATCHES = {"ViT-B-32": 1024, "ViT-B-16": 256}
OPTIM = config.Optim(lr=1e-4, clip_norm=1.0)


def main(argv: Sequence[str] | None = None) -> list[Record]:
    cuda = torch.cuda.is_available()
    parser = report.Parser("step", __doc__)
    parser.add_argument("--models", nargs="+", default=tuple(GPU_BATCHES) if cuda else ("digits-vit",))
    parser.add_argument("--batch", type=int, help="default: what suits the model and the device")
    asked = parser.read(argv)
    taken = Report.of("step", asked)
    for model in asked.models:
        if taken.budget.allows(model, seconds=15 if cuda else 0):
            taken.add(compare(model, asked.batch or (GPU_BATCHES.get(model, 256) if cuda else 128), asked.rounds))
    return taken.finish()


def compare(name: str, size: int, rounds: int) -> list[Record]:
    """Pairs per second of both sides, and on a GPU their peak extra memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if device.type == "cuda" else "fp32"
    clip = objectives.find("clip")
    objective = clip(clip.Options())
    model = build(config.Model(name=name, precision=precision), [objective], 0, device).train()
    batch = random_batch(model, size, device)
    pixels = normalize(batch.images, model.image_spec)
    sides: dict[str, Callable[[], Any]] = {
        "open_clip_eager_": their_step(model, pixels, batch.texts, precision),
        "": our_step(model, objective, batch),
    }
    times = measure.interleaved(sides, rounds, device)
    record = partial(Record, "step", f"{name} B={size} {precision}")
    records = [record(f"{side}samples_per_s", size / time.median, "samples/s") for side, time in times.items()]
    records.append(record("speed_ratio_to_open_clip_eager", times["open_clip_eager_"].median / times[""].median, "1"))
    if device.type == "cuda":  # on a CPU the small blocks that an allocator keeps drown the difference
        memory = {side: measure.extra_memory_bytes(call, device) for side, call in sides.items()}
        records += [record(f"{side}extra_memory_bytes", value, "B") for side, value in memory.items()]
    return records


def random_batch(model: DualEncoder, size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, *model.image_spec.size), generator=generator, dtype=torch.uint8)
    texts = torch.randint(1, 400, (size, model.towers.context_length), generator=generator)
    return Batch(images, texts, torch.arange(size), tuple(map(str, range(size)))).to(device)


def our_step(model: DualEncoder, objective: objectives.Objective, batch: Batch) -> Callable[[], None]:
    world = World(0, 1, 0, batch.images.device)
    engine = engines.find("single", 1)(model, OPTIM, world)
    columns = exchange.make("local", 0, 1)

    def call() -> None:
        step.plain_step(engine, [objective], columns, batch)
        engine.step(OPTIM.lr, OPTIM.clip_norm)

    return call


def their_step(model: DualEncoder, pixels: Tensor, texts: Tensor, precision: str) -> Callable[[], None]:
    """The same architecture, built by open_clip, in the loop of its trainer."""
    described = {key: value for key, value in model.architecture.towers.items() if key != "custom_text"}
    towers = open_clip.CLIP(**described).to(pixels.device).train()
    spared = undecayed(towers)
    groups = [
        {"params": [p for n, p in towers.named_parameters() if n in spared], "weight_decay": 0.0},
        {"params": [p for n, p in towers.named_parameters() if n not in spared], "weight_decay": OPTIM.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    loss = open_clip.ClipLoss()
    autocast = partial(torch.autocast, pixels.device.type, torch.bfloat16) if precision == "bf16" else nullcontext

    def call() -> None:
        optimizer.zero_grad()
        with autocast():
            image, text, scale = towers(pixels, texts)
            total = loss(image, text, scale)
        total.backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), OPTIM.clip_norm, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            towers.logit_scale.clamp_(0, 4.6052)

    return call


if __name__ == "__main__":
    report.start(main)
