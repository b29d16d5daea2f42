"""The image, built for real and run: minutes, and root; `make image-check` asks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import errors

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, IMAGE = Path(__file__).parent / "image.sh", "localhost/pretrain"
ASKED, TORCH = "PRETRAIN_IMAGE_CHECK", os.environ.get("PRETRAIN_IMAGE_TORCH", "")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def missing() -> str:
    """Why no image can be built here; '' where one can."""
    if os.environ.get(ASKED) != "1":
        return f"minutes: asked for by {ASKED}=1, or make image-check"
    for name in ("buildah", "debootstrap", "unshare"):
        if shutil.which(name) is None:
            return f"{name} is not installed: apt-get install --no-install-recommends buildah debootstrap"
    return "" if os.getuid() == 0 else "only root can build here"


def call(*words: object, expect: int = 0) -> str:
    done = subprocess.run([SCRIPT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == expect, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if reason := missing():
        pytest.skip(reason)
    kept = os.environ.get("PRETRAIN_IMAGE_STORE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("images")
    call("base", folder, "docker.io/library/ubuntu:24.04")
    torch = ["--build-arg", f"TORCH={TORCH}"] if TORCH else []
    extras = ["--build-arg", f"EXTRAS={os.environ.get('PRETRAIN_IMAGE_EXTRAS', 's3')}"]
    call("build", folder, ROOT, IMAGE, *torch, *extras)
    yield folder
    if not kept:
        call("down", folder)


def test_the_entry_point_is_the_program(store: Path) -> None:
    assert call("run", store, IMAGE, "--version").strip() == __import__("pretrain").__version__
    call("run", store, IMAGE, "train", "/nowhere.yaml", expect=errors.USER_ERROR)


def test_it_is_nobody_special_and_healthy(store: Path) -> None:
    assert call("shell", store, IMAGE, "id -u; pwd; touch x && ls").split() == ["10001", "/work", "x"]
    call("shell", store, IMAGE, "healthy")
    call("shell", store, IMAGE, "pip check && command -v gcc && ! command -v make")


def test_a_stop_reaches_the_ranks_and_their_code_comes_out(store: Path) -> None:
    knobs = "--train.samples 10000000 --checkpoint.every-steps None --log.every-steps 1"
    config = "$(python3 -c 'import pretrain; print(pretrain.__path__[0])')/configs/debug.yaml"
    run = f"exec tini -- pretrain launch node {config} --ranks-per-node 2 {knobs}"
    stop = "until grep -qs '\"step\": 3' runs/debug/metrics.jsonl; do sleep 0.1; done; kill -TERM 1"
    call("shell", store, IMAGE, f"({stop}) & {run}", expect=errors.REQUEUE)
