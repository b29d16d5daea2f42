"""What a user can do wrong, and how a run may end."""

DONE, FAILURE, USER_ERROR, REQUEUE = 0, 1, 2, 85
"""Exit codes: finished; anything unforeseen; the user's mistake; stopped by a signal with a checkpoint saved."""


class UserError(ValueError):
    """The user's mistake: one line that names the field, its value, the rule and the fix. Ends with exit code 2."""


class ProcessDied(RuntimeError):  # noqa: N818 - what happened, not a kind of mistake
    """A process of this program ended by itself, mostly killed from outside; one line says which, how, and what helps.
    Ends with exit code 1."""


class RanksLost(ProcessDied):
    """Other ranks did not come to a collective in time, or are gone; one line says what this rank knows of it. Ends
    with exit code 1, on every rank that is left."""


class RunFailed(RuntimeError):  # noqa: N818 - what happened, not a kind of mistake
    """The run cannot go on as it is: one line says what was seen and what was tried. Ends with exit code 1, on every
    rank."""


class Stopped(Exception):  # noqa: N818 - not an error: a signal asked for it and nothing is lost
    """A signal asked the run to end, and what there was to save is on disk. Ends with exit code 85: start me again."""


def exit_code(error: BaseException | None) -> int:
    """What a process ends with that `error` has ended; None: nothing has."""
    if error is None:
        return DONE
    if isinstance(error, Stopped):
        return REQUEUE
    return USER_ERROR if isinstance(error, UserError) else FAILURE
