"""What a user can do wrong, and how a run may end."""

DONE, FAILURE, USER_ERROR, REQUEUE = 0, 1, 2, 85
"""Exit codes: finished; anything unforeseen; the user's mistake; stopped by a signal with a checkpoint saved."""


class UserError(ValueError):
    """The user's mistake: one line that names the field, its value, the rule and the fix. Ends with exit code 2."""


class ProcessDied(RuntimeError):  # noqa: N818 - what happened, not a kind of mistake
    """A process of this program ended by itself, mostly killed from outside; one line says which, how, and what helps.
    Ends with exit code 1."""


class Stopped(Exception):  # noqa: N818 - not an error: a signal asked for it and the state is saved
    """A signal asked the run to end and its checkpoint is on disk. Ends with exit code 85: start me again."""
