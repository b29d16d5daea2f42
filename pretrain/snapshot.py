"""What a run's state is: taken from a run at the end of a step, put back into another one at its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from pretrain import checkpoint, record, seed
from pretrain.checkpoint import Folder, State
from pretrain.engines.shards import local
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.train import Training


def take(training: Training) -> State:
    """The run's state after the step just done. Collective.

    Raises:
        UserError: on every rank, the weights are not finite.
    """
    weights = training.engine.model_state()
    with training.world.together("checking the weights"):  # of which a rank may hold a part, or nothing
        refuse_broken(weights, training.run.optim.lr, training.step)
    return State(
        step=training.step,
        samples=training.samples,
        weights=weights,
        average=training.average.state() if training.average is not None else None,
        optimizer=training.engine.optimizer_state(),
        objective=torch.nn.ModuleList(training.objectives).state_dict(),
        rng=seed.rng_state(),
        facts=unchanging(training)
        | {"model": training.model.facts(), "skipped": training.skipped}
        | {"guard": training.guard.record.facts()},
        guard=training.guard.state(),
    )


def restore(training: Training, found: Folder | None) -> None:
    """Put a checkpoint's state into a run that was just built; None: it begins. Collective.

    Raises:
        UserError: on every rank, the run's data or tokenizer has changed, or it may not be gone on with.
    """
    if found is None:
        return
    if not training.run.checkpoint.resume:
        raise UserError(f"checkpoint.resume is False, but {found} exists: use another name, or remove the folder")
    put_back(training, found)


def put_back(training: Training, found: Folder) -> None:
    """A checkpoint's state into a run, whatever step that is at. Collective. Raises: as `restore`."""
    state = checkpoint.load(found, training.world)
    refuse_changed(training, state, found)
    training.step, training.skipped = state.step, state.facts["skipped"]
    with training.world.together(f"loading checkpoint {found}"):  # whose tensors are read only here
        training.engine.load(state.weights, state.optimizer)
        if training.average is not None and state.average is not None:
            training.average.load(state.average)
        torch.nn.ModuleList(training.objectives).load_state_dict(dict(state.objective))
        training.guard.load(state.guard, state.facts["guard"])
    seed.set_rng_state(state.rng)


def unchanging(training: Training) -> dict[str, str]:
    """What must not have changed when the run goes on."""
    return {"data": training.source.fingerprint, "tokenizer": training.tokenize.fingerprint}


def refuse_changed(training: Training, state: State, found: Folder) -> None:
    """Refuse to go on with other data or another tokenizer, naming the shards where that can be told."""
    for fact, now in unchanging(training).items():
        was = state.facts.get(fact)
        if was == now:
            continue
        if fact == "data" and (told := record.data_changes(training.run.path, training.source.facts)):
            raise UserError(f"data.train: {told}: restore what {found} was trained on, or use another name")
        raise UserError(f"{found}: {fact} was {was} and is {now} now: restore it, or use another name")


def refuse_broken(weights: Mapping[str, torch.Tensor], lr: float, step: int) -> None:
    """Refuse to save weights that are not finite over the last good ones."""
    finite = {name: local(value).isfinite().all() for name, value in weights.items()}
    broken = next((name for name, good in finite.items() if not bool(good)), None)
    if broken is not None:
        raise UserError(
            f"optim.lr {lr}: {broken} is not finite after step {step}, and was not saved over the last good "
            "checkpoint; lower the rate, warm up longer, or set optim.clip_norm, under another name"
        )
