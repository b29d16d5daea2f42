"""Where bytes of a shard come from, whatever holds it: what the index and the readers ask of a storage."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from pretrain.errors import UserError


class Stat(NamedTuple):
    """Which bytes a name stands for now."""

    size: int
    """Bytes."""
    version: str
    """Changes when the content may have: a local file's modification time, a remote object's etag or time."""


class Missing(UserError, FileNotFoundError):  # noqa: N818 - named as it is caught
    """There is no such shard: a line for the user, and a FileNotFoundError for code that only asked."""


def changed(name: str) -> UserError:
    """The shard's bytes are no longer those that an index, or the first part of a read, belongs to."""
    return UserError(f"{name}: changed while it was in use; leave the shards alone and start again")


class Blob(Protocol):
    """An open shard. Copies made by a fork may read at once; several threads may, too."""

    stat: Stat

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only where the shard ends.

        Raises:
            UserError: the shard is gone or is another one than when it was opened.
            OSError: it cannot be read, and trying again did not help.
        """
        ...

    def close(self) -> None: ...


class Storage(Protocol):
    """Opens shards by name: a path, a URL that fsspec knows, or 'pipe:COMMAND'. Travels to worker processes."""

    def stat(self, name: str) -> Stat:
        """Raises: Missing: there is no such shard. UserError: it is refused. OSError: as `Blob.read`."""
        ...

    def open(self, name: str, stat: Stat | None = None) -> Blob:
        """The shard's bytes.

        Args:
            stat: what it must still be; a shard that has changed is a UserError that names it, here or at a read.
        """
        ...

    def names(self, pattern: str) -> list[str]:
        """What a glob matches, sorted by name; empty where nothing does."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Put a whole new object there, so that nobody ever sees a part of it."""
        ...
