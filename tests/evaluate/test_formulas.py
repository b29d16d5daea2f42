"""Metrics equal the published formulas, written out here over whole matrices, and are the same on 2 and 3 ranks.

clip_benchmark's: `accuracy` of metrics/zeroshot_classification.py (top-k by sorted logits), and `recall_at_k` above 0
for each query, of metrics/zeroshot_retrieval.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain import config, evaluate, model
from pretrain.data.texts import tokenizer
from pretrain.evaluate import composition, conditional, few_shot, geometry, linear_probe
from pretrain.evaluate.base import probe
from pretrain.evaluate.base.labelled import Labelled
from pretrain.evaluate.base.published import read
from pretrain.evaluate.base.samples import Opener
from pretrain.world import World, environment

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)
COUNT = 23
"""Pictures: no multiple of 2, 3 or the batch size."""


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


def encoder() -> model.DualEncoder:
    return model.build(config.Model(name="debug-tiny"), Clip(), 0, CPU).eval()


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 255, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((50, 60), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and the JSON files of the benchmarks about them."""
    root = tmp_path_factory.mktemp("benchmarks")
    (root / "images").mkdir()
    for n in range(COUNT):
        picture(n).save(root / "images" / f"{n}.png")
        picture(n).save(root / "images" / f"{n}.jpg", quality=95)
    write(root / "add_obj.json", {
        str(n): {"filename": f"{n}.png", "caption": word(n), "negative_caption": word(n + COUNT)}
        for n in range(COUNT)
    })  # fmt: skip
    write(root / "relation.json", [
        {"image_path": f"{n}.png", "true_caption": word(n, 2), "false_caption": word(n + COUNT, 2),
         "relation_name": ["on", "under", "left of"][n % 3],
         "bbox_x": n, "bbox_y": 2, "bbox_w": 20, "bbox_h": 30} for n in range(COUNT)
    ])  # fmt: skip
    write(root / "order.json", [
        {"image_path": f"{n}.png", "caption_options": [word(n + k, 3) for k in (0, 50, 99)]} for n in range(COUNT)
    ])  # fmt: skip
    box = [5, 5, 10, 20]
    write(root / "focus.json", [
        {"reference": {"image_id": n, "instance_bbox": box}, "condition": f"colour {n}",
         "target": {"image_id": (n + 1) % COUNT, "instance_bbox": box},
         "gallery": [{"image_id": (n + k) % COUNT, "instance_bbox": box} for k in range(2, 6 + (n == 0))]}
        for n in range(COUNT)
    ])  # fmt: skip
    write(root / "coco.json", {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(COUNT)],
        "annotations": [{"image_id": n, "caption": f"text {k} of picture {n}"} for n in range(COUNT) for k in range(5)],
    })  # fmt: skip
    return root


def word(number: int, seed: int = 1) -> str:
    return " ".join(str(n) for n in np.random.default_rng((seed, number)).integers(0, 1000, 3))


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def entry(root: Path, name: str) -> str:
    return f"{root}/{name}.json@{root}/images"


def measured(root: str, world: World, task: str, *names: str) -> dict[str, Any]:
    held_out = config.Data(eval=tuple(entry(Path(root), name) for name in names), workers=0)
    return evaluate.measure(encoder(), task, held_out, world, batch_size=4)


def features(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor, list[list[str]]]:
    """Images [N, D] and texts [T, D] of a file, in one batch each, and the texts by image."""
    here, tokenize = encoder(), tokenizer.build("debug-tiny")
    found = config.Data(eval=(entry(root, name),), workers=0)
    opened = Opener(HERE, here.image_spec, tokenize, 64).open(found, ("captions", "composition", "conditional"), "test")
    (batch,) = opened.batches
    texts = [list(record.texts) for record in opened.records] if name != "coco" else batch.captions
    with torch.no_grad():
        flat = [text for each in texts for text in each]
        return here.encode_image(batch.images), here.encode_text(tokenize(flat)), texts


def test_retrieval_is_clip_benchmarks_on_five_captions(data: Path) -> None:
    found = measured(str(data), HERE, "retrieval", "coco")
    images, texts, _ = features(data, "coco")
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(texts)), torch.arange(len(texts)) // 5] = True
    assert (found["images"], found["texts"], found["pairs"]) == (COUNT, 5 * COUNT, 5 * COUNT)
    for name, matrix, good in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
        for k in (1, 5, 10):
            top = matrix.topk(k, dim=1).indices
            hit = (good.gather(1, top).sum(1) / good.sum(1) > 0).float().mean()  # recall_at_k > 0
            assert found[f"{name}_recall@{k}"] == pytest.approx(hit.item())


