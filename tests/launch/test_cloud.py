"""What is handed to Docker, Kubernetes and SkyPilot: golden files, their publishers' schemas, and what is refused.

`python tests/launch/test_cloud.py` writes the golden files anew.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain import cli, errors, flags, runfile
from pretrain.config import Run
from pretrain.launch import asked, docker, kubernetes, node, resolved, skypilot
from pretrain.launch.job import Job

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
GOLDEN = HERE / "golden_cloud"
HOME = Path("/home/me")
JOB = Job(name="ViT_b16", run_folder=HOME / "runs/ViT_b16", work_folder=HOME, config=Path("b16.yaml"))
CONFIG = "name: ViT_b16\nfolder: runs\ncheckpoint:\n  to: s3://bucket/runs\ntext: '# $HOME `date` {{x}}'\n"
FORGETS = "name: ViT_b16\nfolder: runs\ncheckpoint:\n  to: null\n"
NODES = ("--nodes", "2", "--gpus-per-node", "8")
IMAGE = ("--image", "ghcr.io/you/pretrain:1.0")


def options(schema: type, *args: str) -> Any:
    want = asked.parse(["CONFIG", *args], schema)
    return flags.parse(schema, want.own, "test", schema())


def on_kubernetes(*args: str, config: str = CONFIG) -> str:
    return kubernetes.render(options(kubernetes.Kubernetes, *IMAGE, *args), JOB, config)


def on_skypilot(*args: str, config: str = CONFIG, job: Job = JOB) -> str:
    return skypilot.render(options(skypilot.SkyPilot, *args), job, config)


def in_docker(*args: str, job: Job = JOB) -> str:
    return docker.render(options(docker.Docker, *args), job)


FULL = ("--namespace", "ml", "--service-account", "trainer", "--secrets", "s3", "--environment", "NCCL_DEBUG=WARN",
        "--cpus", "96", "--memory", "800Gi", "--mounts", "shards:/data", "--node-selector", "gpu=h100",
        "--labels", "kueue.x-k8s.io/queue-name=vision", "--grace-s", "300")  # fmt: skip
RENDERED: dict[str, Callable[[], str]] = {
    "trainjob.yaml": lambda: on_kubernetes(*NODES),
    "trainjob_full.yaml": lambda: on_kubernetes(*NODES, *FULL),
    "jobset.yaml": lambda: on_kubernetes(*NODES, "--form", "jobset"),
    "jobset_full.yaml": lambda: on_kubernetes(*NODES, *FULL, "--form", "jobset"),
    "jobset_claim.yaml": lambda: on_kubernetes("--form", "jobset", "--mounts", "runs:/work/runs", config=FORGETS),
    "skypilot.yaml": lambda: on_skypilot("--nodes", "2", "--gpu", "H100:8", "--setup", "pip install pretrain.whl"),
    "skypilot_spot.yaml": lambda: on_skypilot(
        "--gpu", "A100:4", "--spot", "True", "--infra", "gcp/us-central1", "--cpus", "48+", "--memory", "300+",
        "--image", "docker:ghcr.io/you/pretrain:1.0", "--environment", "NCCL_DEBUG=WARN", "--secrets", "WANDB_API_KEY",
    ),
    "skypilot_cpu.yaml": lambda: on_skypilot("--gpus-per-node", "0", "--ranks-per-node", "2", "--setup", "true"),
    "docker.sh": lambda: in_docker("--gpus-per-node", "8", "--mounts", "/data:/data:ro", "--environment", "A=b c"),
    "podman.sh": lambda: in_docker("--gpus-per-node", "0", "--ranks-per-node", "2", "--tool", "podman"),
}  # fmt: skip
OBJECTS = [name for name in RENDERED if name.startswith(("trainjob", "jobset"))]
TASKS = [name for name in RENDERED if name.startswith("skypilot")]


@pytest.mark.parametrize("name", RENDERED)
def test_golden(name: str) -> None:
    assert RENDERED[name]() == (GOLDEN / name).read_text(), f"if meant: python {Path(__file__).relative_to(ROOT)}"


def test_every_rendering_has_its_golden_file() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(RENDERED)


def model_of(kind: str) -> Any:
    """The publisher's model of an object: Kubeflow's Trainer ships those of JobSet and of Kubernetes too."""
    group = {"ConfigMap": "IoK8sApiCoreV1", "JobSet": "JobsetV1alpha2"}.get(kind, "TrainerV1alpha1")
    return getattr(importlib.import_module("kubeflow_trainer_api.models"), f"{group}{kind}")


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_those_of_the_publishers(name: str) -> None:
    """A field that their models do not know, or another type, would not come back."""
    pytest.importorskip("kubeflow_trainer_api")
    for tree in yaml.safe_load_all((GOLDEN / name).read_text()):
        again = json.loads(model_of(tree["kind"]).from_dict(tree).to_json())
        assert without_empty(again) == without_empty(tree)


def without_empty(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_empty(value) for key, value in tree.items() if value is not None}
    return [without_empty(item) for item in tree] if isinstance(tree, list) else tree


def test_the_publishers_models_notice_a_mistake() -> None:
    pytest.importorskip("kubeflow_trainer_api")
    tree = list(yaml.safe_load_all((GOLDEN / "jobset.yaml").read_text()))[1]
    tree["spec"]["failurePolicy"]["maxRestart"] = 1
    again = json.loads(model_of("JobSet").from_dict(tree).to_json())
    assert without_empty(again) != without_empty(tree)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_fit_the_schema_of_skypilot(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((HERE / "schemas" / "skypilot_task.json").read_text())
    tree = yaml.safe_load((GOLDEN / name).read_text())
    jsonschema.validate(tree, schema)
    tree["resources"]["job_recovery"]["recover_on_exit_code"] = 85
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, schema)


def pod_of(tree: dict[str, Any]) -> dict[str, Any]:
    """(JobSet or TrainingRuntime) -> its one Job."""
    spec = tree["spec"] if tree["kind"] == "JobSet" else tree["spec"]["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    found: dict[str, Any] = replicated["template"]["spec"] | {"failurePolicy": spec["failurePolicy"]}
    return found


@pytest.mark.parametrize(
    ("said", "follows"),
    [
        ("Container node for pod ml/b16-node-0-1-x failed with exit code 85 matching FailJob rule at index 1", "again"),
        ("Pod ml/b16-node-0-1-x has condition DisruptionTarget matching FailJob rule at index 2", "again"),
        ("Container node for pod ml/b16-node-0-1-x failed with exit code 2 matching FailJob rule at index 0", "ends"),
    ],
)
@pytest.mark.parametrize("name", ["trainjob.yaml", "jobset.yaml"])
def test_what_follows_from_an_exit_code(name: str, said: str, follows: str) -> None:
    """The sentences are those of Kubernetes' Job controller; its rules and JobSet's are read as their docs tell."""
    job = pod_of(next(tree for tree in yaml.safe_load_all((GOLDEN / name).read_text()) if "spec" in tree))
    rules = job["failurePolicy"]["rules"]
    matching = [rule for rule in rules if any(re.search(p, said) for p in rule["onJobFailureMessagePatterns"])]
    actions = {"again": "RestartJobSetAndIgnoreMaxRestarts", "ends": "FailJobSet"}
    assert [rule["action"] for rule in matching] == [actions[follows]]
    index = int(said.rpartition(" ")[2])
    rule = job["podFailurePolicy"]["rules"][index]
    assert rule["action"] == "FailJob"
    assert str((rule.get("onExitCodes") or {"values": ["DisruptionTarget"]})["values"][0]) in said
    assert job["backoffLimit"] == 0, "any other exit code fails the Job for another reason, and is counted"


@pytest.mark.parametrize("name", TASKS)
def test_the_config_comes_out_of_the_script_as_it_went_in(name: str, tmp_path: Path) -> None:
    script = yaml.safe_load((GOLDEN / name).read_text())["run"].partition("\nexec ")[0]
    subprocess.run(["bash", "-euc", script], check=True, env={**os.environ, "HOME": str(tmp_path)})
    assert (tmp_path / "pretrain" / "config.yaml").read_text() == CONFIG


def test_a_configmap_holds_the_config_as_it_is() -> None:
    config_map = next(iter(yaml.safe_load_all((GOLDEN / "jobset.yaml").read_text())))
    assert config_map["data"]["config.yaml"] == CONFIG


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no image": (lambda: kubernetes.render(kubernetes.Kubernetes(), JOB, CONFIG), "image: which?"),
    "forgets": (lambda: on_kubernetes(config=FORGETS), "name --bucket s3://"),
    "claim elsewhere": (lambda: on_kubernetes("--mounts", "c:/work/run", config=FORGETS), "pod has an empty disk"),
    "no path": (lambda: on_kubernetes("--mounts", "claim"), "write CLAIM:/path"),
    "size": (lambda: on_kubernetes("--shm", "16 GB"), "write a quantity"),
    "grace": (lambda: on_kubernetes("--grace-s", "0"), "grace_s 0 must be 1 or more"),
    "no gpu": (lambda: on_skypilot(), "gpu: which?"),
    "odd gpu": (lambda: on_skypilot("--gpu", "H100:many"), "write NAME:COUNT"),
    "two counts": (lambda: on_skypilot("--gpu", "H100:8", "--gpus-per-node", "4"), "gpu H100:8 says 8"),
    "sky forgets": (lambda: on_skypilot("--gpu", "H100:8", config=FORGETS), "takes its disk along"),
    "no checkout": (lambda: on_skypilot("--gpu", "H100:8"), "is no checkout to install from"),
    "two machines": (lambda: in_docker("--nodes", "2"), "Docker runs one machine"),
    "docker restarts": (lambda: in_docker("--max-restarts", "1"), "is not restarted"),
    "docker size": (lambda: in_docker("--shm", "big"), "write a size"),
    "docker mount": (lambda: in_docker("--mounts", "/data"), "write HOST:CONTAINER"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_line(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(errors.UserError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_option_hides_a_knob() -> None:
    for schema in (docker.Docker, kubernetes.Kubernetes, skypilot.SkyPilot, node.Node):
        assert not set(Run.__dataclass_fields__) & (set(schema.__dataclass_fields__) | {"cluster", "dry_run", "json"})


def test_gpus_of_skypilot_are_ranks() -> None:
    assert options(skypilot.SkyPilot, "--nodes", "2", "--gpu", "H100:8").world_size == 16
    assert options(skypilot.SkyPilot, "--gpu", "H100").world_size == 1


def test_a_docker_command_that_runs_has_nothing_for_a_shell() -> None:
    command = docker.command(options(docker.Docker), JOB)
    assert command[command.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"


def test_a_config_and_runs_elsewhere_are_mounted() -> None:
    job = Job(name="x", run_folder=Path("/big/runs/x"), work_folder=HOME, config=Path("/etc/runs/c.yaml"))
    text = in_docker(job=job)
    assert "--volume /big/runs:/big/runs \\\n" in text
    assert "--volume /etc/runs:/etc/runs:ro \\\n" in text


TOOLS = {
    "kubectl": (["kubernetes", "--image", "i", "--nodes", "2", "--gpus-per-node", "2"], "kubernetes.yaml"),
    "sky": (["skypilot", "--gpu", "H100:2", "--secrets", "WANDB_API_KEY"], "skypilot.yaml"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_it_is_handed_to_the_tool_of_this_machine(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in keeps what it is given; without the tool one line says so, and nothing is written."""
    (kind, *more), name = TOOLS[tool]
    config, knobs = str(ROOT / "configs" / "debug.yaml"), ("--folder", str(tmp_path / "runs"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(resolved, "resolve", resolve_here)
    assert cli.run(["launch", kind, config, *more, "--bucket", "s3://b/runs", *knobs]) == errors.USER_ERROR
    assert f"{tool} is not on the PATH" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    stand_in = tmp_path / tool
    stand_in.write_text(
        f'#!/bin/bash\necho "$@" > {tmp_path}/args\n[ "$1" != apply ] || echo "$(</dev/stdin)" > {tmp_path}/in\n'
    )
    stand_in.chmod(0o755)
    assert cli.run(["launch", kind, config, *more, "--bucket", "s3://b/runs", *knobs, "--json"]) == errors.DONE
    kept = Path(json.loads(capsys.readouterr().out)["file"])
    assert kept == tmp_path / "runs" / "debug" / "launch" / "0001" / name
    assert "to: s3://b/runs" in kept.read_text()
    words = (tmp_path / "args").read_text().split()
    if tool == "sky":
        assert words == ["jobs", "launch", "--yes", "--detach-run", "--secret", "WANDB_API_KEY", str(kept)]
    else:
        assert words == ["apply", "-f", "-"]
        assert (tmp_path / "in").read_text().strip() == kept.read_text().strip()


def resolve_here(config: str, knobs: tuple[str, ...]) -> str:
    """As `resolved.resolve`, without a process of its own."""
    return runfile.dump(runfile.load(Path(config), list(knobs)))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in RENDERED.items():
        (GOLDEN / name).write_text(text())
