"""Everything one device has shown, in one file: `python -m benchmarks.merge FOLDER OUT`.

FOLDER holds the JSON of benchmarks, tables that kernels' own benchmarks printed (NAME.table), and outcomes.json, which
says how every part of the whole ended.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import Record


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="folder, where the file is named after the device")
    asked = parser.parse_args(argv)
    path = Path(asked.out) / f"gpu_{report.device_name()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged(asked.folder), indent=1) + "\n")
    print(path)
    return path


def merged(folder: Path) -> dict[str, Any]:
    """One header, all records, how every part ended."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.name != "outcomes.json"]
    skipped = [line for part in parts for line in part["header"]["skipped"]]
    outcomes = folder / "outcomes.json"
    ended = json.loads(outcomes.read_text()) if outcomes.exists() else {}
    tables = [asdict(record) for path in sorted(folder.glob("*.table")) for record in from_table(path)]
    records = [record for part in parts for record in part["records"]] + tables
    return {"header": report.header() | {"skipped": skipped, "outcomes": ended}, "records": records}


def from_table(path: Path) -> Iterator[Record]:
    """Numbers of the Markdown tables in a kernel's output: unit in the corner, a case a line, a form a column."""
    forms: list[str] = []
    unit = ""
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells or not set(line) - set("|- "):
            continue
        numbers = [_number(cell) for cell in cells[1:]]
        if not any(number is not None for number in numbers):
            unit, *forms = cells
            continue
        for form, number in zip(forms, numbers, strict=False):
            if number is not None:
                yield Record(f"kernels.{path.stem}", cells[0], form, number, unit)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


if __name__ == "__main__":
    main()
