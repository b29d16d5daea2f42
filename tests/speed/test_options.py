"""The words of model.speed, model.grad_checkpointing and model.patch_dropout, through a config."""

from __future__ import annotations

import re

import pytest

from pretrain import runfile
from pretrain.errors import UserError
from pretrain.speed.options import ENTRIES, Checkpointing, Speed, read, read_checkpointing

START = ["--data.train", "synthetic:64", "--train.samples", "64", "--train.global-batch", "8"]


def load(*flags: str) -> runfile.Run:
    return runfile.load(None, [*START, *flags])


def test_entries() -> None:
    assert read(load().model.speed) == Speed(causal=True)
    assert read(load("--model.speed", "compile", "short_texts").model.speed) == Speed(compile=True, short_texts=True)
    tuned = read(load("--model.speed", "compile=max-autotune", "cuda_graphs", "channels_last").model.speed)
    assert tuned == Speed(compile=True, tuned=True, cuda_graphs=True, channels_last=True)


def test_modes() -> None:
    """CUDA graphs only where they are asked for: inductor's max-autotune would bring them along."""
    assert read(("compile",)).mode == "default"
    assert read(("compile=max-autotune",)).mode == "max-autotune-no-cudagraphs"
    assert read(("cuda_graphs",)).mode == "reduce-overhead"
    assert read(("compile=max-autotune", "cuda_graphs")).mode == "max-autotune"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model.speed", "fast"], re.escape(f"model.speed 'fast' does not exist; there are {', '.join(ENTRIES)}")),
        (["--model.speed", "compile=eager"], "model.speed 'compile=eager' does not exist"),
        (["--model.speed", "causal", "causal"], "names something twice"),
        (["--model.speed", "cuda_graphs", "short_texts"], "cuda_graphs needs one shape"),
        (["--model.speed", "cuda_graphs", "--engine", "fsdp2"], "engine fsdp2 moves them"),
        (["--model.speed", "cuda_graphs", "--engine", "deepspeed"], "engine deepspeed moves them"),
        (["--model.grad-checkpointing", "every=0"], "must be off, all, every=N"),
        (["--model.grad-checkpointing", "some"], "must be off, all, every=N"),
        (["--model.patch-dropout", "1.0"], r"model.patch_dropout 1.0 must lie in \[0, 1\)"),
    ],
)
def test_refusals(flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load(*flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "means"),
    [
        ("off", Checkpointing()),
        ("false", Checkpointing()),
        ("all", Checkpointing(every=1)),
        ("True", Checkpointing(every=1)),
        ("every=3", Checkpointing(every=3)),
        ("selective", Checkpointing(every=1, selective=True)),
    ],
)
def test_checkpointing(word: str, means: Checkpointing) -> None:
    """True and false are what configs said before there were words."""
    assert read_checkpointing(load("--model.grad-checkpointing", word).model.grad_checkpointing) == means
