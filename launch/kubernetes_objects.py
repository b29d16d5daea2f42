"""The objects of Kubernetes that are a run, as trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.errors import REQUEUE, USER_ERROR
from pretrain.launch.node import PORT

if TYPE_CHECKING:
    from pretrain.launch.kubernetes import Kubernetes

Tree = dict[str, Any]

USER, CONFIG, WORK = 10001, "/etc/pretrain", "/work"
"""The user of docker/Dockerfile; where the config is mounted; where relative paths of the config begin."""
_TRAINER = "trainer.kubeflow.org"


def of(options: Kubernetes, version: str, kind: str, name: str, labels: tuple[str, ...] = ()) -> Tree:
    """An object without its content."""
    named = {"name": name, "namespace": options.namespace, "labels": _pairs(labels)}
    return {"apiVersion": version, "kind": kind, "metadata": _given(named)}


def train_job(options: Kubernetes, name: str) -> list[Tree]:
    """A runtime of its own, because a TrainJob has no failure policy, and the job that it runs."""
    container = _container(options, name)
    of_job: Tree = {key: container.pop(key) for key in ("args", "env") if key in container}
    resources = container.pop("resources", {})
    runtime = of(options, f"{_TRAINER}/v1alpha1", "TrainingRuntime", name, (f"{_TRAINER}/framework=torch",))
    labels = {"metadata": {"labels": {f"{_TRAINER}/trainjob-ancestor-step": "trainer"}}}
    template = labels | {"spec": _job_spec(options, name, container)}
    runtime["spec"] = {
        "mlPolicy": {"numNodes": options.nodes, "torch": {}},
        "template": {"spec": _set_spec(options, template)},
    }
    sizes: Tree = {"numNodes": options.nodes, "numProcPerNode": options.ranks}
    trainer = _given({"image": options.image, **sizes, "resourcesPerNode": resources, **of_job})
    reference = {"apiGroup": _TRAINER, "kind": "TrainingRuntime", "name": name}
    job = of(options, f"{_TRAINER}/v1alpha1", "TrainJob", name, options.labels)
    return [runtime, job | {"spec": {"runtimeRef": reference, "trainer": trainer}}]


def job_set(options: Kubernetes, name: str) -> Tree:
    """Its pods are told their place in the words of Kubeflow's Trainer; Kubernetes adds JOB_COMPLETION_INDEX."""
    place = {
        "PET_NNODES": options.nodes,
        "PET_NPROC_PER_NODE": options.ranks,
        "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
        "PET_MASTER_PORT": PORT,
    }
    container = _container(options, name)
    container["env"] = [{"name": key, "value": str(value)} for key, value in place.items()] + container.get("env", [])
    size = {"parallelism": options.nodes, "completions": options.nodes}
    found = of(options, "jobset.x-k8s.io/v1alpha2", "JobSet", name, options.labels)
    return found | {"spec": _set_spec(options, {"spec": size | _job_spec(options, name, container)})}


def _set_spec(options: Kubernetes, template: Tree) -> Tree:
    stopped = [f"exit code {REQUEUE} matching", "condition DisruptionTarget matching"]
    rules = [
        ("stopped", "RestartJobSetAndIgnoreMaxRestarts", stopped),
        ("mistake", "FailJobSet", [f"exit code {USER_ERROR} matching"]),
    ]
    because = {"onJobFailureReasons": ["PodFailurePolicy"]}
    policy = [
        {"name": name, "action": action, **because, "onJobFailureMessagePatterns": said} for name, action, said in rules
    ]
    return {
        "failurePolicy": {"maxRestarts": options.max_restarts, "rules": policy},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": template}],
    }


def _job_spec(options: Kubernetes, name: str, container: Tree) -> Tree:
    """One pod that fails ends the Job, with a message that names its exit code; the JobSet decides what follows."""
    rules: list[Tree] = [
        {"onExitCodes": {"containerName": "node", "operator": "In", "values": [code]}} for code in (USER_ERROR, REQUEUE)
    ]
    rules.append({"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
    return {
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob"} | rule for rule in rules]},
        "template": {"spec": _pod_spec(options, name, container)},
    }


def _pod_spec(options: Kubernetes, name: str, container: Tree) -> Tree:
    claims = dict.fromkeys(claim for claim, _ in _mounts(options))
    volumes: list[Tree] = [
        {"name": "config", "configMap": {"name": name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}},
        {"name": "work", "emptyDir": {}},
        *({"name": f"claim-{claim}", "persistentVolumeClaim": {"claimName": claim}} for claim in claims),
    ]
    user = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_s,
        "securityContext": user | {"fsGroupChangePolicy": "OnRootMismatch"},
        "serviceAccountName": options.service_account,
        "nodeSelector": _pairs(options.node_selector),
        "containers": [container],
        "volumes": volumes,
    }
    return _given(spec)


def _container(options: Kubernetes, name: str) -> Tree:
    gpus = str(options.gpus_per_node) if options.gpus_per_node else None
    sizes = _given({"cpu": options.cpus, "memory": options.memory, options.gpu: gpus})
    mounts = [("config", CONFIG), ("shm", "/dev/shm"), ("work", WORK)]
    mounts += [(f"claim-{claim}", path) for claim, path in _mounts(options)]
    container = {
        "name": "node",
        "image": options.image,
        "args": ["launch", "node", f"{CONFIG}/config.yaml"],
        "workingDir": WORK,
        "env": [{"name": key, "value": value} for key, value in _pairs(options.environment).items()],
        "envFrom": [{"secretRef": {"name": secret}} for secret in options.secrets],
        "resources": {"requests": sizes, "limits": sizes} if sizes else {},
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts],
    }
    return _given(container)


def _mounts(options: Kubernetes) -> list[tuple[str, str]]:
    return [(claim, path) for claim, _, path in (mount.partition(":") for mount in options.mounts)]


def _pairs(items: tuple[str, ...]) -> dict[str, str]:
    return {key: value for key, _, value in (item.partition("=") for item in items)}


def _given(tree: Tree) -> Tree:
    """Without what is empty or none."""
    return {key: value for key, value in tree.items() if value not in (None, {}, [])}
