"""Zero-shot and retrieval with a real encoder: against open_clip's formulas, and the same on any number of ranks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import config, model
from pretrain.compat import open_clip
from pretrain.data.evaluation import EvalBatch
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError
from pretrain.evaluate import retrieval, zero_shot
from pretrain.evaluate.base import Setting
from pretrain.kernels.ranks.reference import rounded_scores
from pretrain.world import World, environment

CPU = torch.device("cpu")
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CLASSES = {"names": NAMES, "templates": ["a photo of the digit {}.", "a handwritten {c}"]}


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


def digits(count: int) -> tuple[torch.Tensor, list[int]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.kron(found.images[:count].astype(np.uint8) * 15, np.ones((4, 4), np.uint8))
    return torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1).contiguous(), found.target[:count].tolist()


def captions(number: int, label: int) -> list[str]:
    """None, one or several; some shared by a class, some an image's own."""
    return [f"a handwritten {NAMES[label]}", f"sample {number}", f"a handwritten {NAMES[label]}"][: number % 4]


def setting(classes: Path | None, world: World, starts: list[int], count: int = 50) -> Setting:
    """This rank's samples are starts[rank] to starts[rank + 1] - 1, in batches of 7."""
    encoder = model.build(config.Model(name="debug-tiny"), Clip(), 0, CPU).eval()
    tokenize = tokenizer.build("debug-tiny")
    images, labels = digits(count)
    first, last = starts[world.rank], starts[world.rank + 1]
    batches = []
    for start in range(first, last, 7):
        rows = range(start, min(start + 7, last))
        texts = [captions(n, labels[n]) for n in rows]
        flat = [text for sample in texts for text in sample]
        tokens = tokenize(flat or [""])[: len(flat)]
        keys = tuple(f"shard/{n}" for n in rows)
        batches.append(
            EvalBatch(images[rows.start : rows.stop], tokens, texts, [labels[n] for n in rows], list(rows), keys)
        )
    return Setting(encoder, tokenize, batches, world, 16, classes)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    return tmp_path / "classes.json"


def alone(classes: Path | None, count: int = 50) -> Setting:
    return setting(classes, World(0, 1, 0, CPU), [0, count], count)


def test_the_classifier_is_open_clips(classes: Path) -> None:
    here = alone(classes)
    templates = [lambda name: f"a photo of the digit {name}.", lambda name: f"a handwritten {name}"]
    theirs = open_clip.build_zero_shot_classifier(here.model.towers, here.tokenize, NAMES, templates)
    ours = zero_shot.classifier(here, zero_shot.Classes.read(classes))
    torch.testing.assert_close(ours.T, theirs, rtol=0, atol=1e-6)


def test_zero_shot_accuracy_is_the_usual_one(classes: Path) -> None:
    here = alone(classes)
    found = zero_shot.measure(here)
    weights = zero_shot.classifier(here, zero_shot.Classes.read(classes))
    images, labels = digits(50)
    ranking = (here.model.encode_image(images) @ weights.T).argsort(dim=1, descending=True)
    hits = (ranking == torch.tensor(labels)[:, None]).float()
    assert found["samples"] == 50
    assert found["top1"] == pytest.approx(hits[:, 0].mean().item())
    assert found["top5"] == pytest.approx(hits[:, :5].sum(1).mean().item())
    own = hits[torch.tensor(labels) == 3, 0].mean().item()
    assert found["per_class"]["three"] == pytest.approx(own)
    assert found["mean_per_class"] == pytest.approx(sum(found["per_class"].values()) / 10)


def test_a_perfect_classifier_and_a_collapsed_one() -> None:
    weights, labels = torch.eye(10), torch.arange(10)
    assert zero_shot.hits(weights, weights, labels).tolist() == [[1.0, 1.0, 1.0]] * 10
    collapsed = zero_shot.hits(torch.ones(10, 3), torch.ones(10, 3), labels)
    torch.testing.assert_close(collapsed, torch.tensor([[1.0, 0.1, 0.5]] * 10, dtype=torch.float64))