def test_composition_is_the_papers_accuracy(data: Path) -> None:
    found = measured(str(data), HERE, "composition", "add_obj", "relation", "order")
    for name in ("add_obj", "relation", "order"):
        images, texts, listed = features(data, name)
        scores = torch.einsum("nd,nkd->nk", images, texts.reshape(len(images), len(listed[0]), -1))
        right = scores[:, 0] > scores[:, 1:].amax(1)
        assert found["per_file"][name] == pytest.approx(right.float().mean().item())
        if name == "relation":
            each = [right[n::3].float().mean().item() for n in range(3)]
            assert found["mean_per_group"] == {name: pytest.approx(sum(each) / 3)}
            assert found["per_group"][name] == pytest.approx(dict(zip(["on", "under", "left of"], each, strict=True)))
    assert all(0 < accuracy < 1 for accuracy in found["per_file"].values()), "choose other captions"
    assert found["samples"] == 3 * COUNT
    assert found["mean_per_file"] == pytest.approx(sum(found["per_file"].values()) / 3)
    assert found["accuracy"] == pytest.approx(found["mean_per_file"])  # the files are as long


def test_conditional_similarity_is_geneciss_recall(data: Path) -> None:
    found = measured(str(data), HERE, "conditional", "focus")
    assert (found["samples"], found["left_out"]) == (COUNT - 1, 1)  # one gallery is longer than usual
    here, tokenize = encoder(), tokenizer.build("debug-tiny")
    said = read([entry(data, "focus")])
    opened = Opener(HERE, here.image_spec, tokenize, 64)
    (batch,) = opened.open(config.Data(eval=(entry(data, "focus"),), workers=0), ("conditional",), "test").batches
    with torch.no_grad():
        images = here.encode_image(batch.images)
        texts = here.encode_text(tokenize([query.condition for query in said.records]))
    for mode, make in {"image": lambda i, t: i, "text": lambda i, t: t, "image_text": lambda i, t: (i + t) / 2}.items():
        places = []
        for text, query in zip(texts, said.records, strict=True):
            scores = images[list(query.gallery)] @ make(images[query.reference], text)
            places.append(scores.argsort(descending=True).tolist().index(0))
        for k in (1, 2, 3):
            assert found[f"{mode}_recall@{k}"] == pytest.approx(np.mean([place < k for place in places]))


def test_a_box_is_cut_as_genecis_and_aro_cut_it(data: Path) -> None:
    from pretrain.evaluate.base.pictures import Box

    image = picture(0)
    assert Box(3, 2, 20, 30).cut(image).tobytes() == image.crop((3, 2, 23, 32)).tobytes()
    wide = Box(5, 5, 10, 20, 0.7, square=True).cut(image)  # from (0, 0), 17 wide and 34 high, in a square of 34
    assert wide.size == (34, 34)
    assert wide.crop((8, 0, 25, 34)).tobytes() == image.crop((0, 0, 17, 34)).tobytes()
    assert wide.getpixel((0, 10)) == (0, 0, 0)


def test_geometry_is_its_formulas_over_whole_matrices(data: Path) -> None:
    found = measured(str(data), HERE, "geometry", "coco")
    images, texts = (rows.double().numpy() for rows in features(data, "coco")[:2])
    own = images.repeat(5, axis=0)
    assert found["alignment"] == pytest.approx(((own - texts) ** 2).sum(1).mean(), rel=1e-5)
    assert found["modality_gap"] == pytest.approx(np.linalg.norm(images.mean(0) - texts.mean(0)), rel=1e-5)
    for name, rows in (("image", images), ("text", texts)):
        squares = ((rows[:, None] - rows[None]) ** 2).sum(-1)[~np.eye(len(rows), dtype=bool)]
        assert found[f"{name}_uniformity"] == pytest.approx(math.log(np.exp(-2 * squares).mean()), rel=1e-4, abs=1e-5)
        shares = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
        shares = shares / shares.sum()
        expected = math.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
        assert found[f"{name}_effective_rank"] == pytest.approx(expected, rel=1e-4)
    from scipy.stats import skew

    for name, queries, candidates in (("text", images, texts), ("image", texts, images)):
        nearest = np.argsort(-(queries @ candidates.T), axis=1)[:, :10]
        counts = np.bincount(nearest.reshape(-1), minlength=len(candidates))
        assert found[f"{name}_hubness"] == pytest.approx(skew(counts), abs=0.02)  # nearly equal scores may swap


