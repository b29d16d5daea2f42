"""What may be asked of the guard: values of its knobs, and a step to replay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.config import Guard


def problems(guard: Guard) -> Iterator[str]:
    """One sentence for each rule that is broken: field, value, rule, fix."""
    spikes, every = guard.spikes, guard.compare_steps
    if spikes is not None and spikes <= 0:
        yield f"guard.spikes {spikes} must be positive standard deviations; none leaves out only what is not finite"
    if not 1 <= guard.patience <= 128:
        yield f"guard.patience {guard.patience} must lie in 1 to 128: it counts steps among the last 128"
    if guard.rewinds < 0:
        yield f"guard.rewinds {guard.rewinds} must not be negative: 0 ends the run instead of going back"
    if every is not None and every < 1:
        yield f"guard.compare_steps {every} must be at least 1; none never compares"


def step_of(args: list[str]) -> tuple[int | None, list[str]]:
    """The step that a command line asks for with `--replay STEP` or `--replay=STEP`, and the other arguments.

    Raises:
        UserError: it is no step.
    """
    step, others, words = None, [], iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--replay":
            others.append(word)
            continue
        value = value if equals else next(words, "")
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"--replay {value!r} must be the number of a step that was done, 1 or more")
        step = int(value)
    return step, others
