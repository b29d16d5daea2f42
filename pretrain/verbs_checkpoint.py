"""The verb that looks into checkpoints: what it takes from the command line."""

from __future__ import annotations

from collections.abc import Callable

from tyro.conf import Positional

from pretrain import flags
from pretrain.errors import UserError
from pretrain.show import show


def checkpoint(args: list[str]) -> None:
    """`pretrain checkpoint inspect RUN|STEP`, `checkpoint verify RUN|STEP`, `checkpoint consolidate STEP OUT`."""
    kinds: dict[str, Callable[..., None]] = {
        "inspect": _inspect,
        "verify": _verify,
        "consolidate": _consolidate,
    }
    if args[:1] and args[0] in ("-h", "--help"):
        print("\n".join(f"pretrain checkpoint {n:12} {(c.__doc__ or '').splitlines()[0]}" for n, c in kinds.items()))
    elif args[:1] and args[0] in kinds:
        flags.command(kinds[args[0]], args[1:], f"pretrain checkpoint {args[0]}")
    else:
        raise UserError(f"checkpoint {args[0] if args else ''}: name what to do, one of {', '.join(kinds)}")


def _inspect(source: Positional[str], /, *, json: bool = False) -> None:
    """What a checkpoint holds, or which checkpoints a run has.

    Args:
        source: Run folder, checkpoint folder, or the URL of either.
        json: Print one JSON object instead of a table.
    """
    from pretrain.checkpoints import report

    found = report.inspect(source)
    show(found if json else report.lines(found), json)


def _verify(source: Positional[str], /, *, json: bool = False) -> None:
    """Read every file and compare its hash; exit code 2 where one is damaged.

    Args:
        source: Run folder, checkpoint folder, or the URL of either.
        json: Print one JSON object instead of a table.
    """
    from pretrain.checkpoints import report

    found = report.verify(source)
    show(found if json else {name: reasons or "good" for name, reasons in found.items()}, json)
    damaged = sum(bool(reasons) for reasons in found.values())
    if damaged:
        raise UserError(f"{damaged} of {len(found)} checkpoints are damaged; see above")


def _consolidate(source: Positional[str], out: Positional[str], /, *, json: bool = False) -> None:
    """Write a checkpoint's weights as plain safetensors files, each tensor whole, for any other library.

    Args:
        source: Checkpoint folder, or run folder for its newest good one, or the URL of either.
        out: Folder to make: model.safetensors, and ema.safetensors where there is an average.
        json: Print one JSON object instead of a table.
    """
    from pretrain.checkpoints import report
    from pretrain.checkpoints.url import Url, folder_of

    folder = folder_of(out)
    if isinstance(folder, Url):
        raise UserError(f"out {out} is a URL: name a folder on a disk, and copy it from there")
    show(report.consolidate(source, folder), json)
