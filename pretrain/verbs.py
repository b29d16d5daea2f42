"""What each verb takes from the command line, and the one function it calls."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from pretrain import flags
from pretrain.config import Data
from pretrain.data.how import How
from pretrain.errors import UserError

_HOW = How()

Average = Literal["auto", "yes", "no"]
_AVERAGE: dict[Average, bool | None] = {"auto": None, "yes": True, "no": False}


def train(args: list[str]) -> None:
    """`pretrain train CONFIG [--section.key value] [--print-config]`."""
    from pretrain import runfile
    from pretrain.signals import StopRequest

    show, args = "--print-config" in args, [arg for arg in args if arg != "--print-config"]
    named = bool(args) and not args[0].startswith("-")
    with StopRequest() as stop:  # before the slow imports: a signal that comes during them counts too
        run = runfile.load(args[0] if named else None, args[named:])
        if show:
            print(runfile.dump(run), end="")
            return
        from pretrain.train import train

        train(run, stop)


def evaluate(args: list[str]) -> None:
    """`pretrain evaluate RUN --task ...`, alone or under torchrun."""
    flags.command(_evaluate, args, "pretrain evaluate")


def _evaluate(
    source: Positional[str],
    /,
    *,
    task: Literal["zero_shot", "retrieval"],
    data: tuple[str, ...] = (),
    classes: str | None = None,
    average: Average = "auto",
    batch_size: int = 256,
    workers: int = 2,
    json: bool = False,
) -> None:
    """Measure the encoders of a run on held-out shards, on all ranks that were started.

    Args:
        source: Run folder or checkpoint folder.
        task: What to measure.
        data: Held-out shards; default: the run's data.eval.
        classes: For zero_shot, class names and templates; default: classes.json above the shards.
        average: Use the averaged (EMA) weights; auto: where there are any.
        batch_size: Pairs per rank and forward.
        workers: Decoding processes per rank.
        json: Print one JSON object instead of a table.
    """
    from pretrain.evaluate import evaluate
    from pretrain.world import join

    with join(timeout_s=600.0) as world:
        how = partial(evaluate, source, task, average=_AVERAGE[average], world=world)
        result = how(data=data, classes=classes, batch_size=batch_size, workers=workers)
        if world.is_main:
            show(result, json)


def export(args: list[str]) -> None:
    """`pretrain export RUN OUT --to open_clip`."""
    flags.command(_export, args, "pretrain export")


def _export(
    source: Positional[str],
    out: Positional[Path],
    /,
    *,
    to: Literal["open_clip"] = "open_clip",
    tower: Literal["both", "image", "text"] = "both",
    average: Average = "auto",
    json: bool = False,
) -> None:
    """Write the encoders of a run in another library's format, and prove the copy equal in a fresh process.

    Args:
        source: Run folder or checkpoint folder.
        out: Folder to make.
        to: Format.
        tower: Which encoder.
        average: Use the averaged (EMA) weights; auto: where there are any.
        json: Print one JSON object instead of a table.
    """
    from pretrain.export import export

    show(export(source, out, to, tower=tower, average=_AVERAGE[average]), json)


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
    from pretrain.data.pack import pack_digits

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
    from pretrain.data.pack import pack_folder

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
    from pretrain.data.pack import pack_table

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
    from pretrain.data.pack import pack_shards

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
    from pretrain.data import index, inspect

    if not patterns:
        raise UserError("index: name the shards, such as 'shards/*.tar'")
    if report is not None and not check:
        raise UserError(f"report {report}: only a check reads what a page shows; add --check")
    where = Data(image_keys=image_keys, text_keys=text_keys, index_dir=index_dir, cache_dir=cache_dir)
    found: Any
    if check:
        found = inspect.check(patterns, where, report=report, decode=decode, workers=workers)
    else:
        found = index.make_index(patterns, data=where)
    show(found, json)
    if found.problems:
        raise UserError(f"{len(found.problems)} things are wrong with the {found.shards} shards; see above")


BENCHES = {
    "loss": "time, memory and error of the losses, beside their peers",
    "step": "a whole training step, beside open_clip's",
    "overlap": "how much of each exchange hides behind compute, over emulated links",
}


def bench(args: list[str]) -> None:
    """`pretrain bench loss|step|overlap [...]`: benchmarks/NAME.py of the checkout that this package lies in."""
    name, *rest = args or ["nothing"]
    if name in ("-h", "--help"):
        print("\n".join(f"pretrain bench {name:8} {what}" for name, what in BENCHES.items()))
        return
    if name not in BENCHES:
        raise UserError(f"bench {name}: name what to measure, one of {', '.join(BENCHES)}")
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / f"{name}.py").exists():
        raise UserError(
            f"bench {name}: there is no benchmarks/{name}.py beside {root / 'pretrain'}, and a wheel has none: "
            "clone the repository and run `pip install -e .` there"
        )
    sys.path.insert(0, str(root))
    importlib.import_module(f"benchmarks.{name}").main(rest)


def show(result: Any, as_json: bool) -> None:
    """A result for a person, a line a fact, or as one JSON object."""
    facts = dataclasses.asdict(result) if dataclasses.is_dataclass(result) and not isinstance(result, type) else result
    if as_json:
        print(json.dumps(facts, default=str))
        return
    rows = [row for name, value in facts.items() for row in _rows(name, value)]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:{width}}  {f'{value:.4f}' if isinstance(value, float) else value}")


def _rows(name: str, value: Any) -> list[tuple[str, Any]]:
    """Facts of facts, and lines of text, get a line each."""
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in _rows(f"{name} {key}".rstrip(), part)]
    if isinstance(value, list | tuple) and all(isinstance(line, str) for line in value):
        return [(name, line) for line in value]
    return [(name, value)]
