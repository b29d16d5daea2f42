"""`make golden`: run configs/debug.yaml and write its losses down. Look at the diff before you commit it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOSSES = Path(__file__).with_name("debug.txt")
# One instruction set for every x86-64 machine of the last ten years. The matrix library still takes other kernels on
# another maker's processor, so the file names the maker: exact on its machines, close on all others.
PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


def maker() -> str:
    """Who made this machine's processor, as a line of the file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return "# " + next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "unknown")


def losses() -> list[str]:
    """The loss of each of the 20 steps of configs/debug.yaml, to the last bit (hexadecimal) and for the eye."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pretrain", "train", "configs/debug.yaml", "--folder", folder]
        subprocess.run(command, cwd=ROOT, env=os.environ | PINNED, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "debug" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [f"{record['step']:2} {record['loss']:.6f} {float(record['loss']).hex()}" for record in records]


if __name__ == "__main__":
    LOSSES.write_text("\n".join([maker(), *losses()]) + "\n")
    print(LOSSES.read_text(), end="")