def test_retrieval_equals_the_whole_matrix() -> None:
    here = alone(None)
    found = retrieval.measure(here)
    images, labels = digits(50)
    sets = [set(captions(n, label)) for n, label in enumerate(labels)]
    kept = [n for n in range(50) if sets[n]]
    texts = sorted({text for n in kept for text in sets[n]})
    scores = rounded_scores(here.model.encode_image(images[kept]), here.texts(texts))
    relevant = torch.tensor([[text in sets[n] for text in texts] for n in kept])
    assert (found["images"], found["texts"], found["pairs"]) == (len(kept), len(texts), int(relevant.sum()))
    for name, matrix, good in (("image_to_text", scores, relevant), ("text_to_image", scores.T, relevant.T)):
        best = matrix.masked_fill(~good, -2).amax(1, keepdim=True)
        place = ((matrix > best) & ~good).sum(1)
        assert not ((matrix == best) & ~good).any(), "a tie: choose other captions"
        for k in (1, 5, 10):
            assert found[f"{name}_recall@{k}"] == pytest.approx((place < k).float().mean().item())
        assert found[f"{name}_median_rank"] == np.median(place + 1)
        assert found[f"{name}_mean_rank"] == pytest.approx((place + 1.0).mean().item())


def test_equal_captions_of_two_images_are_one_text() -> None:
    here = alone(None, 8)
    same = [batch._replace(captions=[["one text"]] * len(batch.keys)) for batch in here.batches]
    found = retrieval.measure(Setting(here.model, here.tokenize, same, here.world))
    assert (found["images"], found["texts"], found["pairs"]) == (8, 1, 8)
    assert found["text_to_image_recall@1"] == found["image_to_text_recall@1"] == 1.0


@pytest.mark.parametrize(
    ("labels", "says"), [([None] * 7, "shard/0 has no label"), ([10] * 7, "label 10, but the classes named are 0 to 9")]
)
def test_wrong_labels_are_told(classes: Path, labels: list[int | None], says: str) -> None:
    here = alone(classes, 7)
    wrong = [batch._replace(labels=labels) for batch in here.batches]
    with pytest.raises(UserError, match=says):
        zero_shot.measure(Setting(here.model, here.tokenize, wrong, here.world, 16, classes))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"names": ["a"]}', "templates"),
        ('{"names": ["a"], "templates": ["a photo"]}', "no {} where the name goes"),
        ('{"names": [], "templates": ["{}"]}', "must not be empty"),
        ("nothing", "not readable"),
    ],
)
def test_a_wrong_class_file_is_told(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(UserError, match=says):
        zero_shot.Classes.read(tmp_path / "classes.json")


def test_missing_classes_and_samples_are_told(classes: Path) -> None:
    with pytest.raises(UserError, match=r"needs classes.json"):
        zero_shot.measure(alone(None))
    for task in (zero_shot, retrieval):
        with pytest.raises(UserError, match="no held-out"):
            task.measure(alone(classes, 0))


def on_a_rank(classes: str, starts: list[int]) -> dict[str, Any]:
    rank, size, _ = environment()
    torch.set_num_threads(1)
    here = setting(Path(classes), World(rank, size, rank, CPU), starts)
    return {"zero_shot": zero_shot.measure(here), "retrieval": retrieval.measure(here)}


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "starts", [[0, 31, 50], [0, 0, 50], [0, 20, 20, 50]], ids=["uneven", "first-empty", "middle-empty"]
)
def test_any_number_of_ranks_measures_the_same(ranks: Any, classes: Path, starts: list[int]) -> None:
    one = {"zero_shot": zero_shot.measure(alone(classes)), "retrieval": retrieval.measure(alone(classes))}
    for found in ranks(len(starts) - 1).run(on_a_rank, str(classes), starts):
        for task, metrics in one.items():
            assert found[task].keys() == metrics.keys()
            for name, value in metrics.items():
                assert found[task][name] == pytest.approx(value, abs=1e-9), (task, name)


def bad_on_one_rank(classes: str) -> str:
    rank, size, _ = environment()
    here = setting(Path(classes), World(rank, size, rank, CPU), [0, 20, 50])
    if rank == 1:
        wrong = [batch._replace(labels=[None] * len(batch.keys)) for batch in here.batches]
        here = dataclasses.replace(here, batches=wrong)
    try:
        zero_shot.measure(here)
    except UserError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.ranks
@pytest.mark.slow
def test_what_fails_on_one_rank_fails_on_all(ranks: Any, classes: Path) -> None:
    told = ranks(2).run(bad_on_one_rank, str(classes))
    assert told[0] == told[1]
    assert "shard/20 has no label" in told[0]
