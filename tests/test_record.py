"""environment.json: one record per start, nothing secret in it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain import record
from pretrain.config import Data, Parallel, Run, Train
from pretrain.errors import UserError


def a_run(folder: Path) -> Run:
    return Run(
        name="mine", folder=str(folder), data=Data(train=("synthetic:1024",)), train=Train(samples=64, global_batch=32)
    )


def test_environment_names_what_the_numbers_depend_on(tmp_path: Path) -> None:
    found = record.environment(a_run(tmp_path))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["open_clip_torch"]
    assert found["cpu"]["cores"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert json.loads(json.dumps(found)) == found


def test_a_deepspeed_file_is_kept_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 1}, "wandb": {"team": "https://me:secret@host"}}')
    run = a_run(tmp_path)
    assert record.environment(run)["deepspeed"] is None
    found = record.environment(replace(run, engine="deepspeed", parallel=Parallel(deepspeed=str(file))))["deepspeed"]
    assert found == {"zero_optimization": {"stage": 1}, "wandb": {"team": f"https://{record.REDACTED}@host"}}


def test_no_secret_reaches_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = {
        "WANDB_API_KEY": "wandb-0123456789",
        "HF_TOKEN": "hf_abcdefghij",
        "NCCL_SECRET_THING": "nccl-hidden-1",
        "SLURM_PASSWORD": "slurm-hidden-2",
        "MY_AUTH": "elsewhere-hidden",
        "aws_secret_access_key": "aws-hidden-3",
    }
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_ENDPOINT", "https://someone:sesame@mirror.example/")
    argv = [
        "train",
        "c.yaml",
        "--api-key",
        "on-the-line-1",
        "--my-token=on-the-line-2",
        "--note",
        "x elsewhere-hidden y",
    ]
    monkeypatch.setattr("sys.argv", ["pretrain", *argv])
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "pretrain", *argv])
    monkeypatch.setattr(record, "git", lambda folder: {"commit": "c", "diff": "+key = 'hf_abcdefghij'"})
    found = record.environment(a_run(tmp_path))
    text = json.dumps(found)
    for value in (*hidden.values(), "on-the-line-1", "on-the-line-2", "sesame"):
        assert value not in text, value
    assert found["variables"]["NCCL_DEBUG"] == "INFO"
    assert found["variables"]["WANDB_API_KEY"] == "(redacted)"
    assert "MY_AUTH" not in found["variables"]
    assert found["variables"]["HF_ENDPOINT"] == "https://(redacted)@mirror.example/"
    assert found["flags"] == [
        "train",
        "c.yaml",
        "--api-key",
        "(redacted)",
        "--my-token=(redacted)",
        "--note",
        "x (redacted) y",
    ]
    assert found["git"]["diff"] == "+key = '(redacted)'"


def test_short_secrets_of_variables_are_left_out_too() -> None:
    found = record.redact_variables({"HF_TOKEN": "abc", "WANDB_API_KEY": "k", "RANK": "0", "HOME": "/root"})
    assert record.secrets({"GIT_AUTHOR_NAME": "pretrain", "MY_AUTH": "pretrain2"}) == ["pretrain2"]
    assert found == {"HF_TOKEN": "(redacted)", "RANK": "0", "WANDB_API_KEY": "(redacted)"}


def test_ordinary_words_stay() -> None:
    words = ["python", "-m", "pretrain", "train", "tokens/c.yaml", "--optim.lr=3e-4", "--seed", "3", "--resume"]
    assert record.redact_command(words) == words
    assert record.secrets({"A_KEY": "1", "B_KEY": "long-enough"}) == ["long-enough"]


def test_one_record_per_start(tmp_path: Path) -> None:
    for attempt in (1, 2):
        record.append(tmp_path, {"attempt": attempt})
    assert json.loads((tmp_path / "environment.json").read_text()) == [{"attempt": 1}, {"attempt": 2}]
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON list"):
        record.append(tmp_path, {})


def commit(folder: Path) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)


def test_git_commit_diff_and_untracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record.git(tmp_path) is None
    (tmp_path / "a.py").write_text("one\n")
    commit(tmp_path)
    (tmp_path / "a.py").write_text("two\n")
    (tmp_path / "b.py").write_text("new\n")
    found = record.git(tmp_path)
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["root"] == str(tmp_path)
    assert "+two" in found["diff"]
    assert found["untracked"] == ["b.py"]
    assert not found["diff_cut"]
    monkeypatch.setattr(record, "_DIFF_LIMIT", 10)
    cut = record.git(tmp_path)
    assert cut is not None
    assert len(cut["diff"]) == 10
    assert cut["diff_cut"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_checkout_of_another_user_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one\n")
    commit(tmp_path)
    for path in (tmp_path, tmp_path / ".git"):
        os.chown(path, 12345, 12345)
    assert record.git(tmp_path) is not None
