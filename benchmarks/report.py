"""What a benchmark hands over: records of one shape under one header, and how long it may take to get them."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import measure
from pretrain.errors import USER_ERROR, UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PRODUCTS = ("benchmarks/results", "docs/pictures")
"""What measuring itself changes: it makes no tree dirty."""


@dataclass(frozen=True)
class Record:
    """One number."""

    bench: str
    case: str
    metric: str
    value: float
    unit: str


@dataclass
class Budget:
    """Seconds that are left, and what was not measured because they were too few."""

    seconds: float
    skipped: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self._start)

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether something that takes so long still fits; said where it does not."""
        if seconds < self.left:
            return True
        self.skip(what, f"about {seconds:.0f} s would not fit into the {max(0.0, self.left):.0f} s that are left")
        return False

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        print(f"skipped {what}: {why}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Options that all benchmarks share; mistakes are the user's, in one line."""

    def __init__(self, name: str, doc: str | None) -> None:
        super().__init__(f"pretrain bench {name}", description=doc, allow_abbrev=False)
        self.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
        self.add_argument("--threads", type=int, default=2, help="of the CPU")
        self.add_argument("--budget-s", type=float, default=math.inf, help="what no longer fits is skipped, and said")
        self.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
        self.add_argument("--json", action="store_true", help="print the records instead of a table")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments, with the number of threads set."""
        asked = self.parse_args(argv)
        torch.set_num_threads(asked.threads)
        return asked


@dataclass
class Report:
    """One benchmark's records; written whenever a case is done, so that being cut short loses nothing."""

    name: str
    asked: argparse.Namespace
    budget: Budget
    records: list[Record] = field(default_factory=list)

    @staticmethod
    def of(name: str, asked: argparse.Namespace) -> Report:
        return Report(name, asked, Budget(asked.budget_s))

    def add(self, records: Sequence[Record]) -> None:
        self.records += records
        self.write()

    def write(self) -> Path:
        """A file a device, so that a GPU's figures never overwrite a CPU's."""
        path = Path(self.asked.out) / f"{self.name}_{device_name()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.content(), indent=1) + "\n")
        return path

    def content(self) -> dict[str, Any]:
        found = header() | {"skipped": self.budget.skipped}
        return {"header": found, "records": [asdict(record) for record in self.records]}

    def finish(self, shown: Sequence[str] = ()) -> list[Record]:
        """Write and print: everything as JSON, or the metrics named here as a table."""
        path = self.write()
        if self.asked.json:
            print(json.dumps(self.content()))
            return self.records
        print(table(self.records, shown))
        dirty = ", from a tree with changes that are not committed" if dirty_tree() else ""
        print(f"{path}{dirty}")
        return self.records


def start(main: Callable[[], Any]) -> None:
    """A benchmark as a program."""
    try:
        main()
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(USER_ERROR)


def header() -> dict[str, Any]:
    """Machine, versions, commit and command: without them a figure means nothing."""
    cpu = next((line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")), platform.machine())
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "clocks": measure.clocks(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in ("torch", "triton", "open_clip_torch", "timm", "numpy")},
        "commit": commit(),
        "dirty": dirty_tree(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def device_name() -> str:
    return torch.cuda.get_device_name().replace(" ", "_").lower() if torch.cuda.is_available() else "cpu"


def commit() -> str | None:
    """Of the checkout; where there is only a copy of one, what COMMIT says."""
    return _git("rev-parse", "--short", "HEAD") or os.environ.get("COMMIT")


def dirty_tree() -> bool | None:
    """Whether anything besides results differs from the commit; None where nobody knows."""
    spared = [f":(exclude){path}" for path in PRODUCTS]
    changes = _git("status", "--porcelain", "--", ".", *spared)
    return None if changes is None else bool(changes)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def table(records: Sequence[Record], shown: Sequence[str] = ()) -> str:
    """Markdown: a line a case, a column a metric; all metrics unless some are named."""
    kept = [record for record in records if not shown or record.metric in shown]
    metrics = list(dict.fromkeys(f"{record.metric} [{record.unit}]" for record in kept))
    rows: dict[str, dict[str, float]] = {}
    for record in kept:
        rows.setdefault(record.case, {})[f"{record.metric} [{record.unit}]"] = record.value
    lines = ["| case | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for case, values in rows.items():
        lines.append(f"| {case} | " + " | ".join(f"{values[m]:.4g}" if m in values else "" for m in metrics) + " |")
    return "\n".join(lines)
