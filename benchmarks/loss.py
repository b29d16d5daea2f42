"""Time, memory and error of the losses, beside open_clip's, a fair baseline, Inf-CL's algorithm and a matrix product.

All of them get the same features, in turns: fp32 on the CPU, bf16 and fp16 on a GPU. Shares are of the rate of the
fastest library matrix product, measured before and after each case; useful work is 8 B B d operations for CLIP, 6 for
SigLIP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import measure, memory, rectangles, report
from benchmarks.measure import Timing
from benchmarks.peers import (
    LOGITS_BYTES,
    Case,
    LossFunction,
    Side,
    compiled,
    errors,
    forward,
    forward_backward,
    sides,
)
from benchmarks.report import Record, Report
from pretrain.plan.loss import Loss, extra_memory_bytes, flops, forward_flops

CPU_SIZES = (2048, 4096, 8192, 16384)
EXACT_UP_TO = 2048
"""Sizes at which fp64 is affordable."""
LARGEST_INF_CL = 32768
COMPILE_S = 12.0
SHOWN = (
    "forward_backward_seconds",
    "forward_backward_share_of_matmul_peak",
    "ratio_to_open_clip_eager",
    "ratio_to_open_clip_compiled",
    "ratio_to_materialised",
    "ratio_to_inf_cl",
    "extra_memory_bytes",
    "extra_memory_ratio_to_open_clip_eager",
    "d_image_error",
    "open_clip_eager_d_image_error",
)


def main(argv: Sequence[str] | None = None) -> list[Record]:
    cuda = torch.cuda.is_available()
    parser = report.Parser("loss", __doc__)
    parser.add_argument("--losses", nargs="+", choices=("clip", "siglip"), default=("clip", "siglip"))
    parser.add_argument("--sizes", type=int, nargs="+", help="pairs; default: what suits the device")
    parser.add_argument("--widths", type=int, nargs="+", default=(512,), help="of features, with --sizes")
    parser.add_argument("--sides", nargs="+", choices=tuple(LOGITS_BYTES), default=tuple(LOGITS_BYTES))
    asked = parser.read(argv)
    running = Running(Report.of("loss", asked), torch.device("cuda" if cuda else "cpu"))
    dtype = torch.bfloat16 if cuda else torch.float32
    if cuda and not asked.sizes:
        everything_on_a_gpu(running, asked.losses)
    else:
        shapes = [(size, width, dtype) for size in asked.sizes or CPU_SIZES for width in asked.widths]
        running.take_all(shapes, asked.losses)
        running.take_memory()
    return running.report.finish(SHOWN)


def everything_on_a_gpu(running: Running, losses: Sequence[Loss]) -> None:
    """The most telling first: a budget may not last for all."""
    bf16, fp16 = torch.bfloat16, torch.float16
    sizes, more = (32768, 8192, EXACT_UP_TO, 131072, 16384, 65536, 4096), (32768, EXACT_UP_TO, 8192, 131072)
    running.take_all([(size, 512, bf16) for size in sizes], losses)
    running.take_once(Case("clip", 1 << 20, 512, bf16))
    running.report.add(rectangles.records(running.device, running.report.budget, running.report.asked.rounds))
    running.take_all([(size, 512, fp16) for size in more], losses)
    for dtype in (bf16, fp16):
        running.take_all([(size, width, dtype) for width in (768, 1024) for size in more], losses)


class Running:
    """Measures cases as long as time and memory last."""

    def __init__(self, report: Report, device: torch.device) -> None:
        self.report, self.device = report, device
        self._rates: dict[tuple[Side, Loss], float] = {}
        self._timed: list[tuple[Case, list[Side]]] = []

    def take_all(self, shapes: Sequence[tuple[int, int, torch.dtype]], losses: Sequence[Loss]) -> None:
        for size, width, dtype in shapes:
            for loss in losses:
                self.take(Case(loss, size, width, dtype))

    def take(self, case: Case) -> None:
        """All records of a case."""
        rounds, inputs = self.report.asked.rounds, case.inputs(self.device)
        found = self._affordable(case, inputs)
        if "ours" not in found:
            return
        before = measure.peak(self.device, case.dtype, case.width, rounds)
        both = {side: partial(forward_backward, loss, inputs) for side, loss in found.items()}
        alone = {side: partial(forward, loss, inputs) for side, loss in found.items()}
        timings = {
            "forward_backward": measure.interleaved(both, rounds, self.device),
            "forward": measure.interleaved(alone, rounds, self.device),
        }
        self._learn(case, timings["forward_backward"])
        clocks = measure.loaded_clocks(self.device)
        after = measure.peak(self.device, case.dtype, case.width, rounds)
        record = partial(Record, "loss", str(case))
        self.report.add(
            [
                record("matmul_peak_before", before, "FLOP/s"),
                record("matmul_peak_after", after, "FLOP/s"),
                *(record(f"gpu_{name}", value, name) for name, value in clocks.items()),
                *speeds(case, timings, (before + after) / 2),
                *self._errors(case, found),
            ]
        )
        if self.device.type == "cuda":
            sizes = {side: measure.extra_memory_bytes(call, self.device) for side, call in both.items()}
            self.report.add(memories(case, sizes, self.device))
        self._timed.append((case, list(found)))

    def take_memory(self) -> None:
        """Of every case that was timed on a CPU, in another process."""
        if self.device.type == "cuda" or not self._timed:
            return
        found = memory.apart(self._timed, self.report.asked.threads)
        for (case, _), sizes in zip(self._timed, found, strict=True):
            self.report.add(memories(case, sizes, self.device))

    def take_once(self, case: Case) -> None:
        """Ours alone, a single call: for what takes seconds."""
        rate = self._rates.get(("ours", case.loss))
        expected = flops(case.loss, case.size, case.size, case.width) / rate if rate else 0.0
        if not self.report.budget.allows(str(case), 1.3 * expected + 5):
            return
        loss, inputs = sides(case, self.device)["ours"], case.inputs(self.device)
        peak = measure.peak(self.device, case.dtype, case.width)
        seconds: list[float] = []

        def call() -> None:
            start = time.perf_counter()
            forward_backward(loss, inputs)
            measure.synchronize(self.device)
            seconds.append(time.perf_counter() - start)

        size = measure.extra_memory_bytes(call, self.device)
        timing = {"forward_backward": {"ours": Timing.of(seconds)}}
        self.report.add([*speeds(case, timing, peak), *memories(case, {"ours": size}, self.device)])

    def _affordable(self, case: Case, inputs: tuple[Tensor, ...]) -> dict[Side, LossFunction]:
        """Sides for which there seem to be time and memory, and which then do run."""
        found, wanted = {}, self.report.asked.sides
        for side, loss in sides(case, self.device).items():
            what, need = f"{side} at {case}", LOGITS_BYTES[side] * case.size**2
            free = measure.free_bytes(self.device)
            if side not in wanted or (side == "inf_cl" and case.size > LARGEST_INF_CL):
                continue
            if need > 0.9 * free:
                self.report.budget.skip(what, f"{need / 1e9:.0f} GB of logits, {free / 1e9:.0f} GB are free")
            elif self.report.budget.allows(what, self._expected_s(case, side)):
                try:
                    forward_backward(loss, inputs)
                    found[side] = loss
                except torch.OutOfMemoryError:
                    self.report.budget.skip(what, "out of memory")
        return found

    def _expected_s(self, case: Case, side: Side) -> float:
        """Of everything that a side takes in a case, from its rate at the size before."""
        rate = self._rates.get((side, case.loss))
        one = flops(case.loss, case.size, case.size, case.width) / rate if rate else 0.0
        rounds = 1.5 * one * self.report.asked.rounds
        if self.device.type != "cuda":
            return rounds + 4 * one
        return min(rounds, measure.ENOUGH_S) + 4 * one + (COMPILE_S if compiled(side, self.device) else 1.0)

    def _learn(self, case: Case, timings: dict[Side, Timing]) -> None:
        for side, timing in timings.items():
            self._rates[side, case.loss] = flops(case.loss, case.size, case.size, case.width) / timing.median

    def _errors(self, case: Case, found: dict[Side, LossFunction]) -> list[Record]:
        if case.size > EXACT_UP_TO:
            return []
        return [
            Record("loss", str(case), f"{prefix(side)}{name}_error", value, "1")
            for side, loss in found.items()
            for name, value in errors(case, loss, self.device).items()
        ]


def speeds(case: Case, timings: dict[str, dict[Side, Timing]], peak: float) -> list[Record]:
    """Seconds of every side with their spread, share of the matrix product's rate, and our ratio to each."""
    work = {
        "forward": forward_flops(case.size, case.size, case.width),
        "forward_backward": flops(case.loss, case.size, case.size, case.width),
    }
    record, records = partial(Record, "loss", str(case)), []
    for span, found in timings.items():
        for side, timing in found.items():
            name = f"{prefix(side)}{span}"
            seconds = {"": timing.median, "_p10": timing.p10, "_p90": timing.p90}
            records += [record(f"{name}_seconds{end}", value, "s") for end, value in seconds.items()]
            records.append(record(f"{name}_share_of_matmul_peak", work[span] / timing.median / peak, "1"))
            if side != "ours":
                ratio = "ratio_to" if span == "forward_backward" else f"{span}_ratio_to"
                records.append(record(f"{ratio}_{side}", found["ours"].median / timing.median, "1"))
    return records


def memories(case: Case, sizes: dict[Side, int], device: torch.device) -> list[Record]:
    """Peak memory of forward and backward beyond the features, our ratio to each side, and what counting predicts."""
    record = partial(Record, "loss", str(case))
    bytes_each = 4 if device.type == "cpu" else case.dtype.itemsize
    predicted = extra_memory_bytes(case.loss, case.size, case.size, case.width, bytes_each)
    records = [record("predicted_extra_memory_bytes", predicted, "B")]
    for side, size in sizes.items():
        records.append(record(f"{prefix(side)}extra_memory_bytes", size, "B"))
        if side != "ours" and size > 0:
            records.append(record(f"extra_memory_ratio_to_{side}", sizes["ours"] / size, "1"))
    return records


def prefix(side: Side) -> str:
    """Our own metrics bear no name."""
    return "" if side == "ours" else f"{side}_"


if __name__ == "__main__":
    report.start(main)
