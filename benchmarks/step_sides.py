"""Both sides of the step benchmark, as calls that take one whole training step, and what such a step multiplies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain import config, engines, exchange, objectives, step
from pretrain.compat import open_clip
from pretrain.data.images.transforms import normalize
from pretrain.model import DualEncoder, build
from pretrain.optim import undecayed
from pretrain.precision import Precision
from pretrain.values import Batch
from pretrain.world import World

OPTIM = config.Optim(lr=1e-4, clip_norm=1.0)
END, SHORTEST, LONGEST = 49407, 6, 32
"""Of synthetic captions: the token of their end, and their lengths, which are as likely as each other."""
Step = Callable[[], Any]


def ours(name: str, speed: tuple[str, ...], size: int, device: torch.device, precision: Precision) -> Step:
    """A dual encoder in engine single."""
    clip = objectives.find("clip")
    objective = clip(clip.Options())
    model = build(config.Model(name=name, precision=precision, speed=speed), [objective], 0, device).train()
    engine, columns = engines.find("single", 1)(model, OPTIM, World(0, 1, 0, device)), exchange.make("local", 0, 1)
    batch = random_batch(model, size, device)

    def call() -> None:
        step.plain_step(engine, [objective], columns, batch)
        engine.step(OPTIM.lr, OPTIM.clip_norm)

    return call


def theirs(model: DualEncoder, batch: Batch, precision: Precision, compiled: bool) -> Step:
    """The same architecture, built by open_clip, in the loop of its trainer; its pixels come normalised."""
    described = {key: value for key, value in model.architecture.towers.items() if key != "custom_text"}
    towers = open_clip.CLIP(**described).to(batch.images.device).train()
    optimizer, loss = optimizer_of(towers), open_clip.ClipLoss()
    forward = torch.compile(towers) if compiled else towers
    pixels, texts = normalize(batch.images, model.image_spec), batch.texts
    autocast = partial(torch.autocast, pixels.device.type, torch.bfloat16) if precision == "bf16" else nullcontext

    def call() -> None:
        optimizer.zero_grad()
        with autocast():
            image, text, scale = forward(pixels, texts)[:3]
            total = loss(image, text, scale)
        total.backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), OPTIM.clip_norm, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            towers.logit_scale.clamp_(0, 4.6052)

    return call


def optimizer_of(towers: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with open_clip's groups and its default form."""
    spared = undecayed(towers)
    groups = [
        {"params": [p for n, p in towers.named_parameters() if n in spared], "weight_decay": 0.0},
        {"params": [p for n, p in towers.named_parameters() if n not in spared], "weight_decay": OPTIM.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)


def random_batch(model: DualEncoder, size: int, device: torch.device) -> Batch:
    """Noise, and captions that end as real ones do: behind the end is padding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, *model.image_spec.size), generator=generator, dtype=torch.uint8)
    length = int(model.towers.context_length)
    texts = torch.randint(1, 400, (size, length), generator=generator)
    ends = torch.randint(min(SHORTEST, length - 1), min(LONGEST, length), (size, 1), generator=generator)
    columns = torch.arange(length)
    texts = texts.masked_fill(columns == ends, END).masked_fill(columns > ends, 0)
    return Batch(images, texts, torch.arange(size), tuple(map(str, range(size)))).to(device)


def flops(model: DualEncoder, batch: Batch) -> int:
    """What forward and backward of the towers multiply and add in one step, masks and padding not spared.

    Counted on the meta device, with open_clip's attention, once for both sides: the same work, whoever does it.
    """
    meta = torch.device("meta")
    images: Tensor = torch.empty(batch.images.shape, device=meta)
    texts = torch.zeros(batch.texts.shape, dtype=torch.int64, device=meta)
    with FlopCounterMode(display=False) as counter:
        features = model.towers.encode_image(images), model.towers.encode_text(texts)
        sum(part.sum() for part in features).backward()
    return int(counter.get_total_flops())
