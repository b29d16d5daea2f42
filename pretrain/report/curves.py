"""The charts of training: what is shown, in which order, and what each one means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pretrain.report.chart import Chart
from pretrain.report.marks import Mark
from pretrain.report.ran import Ran
from pretrain.report.records import Line


class Wanted(NamedTuple):
    """A chart, if anything of it was logged."""

    title: str
    about: str
    columns: tuple[tuple[str, str], ...]
    """Column and name of each curve."""
    unit: float = 1.0
    floor: float | None = None


NORMS = (("grad_norm/total", "both towers"), ("grad_norm/image", "image tower"), ("grad_norm/text", "text tower"))
LOGITS = (
    *(("geometry/positive_logit", "pairs"), ("geometry/negative_logit", "others, mean")),
    ("geometry/negative_logit_max", "others, largest"),
)
AFTER_TERMS = (
    Wanted("Gradient norm", "Before clipping; peaks tell of unusual batches.", NORMS),
    Wanted("Logit scale", "What similarities are multiplied by.", (("logit_scale", "scale"),)),
    Wanted("Logit bias", "What is added to scaled similarities.", (("logit_bias", "bias"),)),
    Wanted("Learning rate", "As the schedule gave it.", (("lr", "rate"),), floor=0.0),
    Wanted("Throughput", "Samples a second, all ranks together.", (("samples_per_s", "samples/s"),), floor=0.0),
    Wanted("Data wait", "Share of a step that ranks wait for data, in %.", (("data_wait", "%"),), floor=0.0),
    Wanted("Peak memory", "Of the fullest rank since its start, in GiB.", (("peak_memory_bytes", "GiB"),), 2**30, 0.0),
    Wanted("Logits", "Of pairs, and of images with others' captions.", LOGITS),
    Wanted("Modality gap", "Distance between the centres of the two modalities.", (("geometry/modality_gap", "gap"),)),
    Wanted(
        "Effective rank",
        "Dimensions that the features of a batch use.",
        (("geometry/image_rank", "images"), ("geometry/text_rank", "texts")),
        floor=0.0,
    ),
    Wanted(
        "Uniformity",
        "How evenly features fill the sphere; lower is more even.",
        (("geometry/image_uniformity", "images"), ("geometry/text_uniformity", "texts")),
    ),
    Wanted("Samples replaced", "That could not be read, since the run began.", (("skipped", "samples"),), floor=0.0),
)


def charts(runs: Sequence[Ran]) -> list[Chart]:
    """Of one run, with its parts as lines; of several, a chart a part, with the runs as lines."""
    marks = [mark for run in runs for mark in run.marks]
    found = []
    for wanted in _wanted(runs):
        parts = [wanted] if len(runs) == 1 else list(_apart(wanted))
        found += [chart for part in parts if (chart := _chart(part, runs, marks)) is not None]
    return found


def _wanted(runs: Sequence[Ran]) -> Iterator[Wanted]:
    yield Wanted("Loss", "Sum of the objectives' terms; every record counts.", (("loss", "loss"),))
    terms = tuple(dict.fromkeys(name for run in runs for name in run.columns.under("terms/")))
    if len(terms) > 1:
        yield Wanted("Terms", "Parts of the loss, weighted.", tuple((f"terms/{name}", name) for name in terms))
    yield from AFTER_TERMS[:6]
    if len(runs) == 1 and (phases := runs[0].columns.under("phases_s/")):
        columns = tuple((f"phases_s/{name}", name.replace("_", " ")) for name in phases)
        yield Wanted("Phases of a step", "Milliseconds of a step that go into each phase.", columns, 1e-3, 0.0)
    yield from AFTER_TERMS[6:]


def _apart(wanted: Wanted) -> Iterator[Wanted]:
    if len(wanted.columns) == 1:
        yield wanted
        return
    for column, name in wanted.columns:
        yield wanted._replace(title=f"{wanted.title}: {name}", columns=((column, name),))


def _chart(wanted: Wanted, runs: Sequence[Ran], marks: Sequence[Mark]) -> Chart | None:
    lines: list[Line] = []
    for run in runs:
        for column, name in wanted.columns:
            line = run.columns.line(column, run.name if len(runs) > 1 else name, wanted.unit)
            lines += [line] if line is not None else []
    if not lines or (wanted.title == "Samples replaced" and not any(line.y[-1] for line in lines)):
        return None
    return Chart(wanted.title, wanted.about, lines, marks, wanted.floor)
