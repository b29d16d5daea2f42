"""How long a training loop stands still for a checkpoint: ours, written in the background, beside torch.save.

The peer saves as open_clip does: one torch.save of the same weights, average and moments, in the loop; it neither
hashes nor syncs what it writes. Ours is durable when it is counted as written. Also: how much slower the loop's
arithmetic is while the background writes, on a CPU whose cores both share.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.measure import Timing
from benchmarks.report import Record, Report
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.state import State
from pretrain.checkpoints.writing import Keep
from pretrain.world import World

SHOWN = ("blocked_s", "written_s", "share_of_30_min", "share_of_100_steps", "slowdown_while_writing")
INTERVAL_S = 1800.0
"""The default of checkpoint.every_minutes."""
SIZE, PIECES = 256, 24
"""Matrices of the arithmetic that stands for training, and how many products there are between looks at the clock."""


def main(argv: Sequence[str] | None = None) -> list[Record]:
    parser = report.Parser("checkpoint", __doc__)
    parser.add_argument("--millions", type=float, nargs="+", default=[38.0], help="parameters of the model")
    parser.add_argument("--step-s", type=float, default=1.0, help="of a training step, for a share of every 100 steps")
    parser.add_argument("--folder", type=Path, default=None, help="disk to write to; default: the temporary folder")
    asked = parser.read(argv)
    taken = Report.of("checkpoint", asked)
    for millions in asked.millions:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            taken.add(list(records(state_of(millions), millions, Path(folder), asked.rounds, asked.step_s)))
    return taken.finish(SHOWN)


def state_of(millions: float) -> State:
    """Weights, average and AdamW's moments, fp32, in tensors of about a million numbers."""
    count = max(1, round(millions))
    shape = (round(1e6 * millions / count / 1000), 1000)

    def tensors() -> dict[str, Tensor]:
        return {f"block{n}.weight": torch.randn(shape) for n in range(count)}

    moments = {f"{kind}/{name}": value for kind in ("exp_avg", "exp_avg_sq") for name, value in tensors().items()}
    return State(1, 1, tensors(), tensors(), moments, {}, {"torch": torch.get_rng_state()})


def records(state: State, millions: float, folder: Path, rounds: int, step_s: float) -> Iterator[Record]:
    """Ours and the peer's, in turns."""
    world = World(0, 1, 0, torch.device("cpu"))
    saver = Saver(folder / "ours", world, None, Keep(1))
    seconds: dict[str, list[float]] = {"ours": [], "torch.save": [], "written": [], "slowdown": []}
    alone = rate(0.5)
    saver.save(lambda: state, "")  # buffers are made once
    saver.wait()
    for _ in range(rounds):
        seconds["torch.save"].append(timed(lambda: save_as_open_clip(state, folder / "epoch.pt")))
        started = time.perf_counter()
        seconds["ours"].append(timed(lambda: saver.save(lambda: state, "")))
        seconds["slowdown"].append(alone / rate_while(saver))
        saver.wait()
        seconds["written"].append(time.perf_counter() - started)
    size = 16 * millions / 1000
    case = f"{millions:g}M parameters, {size:.2f} GB"
    for name in ("ours", "torch.save"):
        blocked = Timing.of(seconds[name]).median
        yield Record("checkpoint", f"{case}, {name}", "blocked_s", blocked, "s")
        yield Record("checkpoint", f"{case}, {name}", "share_of_30_min", 100 * blocked / INTERVAL_S, "%")
        share = 100 * blocked / (100 * step_s)
        yield Record("checkpoint", f"{case}, {name}", "share_of_100_steps", share, f"% of steps of {step_s:g} s")
    yield Record("checkpoint", f"{case}, ours", "written_s", Timing.of(seconds["written"]).median, "s")
    slower = Timing.of(seconds["slowdown"]).median
    yield Record("checkpoint", f"{case}, ours", "slowdown_while_writing", slower, "times")


def save_as_open_clip(state: State, path: Path) -> None:
    """One file by one process, over the one before."""
    content = {"state_dict": state.weights, "ema": state.average, "optimizer": state.optimizer}
    torch.save(content, path)


def rate(seconds: float) -> float:
    """Matrix products a second."""
    return products(lambda spent: spent < seconds)


def rate_while(saver: Saver) -> float:
    """The same while a checkpoint is written."""
    return products(lambda spent: saver.busy or spent < 0.02)


def products(goes_on: Any) -> float:
    matrix, count, started = torch.randn(SIZE, SIZE), 0, time.perf_counter()
    while True:
        for _ in range(PIECES):
            matrix @ matrix
        count += PIECES
        spent = time.perf_counter() - started
        if not goes_on(spent):
            return count / spent


def timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    report.start(main)
