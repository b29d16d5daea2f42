"""`pretrain plan`: memory, time and cost of a run before any GPU is rented."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pretrain import flags
from pretrain.config import Run
from pretrain.errors import UserError

PROG = "pretrain plan CONFIG"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Predict memory, time and cost of a run; further --section.key flags are the run's own."""

    gpus: int | None = None
    """GPUs altogether; default: those of --nodes, or one node's."""
    gpu: str = "h100"
    """Kind of GPU: h100, h100-pcie, h200, a100-40, a100-80, b200, l40s, rtx4090, or cpu."""
    nodes: int | None = None
    """Nodes that the GPUs are spread over; default: as many as they fill."""
    gpus_per_node: int | None = None
    """Default: 8, or --gpus over --nodes."""
    price: float | None = None
    """USD an hour and GPU; default: an assumption."""
    efficiency: float | None = None
    """Share of the data sheet's peak that the towers reach altogether; default: an estimate."""
    picture: Path | None = None
    """SVG file to write: how the run scales."""


def plan(args: list[str]) -> None:
    """`pretrain plan CONFIG --gpus W [--gpu KIND] [--nodes N] [--section.key value] [--picture FILE] [--json]`."""
    if {"-h", "--help"} & set(args):
        flags.parse(Options, ["--help"], PROG, Options())
    options, run = read(args)
    from pretrain.plan import gpus

    kind = gpus.find(options.gpu)
    count, node_size = spread(options)
    refuse(options, run.train.global_batch, count)
    from pretrain.plan import picture, report, trace
    from pretrain.plan.case import Question

    work = trace.trace(run, "cpu" if kind.name == "cpu" else "gpu")
    found = report.plan(Question(run, work, kind, count, node_size, options.efficiency), options.price)
    if options.picture:
        options.picture.write_text(picture.svg(found))
    print(json.dumps(dataclasses.asdict(found)) if "--json" in args else report.text(found))


def read(args: list[str]) -> tuple[Options, Run]:
    """The plan's own options, and the run.

    Raises:
        UserError: no config comes first, or a flag is neither an option nor a knob.
    """
    if not args or args[0].startswith("-"):
        raise UserError("which config? It comes first, then options: pretrain plan CONFIG --gpus 64 --gpu h100")
    from pretrain import runfile

    own, knobs = split([arg for arg in args[1:] if arg != "--json"])
    return flags.parse(Options, own, PROG, Options()), runfile.load(args[0], knobs)


def split(args: list[str]) -> tuple[list[str], list[str]]:
    """The plan's own options, and the run's knobs."""
    names = {item.name for item in dataclasses.fields(Options)}
    own: list[str] = []
    knobs: list[str] = []
    kept = knobs
    for word in args:
        if word.startswith("--"):
            kept = own if word[2:].partition("=")[0].replace("-", "_") in names else knobs
        kept.append(word)
    return own, knobs


def spread(options: Options) -> tuple[int, int]:
    """GPUs altogether, and of a node.

    Raises:
        UserError: the three numbers do not fit together.
    """
    named = {"--gpus": options.gpus, "--nodes": options.nodes, "--gpus-per-node": options.gpus_per_node}
    for flag, value in named.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    gpus, nodes, each = named.values()
    if gpus is None:
        each = each or 8
        return (nodes or 1) * each, each
    if nodes is None:
        return gpus, min(each or 8, gpus)
    if gpus % nodes or (each is not None and gpus != nodes * each):
        raise UserError(f"--gpus {gpus} is not --nodes {nodes} times {f'--gpus-per-node {each}' if each else 'any'}")
    return gpus, gpus // nodes


def refuse(options: Options, batch: int, gpus: int) -> None:
    """What is known to be wrong before the model is built."""
    if batch % gpus:
        near = [n for n in (_divisor(batch, range(gpus, 0, -1)), _divisor(batch, range(gpus, batch + 1))) if n]
        said = " or ".join(map(str, near))
        raise UserError(f"--gpus {gpus} does not divide train.global_batch {batch}; nearest: {said}")
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        raise UserError(f"--efficiency {options.efficiency} must lie in (0, 1]: a share of the peak")
    if options.price is not None and options.price < 0:
        raise UserError(f"--price {options.price} must not be negative: USD an hour and GPU")
    if options.picture is not None and not options.picture.parent.is_dir():
        raise UserError(f"--picture {options.picture}: there is no folder {options.picture.parent}")


def _divisor(batch: int, among: range) -> int | None:
    return next((n for n in among if batch % n == 0), None)
