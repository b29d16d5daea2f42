"""A whole training step (towers, loss, backward, clipping, AdamW) against open_clip's on the same batch: `make bench`.

open_clip's side is what its trainer does: `create_model`, `ClipLoss`, autocast, `clip_grad_norm_`, AdamW; eager, and
with its towers compiled. Ours once for each set of entries of model.speed. Small towers on the CPU in fp32, ViT-B/32
and ViT-B/16 on a GPU in bf16. MFU is what the towers multiply, by what the device could: its data sheet's dense bf16
rate, or on a CPU the fastest matrix product just now.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import measure, report
from benchmarks.measure import Timing
from benchmarks.report import Record, Report
from benchmarks.step_sides import Step, flops, ours, random_batch, theirs
from pretrain import config, objectives
from pretrain.errors import UserError
from pretrain.model import DualEncoder, build
from pretrain.plan.hardware import peak_flops
from pretrain.precision import Precision
from pretrain.speed.options import ENTRIES

GPU_BATCHES = {"ViT-B-32": 1024, "ViT-B-16": 256}
CPU_MODELS = ("digits-vit", "debug-tiny")
CPU_SPEEDS = ("causal", "short_texts")
GPU_SPEEDS = ("causal", "causal+compile", "short_texts+compile", "causal+cuda_graphs", "causal+compile=max-autotune")
SHOWN = ("samples_per_s", "ratio_to_open_clip_eager", "ratio_to_open_clip_compiled", "mfu", "extra_memory_bytes")


def main(argv: Sequence[str] | None = None) -> list[Record]:
    cuda = torch.cuda.is_available()
    parser = report.Parser("step", __doc__)
    parser.add_argument("--models", nargs="+", default=tuple(GPU_BATCHES) if cuda else CPU_MODELS)
    parser.add_argument("--batch", type=int, help="default: what suits the model and the device")
    parser.add_argument(
        "--speeds", nargs="+", default=GPU_SPEEDS if cuda else CPU_SPEEDS, help="ENTRY+ENTRY of model.speed"
    )
    parser.add_argument(
        "--compiled-peer", action=argparse.BooleanOptionalAction, default=cuda, help="also open_clip's compiled form"
    )
    asked = parser.read(argv)
    speeds = {name: read(name) for name in asked.speeds}
    taken = Report.of("step", asked)
    for model in asked.models:
        if taken.budget.allows(model, seconds=30 if cuda else 0):
            size = asked.batch or (GPU_BATCHES.get(model, 256) if cuda else 128)
            taken.add(compare(model, size, speeds, asked.rounds, compiled_peer=asked.compiled_peer))
    return taken.finish(SHOWN)


def read(name: str) -> tuple[str, ...]:
    """'ENTRY+ENTRY' as model.speed; 'plain' is none. UserError: there is no such entry."""
    entries = () if name == "plain" else tuple(name.split("+"))
    if unknown := [entry for entry in entries if entry not in ENTRIES]:
        raise UserError(f"--speeds {name}: {unknown[0]} is none of {', '.join(ENTRIES)}")
    return entries


def compare(name: str, size: int, speeds: dict[str, tuple[str, ...]], rounds: int, compiled_peer: bool) -> list[Record]:
    """Pairs per second of all sides in turns, how they relate, and on a GPU their peak extra memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    plain = described(name, device)
    batch = random_batch(plain, size, device)
    sides: dict[str, Step] = {"open_clip eager": theirs(plain, batch, precision, compiled=False)}
    sides |= {"open_clip compiled": theirs(plain, batch, precision, compiled=True)} if compiled_peer else {}
    sides |= {speed: ours(name, entries, size, device, precision) for speed, entries in speeds.items()}
    measure.warm_up(list(sides.values()), device)  # what is compiled is compiled anew once moments exist
    times, work = measure.interleaved(sides, rounds, device), flops(described(name, torch.device("meta")), batch)
    peak = peak_of(device, precision)
    records = []
    for side, time in times.items():
        record = partial(Record, "step", f"{name} B={size} {precision}, {side}")
        records += rates(record, size, time, work, peak)
        for peer in ("eager", "compiled"):
            if (other := times.get(f"open_clip {peer}")) and not side.startswith("open_clip"):
                records.append(record(f"ratio_to_open_clip_{peer}", other.median / time.median, "1"))
        if device.type == "cuda":  # on a CPU the small blocks that an allocator keeps drown the difference
            records.append(record("extra_memory_bytes", measure.extra_memory_bytes(sides[side], device), "B"))
    return records


def rates(record: partial[Record], size: int, time: Timing, work: int, peak: float | None) -> list[Record]:
    """What a side does in a second."""
    found = [
        record("samples_per_s", size / time.median, "samples/s"),
        record("samples_per_s_slowest_tenth", size / time.p90, "samples/s"),
        record("flops_per_s", work / time.median, "FLOP/s"),
    ]
    return found if peak is None else [*found, record("mfu", work / time.median / peak, "1")]


def described(name: str, device: torch.device) -> DualEncoder:
    """The plain model, on a device."""
    clip = objectives.find("clip")
    return build(config.Model(name=name, speed=()), [clip(clip.Options())], 0, device).train()


def peak_of(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s that count as all of the device; None for a GPU that the table does not know."""
    if device.type == "cuda":
        return peak_flops(torch.cuda.get_device_name())
    return measure.peak(device, torch.bfloat16 if precision == "bf16" else torch.float32, 512)


if __name__ == "__main__":
    report.start(main)
