"""Checks of the towers that a config names: that they can be built, and how fast they can get.

All of it happens on the meta device, where a model has shapes and no memory: a ViT-bigG takes as long as a ViT-B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from pretrain import model, objectives
from pretrain.config import Run
from pretrain.doctor.base import Finding, Patient
from pretrain.model import DualEncoder
from pretrain.speed import compiled
from pretrain.speed.apply import UNFIT

META = torch.device("meta")
ROWS = 2


def build(patient: Patient) -> Iterator[Finding]:
    """Both towers, with everything that the config asks of them except `speed`."""
    run, counts = patient.run, {"image": 0, "text": 0, "head": 0}
    for name, param in plain(run).towers.named_parameters():
        counts[DualEncoder.tower_of(name)] += param.numel()
    for tower in ("image", "text"):
        yield Finding(f"{tower} tower", f"{run.model.name}: {counts[tower] / 1e6:.1f} M parameters", "ok")


def speed(patient: Patient) -> Iterator[Finding]:
    """Each entry of model.speed: whether it is on, or could be, or why not."""
    run = patient.run
    encoder = plain(run)
    for entry, unfit in UNFIT.items():
        why, on = unfit(encoder.towers), entry in run.model.speed
        refused = on and entry != "causal"  # which is the default, and then does nothing
        said = f"does not apply: {why}" if why else "on" if on else "off, and would apply"
        mend = f"leave {entry} out of model.speed"
        yield Finding(f"speed {entry}", said, "fail" if why and refused else "ok", mend=mend)
    for tower, modules in compiled.targets(encoder.towers, whole="cuda_graphs" in run.model.speed).items():
        kinds = ", ".join(sorted({type(module).__name__ for module in modules}))
        on = any(entry.partition("=")[0] in ("compile", "cuda_graphs") for entry in run.model.speed)
        said = f"{'on' if on else 'off, and would compile'}: {len(modules)} x {kinds}, cache {compiled.cache_folder()}"
        yield Finding(f"speed compile, {tower} tower", said, "ok")
    if "cuda_graphs" in run.model.speed and not torch.cuda.is_available():
        mend = "take compile instead, or start on a node with a GPU"
        yield Finding("speed cuda_graphs", "none is visible", "fail", "a CUDA device", mend)


def graph_breaks(patient: Patient) -> Iterator[Finding]:
    """Where torch.compile would fall back to Python in a tower as a whole; only what lies inside a block costs time."""
    if patient.world.size > 1:  # it takes minutes for large towers, and ends no run
        yield Finding("graph breaks", "skipped: several ranks wait; look alone", "skip")
        return
    encoder = plain(patient.run)
    inputs = {
        "image": (encoder.towers.encode_image, torch.empty(ROWS, 3, *encoder.image_spec.size, device=META)),
        "text": (encoder.towers.encode_text, torch.zeros(ROWS, _length(encoder), dtype=torch.int64, device=META)),
    }
    for tower, (encode, rows) in inputs.items():
        try:
            found = breaks(encode, rows)
        except Exception as error:  # whatever a foreign tower or the tracer raises is the finding
            reason = " ".join(str(error).split())[:200]
            yield Finding(f"graph breaks, {tower} tower", f"not traced ({type(error).__name__}: {reason})", "warn")
            continue
        mend = "move what breaks out of the blocks: it is at the place named"
        for said in found:
            yield Finding(f"graph breaks, {tower} tower", said, "warn", "none", mend)
        if not found:
            yield Finding(f"graph breaks, {tower} tower", "none", "ok")


def breaks(function: Callable[[Tensor], Any], rows: Tensor) -> list[str]:
    """'FILE:LINE: reason' of each break in a function of one tensor."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(function)(rows)
    said = []
    for cause in found.break_reasons:
        where = f"{cause.user_stack[-1].filename}:{cause.user_stack[-1].lineno}" if cause.user_stack else "somewhere"
        said.append(f"{where}: {cause.reason.splitlines()[0]}")
    return said


def plain(run: Run) -> DualEncoder:
    """The dual encoder of a config on the meta device, without `model.speed`. UserError: it cannot be built."""
    chosen = [objectives.find(choice.name)(choice.options) for choice in run.objective]
    return model.build(replace(run.model, speed=()), chosen, run.seed, META)


def _length(encoder: DualEncoder) -> int:
    return int(getattr(encoder.towers, "context_length", None) or encoder.towers.text.context_length)
