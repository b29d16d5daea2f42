"""The main job from end to end, on real input: `make demo`.

Packs handwritten digits, trains on two ranks, trains again while a rank is killed half-way, evaluates and exports what
the killed run became, embeds the held-out digits on two ranks, and ends with one table and three searches among them;
the same facts are in runs/demo/summary.json, the searches' pictures in runs/demo/searches.html.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.97
"""Held-out zero-shot accuracy that both digits recipes reach."""
SEARCHES = ("a photo of the digit seven.", "a handwritten three", "the number 0 written by hand")


@dataclass(frozen=True)
class Summary:
    """What the demonstration found."""

    steps: int
    samples_per_s: float
    """Median over the logged steps of the undisturbed run, both ranks together."""
    zero_shot_top1: float
    retrieval_r1: float
    """Mean of image-to-text and text-to-image recall at 1 on the held-out digits."""
    killed_after_step: int
    resumed_from_step: int
    resume_equal: bool
    """Weights, averages and optimizer state of the killed run equal the undisturbed run's, byte for byte."""
    export_parity: bool
    """open_clip, in a fresh process, computes bitwise the same features from the export."""
    seconds: float
    files: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "digits.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    asked = parser.parse_args()
    summary = demonstrate(asked.config, asked.out)
    (asked.out / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    print_table(summary)
    print_searches(asked.out)
    sys.exit(not (summary.resume_equal and summary.export_parity and summary.zero_shot_top1 >= GOAL))


def demonstrate(config: Path, out: Path) -> Summary:
    """The whole story; every command is the one a user would type, and is printed."""
    started = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shards = out / "shards"
    pretrain("pack", "digits", shards)
    data = ["--folder", out, "--data.train", f"{shards}/train/*.tar", "--data.eval", f"{shards}/eval/*.tar"]
    calm, killed = out / "undisturbed", out / "killed"
    ranks("train", config, "--name", calm.name, *data)
    records = metrics(calm)
    stopped_at = train_and_kill(killed, len(records) and records[-1]["step"] // 2, config, "--name", killed.name, *data)
    zero_shot, retrieval, export = at_once(
        ("evaluate", killed, "--task", "zero_shot", "--json"),
        ("evaluate", killed, "--task", "retrieval", "--json"),
        ("export", killed, out / "open_clip", "--to", "open_clip", "--json"),
    )
    search(killed, f"{shards}/eval/*.tar", out)
    speeds = sorted(record["samples_per_s"] for record in records if record["samples_per_s"])
    return Summary(
        steps=records[-1]["step"],
        samples_per_s=round(speeds[len(speeds) // 2], 1),
        zero_shot_top1=round(zero_shot["top1"], 4),
        retrieval_r1=round((retrieval["image_to_text_recall@1"] + retrieval["text_to_image_recall@1"]) / 2, 4),
        killed_after_step=stopped_at,
        resumed_from_step=resumed_from(killed),
        resume_equal=same_files(newest(calm), newest(killed)),
        export_parity=not any(export["parity"]["largest_difference"].values()),
        seconds=round(time.monotonic() - started, 1),
        files=str(out.resolve()),
    )


def search(run_folder: Path, shards: str, out: Path) -> None:
    """Embed the held-out digits; what lies nearest to SEARCHES is in OUT/searches.html and RUN/searches.json."""
    ranks("embed", run_folder, shards, out / "features", "--workers", "1")
    asked = [word for text in SEARCHES for word in ("--text", text)]
    pretrain("search", out / "features", *asked, "-k", "5", "--html", out / "searches.html", "--into", run_folder)


def pretrain(*args: object) -> str:
    """One process of the `pretrain` command; its output."""
    return run([sys.executable, "-m", "pretrain", *map(str, args)])


def at_once(*commands: tuple[object, ...]) -> list[dict]:
    """The JSON of several `pretrain` commands that run side by side: they do not depend on each other."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return [json.loads(text) for text in pool.map(lambda command: pretrain(*command), commands)]


def ranks(*args: object) -> str:
    """Two ranks of it under torchrun."""
    return run([*TORCHRUN, "-m", "pretrain", *map(str, args)])


TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--standalone",
    "--max-restarts",
    "1",
]


def run(command: list[str]) -> str:
    show(command)
    done = subprocess.run(command, cwd=Path.cwd(), env=environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def train_and_kill(folder: Path, after_step: int, *args: object) -> int:
    """Train under torchrun, SIGKILL rank 1 once `after_step` is logged, and let torchrun start the ranks again."""
    command = [*TORCHRUN, "-m", "pretrain", "train", *map(str, args)]
    show(command)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as job:
        while job.poll() is None and not any(record["step"] >= after_step for record in metrics(folder)):
            time.sleep(0.5)
        victim = next(event["pids"][1] for event in events(folder) if event["event"] == "start")
        os.kill(victim, signal.SIGKILL)
        reached = metrics(folder)[-1]["step"]
        print(f"  killed rank 1 (process {victim}) after step {reached}; torchrun starts the ranks again", flush=True)
        if job.wait():
            sys.exit(f"the killed run did not recover: exit code {job.returncode}")
    return reached


def show(command: list[str]) -> None:
    words = " ".join(command).replace(sys.executable, "python").replace(str(ROOT) + "/", "")
    print(f"$ {words}", flush=True)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def metrics(folder: Path) -> list[dict]:
    return list(json_lines(folder / "metrics.jsonl"))


def events(folder: Path) -> list[dict]:
    return list(json_lines(folder / "events.jsonl"))


def json_lines(path: Path) -> Iterator[dict]:
    """The complete lines of a file that may still be growing."""
    with contextlib.suppress(FileNotFoundError):
        yield from (json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))


def resumed_from(folder: Path) -> int:
    return next(event["step"] for event in reversed(events(folder)) if event["event"] == "start")


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step_*"))


def same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, byte for byte: weights, averages, optimizer, every rank's RNG."""
    names = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    return bool(names) and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def print_table(summary: Summary) -> None:
    print()
    for name, value in asdict(summary).items():
        print(f"{name.replace('_', ' '):18} {value}")


def print_searches(out: Path) -> None:
    """Each query with the first captions of what was found."""
    for answer in json.loads((out / "killed" / "searches.json").read_text())["answers"]:
        print(f"\n{answer['query']}")
        for hit in answer["hits"]:
            print(f"  {hit['score']:.3f}  {hit['key']}  {(hit['texts'] or [''])[0]}")
    print(f"\ntheir pictures: {(out / 'searches.html').resolve()}")


if __name__ == "__main__":
    main()
