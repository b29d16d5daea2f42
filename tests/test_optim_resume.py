"""Every optimizer through the command line: trained in two parts, weights and moments are bitwise those of one part."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
KINDS = ("adamw", "stable_adamw", "lion", "lamb", "muon", "adamw8bit")
FLAGS = ("--train.samples", "192", "--checkpoint.every-steps", "3", "--optim.schedule", "linear")
FLAGS = (*FLAGS, "--optim.layer-decay", "0.8", "--optim.text-lr", "0.5", "--optim.lr-scaling", "sqrt=64")
TOLD = "optim.lr 0.001 becomes 0.000707107"


def words(folder: Path, name: str) -> tuple[object, ...]:
    """6 steps in folder/NAME, saved after 3 and 6."""
    return ("train", "configs/debug.yaml", "--folder", folder, "--name", name, *FLAGS, "--optim.name", name)


def tensors(folder: Path, name: str) -> dict[str, bytes]:
    last = folder / name / "checkpoints" / "step_00000006"
    return {str(path.relative_to(last)): path.read_bytes() for path in last.rglob("*.safetensors")}


def halve(folder: Path, name: str) -> None:
    """Leave what a run that was killed behind its third step has left."""
    shutil.rmtree(folder / name / "checkpoints" / "step_00000006")
    assert (folder / name / "checkpoints" / "step_00000003" / "COMMIT").exists()


def test_three_steps_and_three_more_are_six(program: Any, tmp_path: Path) -> None:
    names = [name for name in KINDS if name != "adamw8bit" or _has_bitsandbytes()]
    for name in names:
        program.run(*words(tmp_path, name))
    wholes = {name: tensors(tmp_path, name) for name in names}
    models = [whole["weights/model.safetensors"] for whole in wholes.values()]
    assert len(set(models)) == len(names), "each optimizer trains in its own way"
    for name in names:
        assert "state/optimizer.safetensors" in wholes[name]
        halve(tmp_path, name)
        program.run(*words(tmp_path, name))
        assert tensors(tmp_path, name) == wholes[name], name


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["muon"])
def test_three_steps_and_three_more_are_six_on_two_ranks(program: Any, name: str, tmp_path: Path) -> None:
    told = "".join(job.said for job in program.run_ranks(2, *words(tmp_path, name)))
    assert told.count(TOLD) == 1, "by one rank, once"
    whole = tensors(tmp_path, name)
    written = {f"{stem}-0000{n}-of-00002.safetensors" for stem in ("weights/model", "state/optimizer") for n in (1, 2)}
    assert written <= whole.keys()
    halve(tmp_path, name)
    program.run_ranks(2, *words(tmp_path, name))
    assert tensors(tmp_path, name) == whole


def _has_bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True
