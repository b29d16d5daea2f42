"""A run as text: file, flags, precedence, one-line errors, and dump -> load equality."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from pretrain import runfile
from pretrain.checks import changes, check_world
from pretrain.config import Run
from pretrain.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = {"data": {"train": ["synthetic:1024"]}, "train": {"samples": 640, "global_batch": 32}}


def write(folder: Path, tree: dict) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_come_back_equal(config: Path, tmp_path: Path) -> None:
    run = runfile.load(config, [])
    again = tmp_path / "again.yaml"
    again.write_text(runfile.dump(run))
    assert runfile.load(again, []) == run
    assert config.read_text().startswith("# "), "a config opens with what to expect"


def test_the_later_wins(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"optim": {"lr": 1e-3, "betas": [0.9, 0.95]}})
    run = runfile.load(path, ["--optim.lr=3e-4", "--optim.lr", "2e-4", "--train.micro-batch", "8"])
    assert (run.optim.lr, run.optim.betas, run.train.micro_batch) == (2e-4, (0.9, 0.95), 8)
    assert run.optim.weight_decay == Run.__dataclass_fields__["optim"].default_factory().weight_decay  # type: ignore[misc]


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: [synthetic:1024]}\ntrain: {samples: 640}\noptim: {lr: 3e-4}\n")
    assert runfile.load(path, []).optim.lr == 3e-4


def test_truth_and_absence_as_people_write_them(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"log": {"wandb": "pairs"}, "checkpoint": {"every_minutes": None}})
    run = runfile.load(path, ["--data.flip", "true", "--log.wandb=none", "--optim.clip-norm", "none", "--name", "none"])
    assert (run.data.flip, run.log.wandb, run.optim.clip_norm, run.name) == (True, None, None, "none")
    assert run.checkpoint.every_minutes is None


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("clip", ["clip"]),
        ({"name": "siglip", "weight": 0.5}, ["siglip"]),
        ([{"name": "clip"}, {"name": "siglip", "weight": 0.1}], ["clip", "siglip"]),
    ],
)
def test_objectives_one_or_several(written: object, names: list[str], tmp_path: Path) -> None:
    run = runfile.load(write(tmp_path, MINIMAL | {"objective": written}), [])
    assert [choice.name for choice in run.objective] == names
    assert runfile.load(write(tmp_path, yaml.safe_load(runfile.dump(run))), []) == run


def test_objective_flags(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"objective": {"name": "clip", "weight": 3.0}})
    assert runfile.load(path, ["--objective.clip.weight", "2"]).objective[0].options.weight == 2
    switched = runfile.load(path, ["--objective", "siglip"]).objective
    assert [(c.name, c.options.weight) for c in switched] == [("siglip", 1.0)]
    both = runfile.load(path, ["--objective=clip,siglip"]).objective
    assert [(c.name, c.options.weight) for c in both] == [("clip", 3.0), ("siglip", 1.0)]


MISTAKES = {
    "unknown key in the file": ({"optim": {"learning_rate": 1}}, [], "optim.learning_rate", "did you mean optim."),
    "unknown section": ({"optimizer": {"lr": 1}}, [], "optimizer.lr", "optim.lr"),
    "unknown flag": ({}, ["--optim.lrr", "3"], "optim.lrr", "did you mean optim.lr?"),
    "a section as a knob": ({}, ["--optim", "3"], "optim is a section", "optim."),
    "not a number": ({}, ["--optim.lr", "fast"], "--optim.lr", "'fast'"),
    "not a choice": ({"model": {"precision": "bf32"}}, [], "bf32", "bf16"),
    "a missing value": ({}, ["--optim.betas", "0.9"], "--optim.betas", "2 values"),
    "unknown objective": ({"objective": "clipp"}, [], "'clipp'", "did you mean clip?"),
    "objective twice": ({"objective": ["clip", "clip"]}, [], "'clip'", "weight"),
    "objective without a name": ({"objective": [{"weight": 1}]}, [], "weight", "name"),
    "synthetic beside shards": ({"data": {"train": ["synthetic:8", "a.tar"]}}, [], "synthetic:8', 'a.tar'", "alone"),
    "no synthetic samples": ({}, ["--data.train", "synthetic:0"], "data.train ['synthetic:0']", "1 or more"),
    "weights of nothing": ({"data": {"weights": [1.0]}}, [], "data.weights (1.0,)", "leave it out"),
    "a window below 0": ({}, ["--data.shuffle-window", "-1"], "data.shuffle_window -1", "0 keeps the order"),
    "no window to draw from": (
        {"data": {"shuffle_window": 0, "replacement": True}},
        [],
        "data.replacement",
        "raise it",
    ),
    "no window for chunks": ({"data": {"shuffle_window": 0, "shuffle_chunk": 0}}, [], "data.shuffle_chunk 0", "leave"),
    "no data": ({"data": {"train": []}}, [], "data.train", "synthetic"),
    "samples and epochs": ({}, ["--train.epochs", "3"], "train.samples (640)", "train.epochs (3.0)"),
    "negative rate": ({}, ["--optim.lr", "-1"], "optim.lr -1.0", "positive"),
    "warm-up beyond the end": ({"optim": {"warmup_samples": 10_000}}, [], "10000", "640"),
    "wsd without its decay": ({"optim": {"schedule": "wsd"}}, [], "optim.decay_samples", "wsd"),
    "an infinite rate": ({}, ["--optim.lr", "inf"], "optim.lr inf", "finite"),
    "an unknown engine": ({"engine": "dpp"}, [], "'dpp'", "ddp"),
    "an unknown exchange": ({}, ["--exchange", "rong"], "'rong'", "gather"),
    "nothing to train": ({"model": {"lock_image": 0, "lock_text": 0}}, [], "model.lock_image", "unlock"),
    "a lock below 0": ({"model": {"lock_text": -1}}, [], "model.lock_text -1", "0 locks the whole"),
    "a lock that is no number": ({"model": {"lock_image": True}}, [], "--model.lock-image", "'True'"),
    "a knob of old": ({"model": {"lock_text_norms": True}}, [], "model.lock_text_norms is not a knob", "did you mean"),
    "a tracker without a project": ({"log": {"wandb": True}}, [], "log.wandb 'True'", "name of a project"),
    "a path as a name": ({"name": "a/b"}, [], "'a/b'", "folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_that_names_field_and_rule(case: str, tmp_path: Path) -> None:
    tree, flags, *expected = MISTAKES[case]
    merged = {
        key: MINIMAL.get(key, {}) | tree[key] if isinstance(tree.get(key), dict) else tree.get(key, MINIMAL.get(key))
        for key in MINIMAL | tree
    }
    with pytest.raises(UserError) as caught:
        runfile.load(write(tmp_path, merged), flags)
    said = str(caught.value)
    assert "\n" not in said
    for part in expected:
        assert part in said, said


@pytest.mark.parametrize(("text", "said"), [("- a\n- b\n", "mapping"), ("a: [1", "not YAML"), (None, "cannot be read")])
def test_a_file_that_is_no_config(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        runfile.load(path, [])


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: [synthetic:1024]}\noptim: {lr: 1.0e-3, eps: 1.0e-8, lr: 5.0e-3}\n")
    with pytest.raises(UserError, match="lr is written twice"):
        runfile.load(path, [])


def test_python_in_yaml_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {tmp_path}/canary']\n")
    with pytest.raises(UserError, match="not YAML"):
        runfile.load(path, [])
    assert not (tmp_path / "canary").exists()


def test_world_size_rules(tmp_path: Path) -> None:
    run = runfile.load(write(tmp_path, MINIMAL), ["--train.micro-batch", "4"])
    check_world(run, 8)
    with pytest.raises(UserError, match=r"train.global_batch 32 is not a multiple of 3 ranks; nearest: 30, 33"):
        check_world(run, 3)
    with pytest.raises(UserError, match=r"train.micro_batch 4 does not divide the 2 pairs"):
        check_world(run, 16)


def test_what_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    run = runfile.load(write(tmp_path, MINIMAL), [])
    harmless = dataclasses.replace(run, folder="elsewhere", log=dataclasses.replace(run.log, every_steps=3))
    assert changes(run, harmless) == []
    other = runfile.load(write(tmp_path, MINIMAL), ["--optim.lr", "1e-5", "--objective", "siglip"])
    named = changes(run, other)
    assert any(line.startswith("optim.lr: 0.0005 -> 1e-05") for line in named)
    assert any(line.startswith("objective:") for line in named)
