"""The verbs that make shards and look into them: what they take from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from pretrain import flags
from pretrain.config import Data
from pretrain.data.packing.how import How
from pretrain.errors import UserError
from pretrain.show import show

_HOW = How()


def pack(args: list[str]) -> None:
    """`pretrain pack digits OUT`, `pack folder DIR OUT`, `pack table FILE OUT`, `pack shards SHARDS... OUT`."""
    kinds: dict[str, Callable[..., None]] = {
        "digits": _pack_digits,
        "folder": _pack_folder,
        "table": _pack_table,
        "shards": _pack_shards,
    }
    if args[:1] and args[0] in ("-h", "--help"):
        print(
            "\n".join(f"pretrain pack {name:7} {(call.__doc__ or '').splitlines()[0]}" for name, call in kinds.items())
        )
    elif args[:1] and args[0] in kinds:
        flags.command(kinds[args[0]], args[1:], f"pretrain pack {args[0]}")
    else:
        raise UserError(f"pack {args[0] if args else ''}: name what to pack, one of {', '.join(kinds)}")


def _pack_digits(out: Positional[Path], /, *, samples_per_shard: int = 256, size: int = 32, json: bool = False) -> None:
    """The 1797 handwritten digits that come with scikit-learn, captioned, in a training and a held-out part.

    Args:
        out: Folder to make.
        samples_per_shard: Pairs in each tar.
        size: Pixels of a side; the originals have 8.
        json: Print one JSON object instead of a table.
    """
    from pretrain.data.packing.kinds import pack_digits

    show(pack_digits(out, samples_per_shard=samples_per_shard, size=size), json)


def _pack_folder(
    source: Positional[Path], out: Positional[str], /, *, how: OmitArgPrefixes[How] = _HOW, json: bool = False
) -> None:
    """Every image under a folder that has a text or json of the same name beside it.

    Args:
        source: Folder, searched with all its subfolders, in the order of the names.
        out: Folder to make, or a URL to write to.
        json: Print one JSON object instead of a table.
    """
    from pretrain.data.packing.kinds import pack_folder

    show(pack_folder(source, out, how=how), json)


def _pack_table(
    table: Positional[Path],
    out: Positional[str],
    /,
    *,
    image_column: str = "filepath",
    caption_columns: tuple[str, ...] = ("title",),
    label_column: str | None = None,
    image_root: Path | None = None,
    how: OmitArgPrefixes[How] = _HOW,
    json: bool = False,
) -> None:
    """The rows of a CSV, TSV or Parquet file with a column of image paths and one or more of captions.

    Args:
        table: File; its name's ending says which kind.
        out: Folder to make, or a URL to write to.
        image_column: Column of image paths.
        caption_columns: Columns of captions; blank cells are passed over.
        label_column: Column of class numbers, for zero-shot evaluation.
        image_root: Folder that relative image paths start from; default: the table's.
        json: Print one JSON object instead of a table.
    """
    from pretrain.data.packing.kinds import pack_table

    columns = {"image_column": image_column, "caption_columns": caption_columns, "label_column": label_column}
    show(pack_table(table, out, **columns, image_root=image_root, how=how), json)  # type: ignore[arg-type]


def _pack_shards(
    names: Positional[tuple[str, ...]],
    /,
    *,
    image_keys: tuple[str, ...] = Data.image_keys,
    text_keys: tuple[str, ...] = Data.text_keys,
    how: OmitArgPrefixes[How] = _HOW,
    json: bool = False,
) -> None:
    """The samples of WebDataset shards again, such as smaller or cleaned; keys and further members stay as they are.

    Args:
        names: Shards (paths, URLs, globs, brace patterns), then the folder to make or the URL to write to.
        image_keys: Tar member extensions that hold the image, first match wins.
        text_keys: Where captions are, and are cleaned: a text member, or 'json:FIELD'.
        json: Print one JSON object instead of a table.
    """
    from pretrain.data.packing.kinds import pack_shards

    if len(names) < 2:
        raise UserError("pack shards: name the shards, then where to pack, such as 'old/{000..100}.tar' new/")
    show(pack_shards(names[:-1], names[-1], image_keys=image_keys, text_keys=text_keys, how=how), json)


def index(args: list[str]) -> None:
    """`pretrain index SHARDS... [--check] [--report PAGE]`."""
    flags.command(_index, args, "pretrain index")


def _index(
    patterns: Positional[tuple[str, ...]],
    /,
    *,
    check: bool = False,
    report: Path | None = None,
    decode: int = 256,
    image_keys: tuple[str, ...] = Data.image_keys,
    text_keys: tuple[str, ...] = Data.text_keys,
    index_dir: str | None = None,
    cache_dir: str | None = None,
    workers: int = 0,
    json: bool = False,
) -> None:
    """Build the offset index of each shard, or check the shards.

    Args:
        patterns: Shards: paths, URLs, globs and brace patterns.
        check: Read the shards again, compare with the stored indexes, and tell what they hold.
        report: With check: write an HTML page with histograms and pictures there.
        decode: With check: images that are decoded, drawn at random.
        image_keys: Tar member extensions that hold the image, first match wins.
        text_keys: Where captions are: a text member, or 'json:FIELD'.
        index_dir: Folder of the indexes; default: beside local shards, in a cache for remote ones.
        cache_dir: Folder that keeps whole remote shards.
        workers: Processes of the check; 0: one for each core.
        json: Print one JSON object instead of a table.
    """
    from pretrain.data.checking import inspect
    from pretrain.data.shards import index

    if not patterns:
        raise UserError("index: name the shards, such as 'shards/*.tar'")
    if report is not None and not check:
        raise UserError(f"report {report}: only a check reads what a page shows; add --check")
    where = Data(image_keys=image_keys, text_keys=text_keys, index_dir=index_dir, cache_dir=cache_dir)
    how: dict[str, Any] = {"report": report, "decode": decode, "workers": workers}
    _tell(inspect.check(patterns, where, **how) if check else index.make_index(patterns, data=where), json)


def _tell(found: Any, as_json: bool) -> None:
    show(found, as_json)
    if found.problems:
        raise UserError(f"{len(found.problems)} things are wrong with the {found.shards} shards; see above")
