"""`pretrain embed` and `pretrain search`: what they take from the command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from pretrain import flags
from pretrain.errors import UserError
from pretrain.show import columns, show
from pretrain.verbs_drill import faults

if TYPE_CHECKING:
    from pretrain.search.search import Found

Average = Literal["auto", "yes", "no"]
Tower = Literal["image", "text"]
Texts = UseAppendAction[tuple[str, ...]]
_AVERAGE: dict[Average, bool | None] = {"auto": None, "yes": True, "no": False}


def embed(args: list[str]) -> None:
    """`pretrain embed MODEL SHARDS... OUT`, alone or under torchrun; killed, the same command goes on."""
    from pretrain.signals import armed

    with armed(), faults():
        flags.command(_embed, args, "pretrain embed")


def _embed(
    names: Positional[tuple[str, ...]],
    /,
    *,
    tower: Literal["both", "image", "text"] = "both",
    dtype: Literal["fp16", "fp32"] = "fp16",
    average: Average = "auto",
    batch_size: int = 256,
    workers: int = 2,
    timeout_s: float = 600.0,
    json: bool = False,
) -> None:
    """Compute the features of all images and captions of shards, on all ranks that were started.

    Args:
        names: Model (run, checkpoint, open_clip or transformers folder), then shards, then the folder to make.
        tower: Whose features.
        dtype: Of the numbers on the disk.
        average: Use a run's averaged (EMA) weights; auto: where there are any.
        batch_size: Images per rank and forward.
        workers: Decoding processes per rank.
        timeout_s: Seconds that ranks wait for each other; a shard must take less.
        json: Print one JSON object instead of a table.
    """
    from pretrain.search.embed import embed
    from pretrain.signals import armed, interruptible
    from pretrain.watch.watcher import watching_ranks
    from pretrain.world import join

    _refuse(names, timeout_s)
    with armed() as stop, watching_ranks(timeout_s) as watch, join(timeout_s) as world, interruptible(world.size == 1):
        if watch is not None:
            stop.before_leaving = watch.end
        how = partial(embed, tower=tower, dtype=dtype, average=_AVERAGE[average], batch_size=batch_size)
        result = how(names[0], names[1:-1], Path(names[-1]), world=world, watch=watch, workers=workers)
        if world.is_main:
            show(result, json)


def _refuse(names: tuple[str, ...], timeout_s: float) -> None:
    if len(names) < 3:
        raise UserError("name the model, the shards, and the folder to make: embed MODEL SHARDS OUT")
    if "://" in names[-1]:
        raise UserError(f"OUT {names[-1]} is a URL: name a folder on a disk, and copy it from there")
    if not 0 < timeout_s < float("inf"):
        raise UserError(f"--timeout-s {timeout_s} must be a positive number of seconds, 600 for instance")


def search(args: list[str]) -> None:
    """`pretrain search OUT --text "..." | --image FILE [--include SET]... [--exclude SET]... [-k 10]`."""
    flags.command(_search, args, "pretrain search")


def _search(
    folder: Positional[Path],
    /,
    *,
    text: Texts = (),
    image: Texts = (),
    include: Texts = (),
    exclude: Texts = (),
    k: Annotated[int, arg(aliases=["-k"])] = 10,
    tower: Tower | None = None,
    backend: Literal["exact", "faiss"] = "exact",
    model: str | None = None,
    html: Path | None = None,
    into: Path | None = None,
    json: bool = False,
) -> None:
    """Find what lies nearest to texts, images and sets among features that pretrain embed wrote.

    Args:
        folder: What pretrain embed wrote.
        text: What to look for; again: another search. A text may be @FILE, a set with a member a line.
        image: Image file to look for; again: another search.
        include: Set (a text, or @FILE) that every search's answers shall be in as well.
        exclude: Set that they shall be outside of.
        k: Answers to each search.
        tower: Whose features to search; default: images where there are any.
        backend: Compare with everything, or faiss, which above 100,000 rows looks at a part.
        model: The model that embedded, where it lies elsewhere now.
        html: Write a page with the pictures there.
        into: Run folder: keep queries, answers and pictures in its searches.json.
        json: Print one JSON object instead of a table.
    """
    from pretrain.search.query import queries
    from pretrain.search.search import search

    _refuse_no_run(into)
    asked, pictures = queries(text, image, include, exclude), html is not None or into is not None
    found = search(folder, asked, k, tower=tower, backend=backend, source=model, with_pictures=pictures)
    _keep(found, html, into)
    show((dict if json else _lines)(found.as_json(pictures=False)), json)


def _refuse_no_run(into: Path | None) -> None:
    if into is not None and not into.is_dir():
        raise UserError(f"--into {into} is no folder: name a run")


def _keep(found: Found, html: Path | None, into: Path | None) -> None:
    from json import dumps

    from pretrain.checkpoint_files import write_atomic
    from pretrain.search.page import page

    if html is not None:
        write_atomic(html, page(found))
    if into is not None:
        write_atomic(into / "searches.json", dumps(found.as_json()) + "\n")


def _lines(found: dict) -> dict[str, list[str]]:
    """Each answer's hits, a line each."""
    told = {}
    for answer in found["answers"]:
        rows = [[f"{hit['score']:.4f}", hit["key"], " | ".join(hit["texts"])[:120]] for hit in answer["hits"]]
        told[answer["query"]] = columns(rows, right={0})
    if found["missing_shards"]:
        told["note"] = [f"{found['missing_shards']} shards are not embedded yet"]
    return told
