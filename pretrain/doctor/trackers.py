"""Check of the login of an experiment tracker, where the run asks for one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from pretrain.doctor.base import Finding, Patient
from pretrain.doctor.versions import installed
from pretrain.trackers import logged_in

ANSWER_S = 5.0


def wandb(patient: Patient) -> Iterator[Finding]:
    """As the first rank will find it, which alone logs."""
    if patient.run.log.wandb is None:
        yield Finding("wandb", "skipped: log.wandb is not set", "skip")
        return
    found = login(os.environ)
    yield found
    if found.status == "ok" and mode(os.environ) == "online":
        yield _reachable(os.environ)


def mode(environment: Mapping[str, str]) -> str:
    """As the run will choose it: online with a login, offline without, unless WANDB_MODE says so."""
    return environment.get("WANDB_MODE") or ("online" if logged_in(environment) else "offline")


def login(environment: Mapping[str, str]) -> Finding:
    """Whether the login is there that the mode needs."""
    needed, mend = "a login, or WANDB_MODE=offline", "run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
    if installed("wandb") is None:
        return Finding("wandb", "is not installed", "fail", needed, "pip install wandb, or leave log.wandb out")
    chosen, there = mode(environment), logged_in(environment)
    if chosen == "online" and not there:
        return Finding("wandb", "WANDB_MODE=online without a login", "fail", needed, mend)
    if chosen == "online":
        return Finding("wandb", "online, with a login", "ok", needed, mend)
    if environment.get("WANDB_MODE"):
        return Finding("wandb", f"WANDB_MODE={chosen}", "ok", needed, mend)
    return Finding("wandb", "offline, for there is no login; `wandb sync` uploads it later", "warn", needed, mend)


def _reachable(environment: Mapping[str, str]) -> Finding:
    asked = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    host, port = asked.hostname or "", asked.port or (80 if asked.scheme == "http" else 443)
    mend = "open the way to it, or set WANDB_MODE=offline; the run goes on offline otherwise"
    try:
        socket.create_connection((host, port), ANSWER_S).close()
    except OSError as error:
        return Finding("wandb server", f"{host}: {error}", "warn", "an answer from this node", mend)
    return Finding("wandb server", f"{host} answers", "ok", "an answer from this node", mend)
