"""Memory of one GPU, by part, at the moment of a step when it is fullest."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.plan import communication
from pretrain.plan.case import Question
from pretrain.plan.loss import extra_memory_bytes
from pretrain.plan.memory import NUMBER, held

FEATURE_BYTES = 4
BATCHES = 2
"""On the device at once: the one at work, and the next, which is copied meanwhile."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank on the device."""

    weights: float
    """Master copies and the moving average among them."""
    gradients: float
    optimizer: float
    gathered: float
    """Weights gathered for a moment, and an engine's buffers."""
    activations: float
    """Of the towers, at their peak; casts of weights among them."""
    batch: float
    features: float
    """Of the rank's whole batch, with their gradients."""
    loss: float
    """Columns and gradients of other ranks, and the kernel's workspace."""
    fullest: str
    """When: 'forward', 'loss', 'backward' or 'update'. The parts are not all at their own peak then: the loss is taken
    between the passes, and under `single` gradients come as activations go."""
    peak: float
    """All that lives at that moment."""
    host: float
    """How much of weights, gradients and optimizer is in CPU memory, by offloading."""


def footprint(ask: Question, exchange: str) -> Footprint:
    """Of a rank, under the engine and the passes that the question names.

    Args:
        exchange: 'local' on one GPU.
    """
    kept = held(ask.work.sizes, ask.layout, ask.run.optim.name, ask.run.optim.ema_decay is not None, ask.parts)
    features = 2.0 * FEATURE_BYTES * ask.work.width * ask.rows * (ask.work.image_rows + ask.work.text_rows)
    batch = float(BATCHES * ask.rows * ask.work.pair_bytes)
    moments = tower_moments(ask, late_gradients(ask)) | {"loss": _loss(ask, exchange) + waiting(ask)}
    fixed = kept.device + batch + features
    if late_gradients(ask):
        fixed, moments = fixed - kept.gradients, moments | {"update": float(kept.gradients)}
    fullest = max(moments, key=lambda name: moments[name])
    alone = tower_moments(ask, with_gradients=False)
    return Footprint(
        weights=float(kept.weights + kept.masters + kept.average),
        gradients=float(kept.gradients),
        optimizer=float(kept.moments),
        gathered=float(kept.at_work),
        activations=max(alone.values()),
        batch=batch,
        features=features,
        loss=_loss(ask, exchange),
        fullest=fullest,
        peak=fixed + moments[fullest],
        host=float(kept.host),
    )


def late_gradients(ask: Question) -> bool:
    """Whether gradients have memory only once they are there: engines that send them keep buffers for them."""
    return ask.engine == "single" and ask.parts == 1


def tower_moments(ask: Question, with_gradients: bool) -> dict[str, float]:
    """Bytes of activations at most, forward and backward: text runs first forward, and last backward."""
    text, image = ask.work.text, ask.work.image
    words, pixels = ask.micro * ask.work.text_rows, ask.micro * ask.work.image_rows
    saved = text.saved.at(words)
    forward = max(text.forward_peak.at(words), saved + image.forward_peak.at(pixels))
    if with_gradients:
        first = image.backward_peak_with_gradients.at(pixels)
        then = NUMBER * image.parameters + text.backward_peak_with_gradients.at(words)
    else:
        first, then = image.backward_peak.at(pixels), text.backward_peak.at(words)
    return {"forward": forward, "backward": max(saved + first, then)}


def waiting(ask: Question) -> float:
    """Bytes of activations that wait while the loss is taken: none where the towers run again after it."""
    return 0.0 if ask.parts > 1 else sum(tower.saved.at(ask.micro * rows) for tower, rows in ask.work.towers)


def _loss(ask: Question, exchange: str) -> float:
    columns = ask.rows * ask.gpus
    met = {"gather": columns, "local": ask.rows, "streamed": -(-columns // ask.columns.slices)}.get(exchange, ask.rows)
    moved = 0 if exchange == "local" else communication.memory_bytes(exchange, ask.columns)
    return float(moved + extra_memory_bytes(ask.loss, ask.rows, met, ask.work.width, ask.loss_bytes))