def test_the_blocks_of_geometry_are_the_whole(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    whole = measured(str(data), HERE, "geometry", "coco")
    monkeypatch.setattr(geometry, "ROWS", 4)
    monkeypatch.setattr(geometry, "COLUMNS", 9)
    assert measured(str(data), HERE, "geometry", "coco") == pytest.approx(whole)


def test_extremes_of_geometry() -> None:
    assert geometry.effective_rank(torch.cat([torch.eye(8), -torch.eye(8)])) == pytest.approx(8)
    assert geometry.effective_rank(torch.ones(5, 8)) == pytest.approx(1, abs=0.1)
    setting: Any = type("S", (), {"share": staticmethod(lambda n: range(n)), "world": HERE})
    assert geometry.uniformity(setting, torch.ones(4, 1)) == pytest.approx(0)
    assert geometry.uniformity(setting, torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    hub = torch.nn.functional.one_hot(torch.tensor([0]), 40).float()
    assert geometry.hubness(setting, hub.repeat(9, 1), torch.eye(40)) > 1


def blobs(count: int, seed: int, classes: int = 3) -> Labelled:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    rows = np.eye(classes, 6)[labels] + 0.4 * rng.standard_normal((count, 6))
    return Labelled((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels)


def test_a_probe_is_scikit_learns_and_its_regulariser_the_best_one() -> None:
    from sklearn.linear_model import LogisticRegression

    train, held_out = blobs(60, 0), blobs(40, 1)
    log_c, score = probe.choose(train, held_out, HERE)
    theirs = LogisticRegression(C=10.0**log_c, max_iter=1000).fit(train.features.astype(float), train.labels)
    assert score == theirs.score(held_out.features, held_out.labels)
    assert score >= max(probe.accuracy(train, held_out, n) for n in probe.COARSE)


def test_draws_and_held_back_samples_keep_classes_apart() -> None:
    labels = np.arange(50) % 5
    learn, choose = few_shot.drawn(labels, 4, 0)
    assert not set(learn) & set(choose)
    assert np.bincount(labels[learn]).tolist() == np.bincount(labels[choose]).tolist() == [4] * 5
    assert few_shot.drawn(labels, 4, 1)[0].tolist() != learn.tolist()
    assert np.bincount(labels[linear_probe.held_back(labels)]).tolist() == [2] * 5


def test_equal_scores_answer_nothing() -> None:
    one = torch.ones(1, 4) / 2
    setting: Any = type("S", (), {"images": lambda *_: one, "texts": lambda _, texts: one.repeat(len(texts), 1)})()
    from pretrain.evaluate.base.published import Choice

    assert list(composition.answers(setting, None, [Choice(("a", "b"), "file")])) == [False]  # type: ignore[arg-type]
    fair = conditional.recalls(one[0], one.repeat(4, 1))
    torch.testing.assert_close(fair, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))


def flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    parts = [flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
             for name, value in metrics.items()]  # fmt: skip
    return {name: value for part in parts for name, value in part.items()}


def every_task(root: str, world: World) -> dict[str, dict[str, Any]]:
    found = {task: measured(root, world, task, "coco") for task in ("retrieval", "geometry")}
    found["composition"] = measured(root, world, "composition", "add_obj", "relation")
    found["conditional"] = measured(root, world, "conditional", "focus")
    return found | probed(root, world)


def probed(root: str, world: World) -> dict[str, dict[str, Any]]:
    """Two class folders of a third of the pictures each, learned from and tested on."""
    folder = Path(root) / "classes"
    data = config.Data(eval=(str(folder),), train=(str(folder),), workers=0)
    how: dict[str, Any] = {"batch_size": 4, "classes": "folders"}
    probes = {task: evaluate.measure(encoder(), task, data, world, **how) for task in ("linear_probe", "few_shot")}
    setting = evaluate.How(classes="folders", templates="simple", batch_size=4)
    zero_shot = evaluate.find("zero_shot")
    made, _ = evaluate._setting(encoder(), tokenizer.build("debug-tiny"), zero_shot, "zero_shot", data, world, setting)
    return probes | {"zero_shot": dict(zero_shot.measure(made))}


def on_a_rank(root: str) -> dict[str, Any]:
    rank, size, _ = environment()
    torch.set_num_threads(1)
    return every_task(root, World(rank, size, rank, CPU))


@pytest.fixture(scope="module")
def one(data: Path) -> dict[str, dict[str, Any]]:
    for n in range(COUNT):
        place = data / "classes" / ("dark_side", "light_side")[n % 2] / f"{n}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(n).save(place)
    return every_task(str(data), HERE)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_uneven_ranks_measure_what_one_does(ranks: Any, data: Path, one: dict[str, dict[str, Any]], size: int) -> None:
    for found in ranks(size).run(on_a_rank, str(data)):
        assert found.keys() == one.keys()
        for task, metrics in one.items():
            assert flat(found[task]) == pytest.approx(flat(metrics), rel=1e-4, abs=1e-5), task


def test_zero_shot_of_class_folders(one: dict[str, dict[str, Any]], data: Path) -> None:
    found = one["zero_shot"]
    assert found["per_class"].keys() == {"dark side", "light side"}
    here, tokenize = encoder(), tokenizer.build("debug-tiny")
    from pretrain.compat import open_clip

    weights = open_clip.build_zero_shot_classifier(
        here.towers, tokenize, ["dark side", "light side"], open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    opened = Opener(HERE, here.image_spec, tokenize, 64).open(
        config.Data(eval=(str(data / "classes"),), workers=0), ("folders",), "test"
    )
    (batch,) = opened.batches
    with torch.no_grad():
        logits, target = here.encode_image(batch.images) @ weights, torch.tensor(batch.labels)
    top = logits.topk(1, 1, True, True).indices.T  # clip_benchmark's accuracy(output, target, topk=(1,))
    assert found["top1"] == pytest.approx((top == target).float().sum().item() / len(target))
    assert found["samples"] == COUNT
