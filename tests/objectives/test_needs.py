"""What objectives ask for reaches them: through the towers or as it is, in every form of the step, on any ranks."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from pretrain import config, engines, exchange, objectives, runfile, step
from pretrain import train as trainer
from pretrain.data import wanted
from pretrain.data.wanted import Wanted
from pretrain.errors import UserError
from pretrain.model import DualEncoder, build
from pretrain.values import Batch, Pairs
from pretrain.world import World

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CPU = torch.device("cpu")
ROWS = 8
COLUMNS = ("image_views", "text_views", "captions", "caption_counts", "meta:label", "meta:score", "meta:language",
           "meta:boxes")  # fmt: skip


def needy() -> Any:
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    method = objectives.find("toys.needy")
    return method(method.Options())


def encoder(objective: Any) -> DualEncoder:
    """A tiny fp64 dual encoder."""
    return build(config.Model(name="debug-tiny"), [objective], seed=1, device=CPU).double().train()


def batch_of(model: DualEncoder, view_size: tuple[int, int] | None = None) -> Batch:
    """ROWS pairs with every further column; rows 3 and 4 are the same sample."""
    generator, length = torch.Generator().manual_seed(4), model.towers.context_length

    def images(*shape: int, size: tuple[int, int] | None = None) -> Tensor:
        shape = (*shape, 3, *(size or model.image_spec.size))
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def texts(*shape: int) -> Tensor:
        return torch.randint(1, 400, (*shape, length), generator=generator)

    extra = {
        "image_views": images(ROWS, 2, size=view_size),
        "text_views": texts(ROWS, 2),
        "captions": texts(ROWS, 3),
        "caption_counts": torch.tensor([1, 2, 3] * 3)[:ROWS],
        "meta:label": torch.arange(ROWS) - 1,
        "meta:score": torch.linspace(0, 1, ROWS).where(torch.arange(ROWS) != 2, torch.nan),
        "meta:language": torch.randint(0, 2**62, (ROWS,), generator=generator),
        "meta:boxes": torch.rand(ROWS, 2, 4, generator=generator),
    }
    ids = torch.tensor([0, 1, 2, 3, 3, 5, 6, 7])
    return Batch(images(ROWS), texts(ROWS), ids, tuple(map(str, range(ROWS))), (), extra)


def gradients(rank: int, size: int, micro_batch: int | None) -> dict[str, Tensor]:
    """Of this rank's share, as the engine averages them."""
    objective = needy()
    model = encoder(objective)
    engine = engines.find("auto", size)(model, config.Optim(), World(rank, size, rank, CPU))
    columns, share = exchange.make("auto", rank, size), ROWS // size
    batch = batch_of(model).rows(rank * share, (rank + 1) * share)
    if micro_batch is None:
        terms, _ = step.plain_step(engine, [objective], columns, batch)
    else:
        terms, _ = step.cached_step(engine, [objective], columns, batch, micro_batch)
    assert terms.keys() == {"clip", "views", "captions"}
    return {name: param.grad.clone() for name, param in model.towers.named_parameters() if param.grad is not None}


def on_ranks(micro_batch: int | None) -> dict[str, Tensor]:
    import torch.distributed as dist

    return gradients(dist.get_rank(), dist.get_world_size(), micro_batch)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-9 * value.abs().max().clamp(min=1e-12), name


def test_every_column_counts() -> None:
    """Otherwise the comparisons below would say nothing of it."""
    objective = needy()
    model = encoder(objective)
    batch, way = batch_of(model), exchange.make("auto", 0, 1)
    assert tuple(batch.extra) == COLUMNS

    def loss(changed: Batch) -> Tensor:
        features = model(changed.images, changed.texts, None, changed.for_towers)
        return step.total(step.loss_terms([objective], Pairs(features, way, changed.ids, changed.columns)))

    for name in COLUMNS:
        other = batch.extra | {name: batch.extra[name].flip(0)}
        changed = Batch(batch.images, batch.texts, batch.ids, batch.keys, (), other)
        assert (loss(changed) - loss(batch)).abs() > 1e-6, name


@pytest.mark.parametrize("micro_batch", [1, 2, 4, ROWS])
def test_cached_step_equals_plain_step(micro_batch: int) -> None:
    assert_equal(gradients(0, 1, micro_batch), gradients(0, 1, None))


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "micro_batch"), [(2, None), (2, 1), (2, 2)])
def test_ranks_equal_one_process(ranks: Any, size: int, micro_batch: int | None) -> None:
    expected = gradients(0, 1, None)
    for found in ranks(size).run(on_ranks, micro_batch):
        assert_equal(found, expected)


def calls(tower: torch.nn.Module) -> list[int]:
    """Rows of every pass of a tower from now on."""
    seen: list[int] = []
    tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


def test_features_are_what_the_towers_say_in_one_pass() -> None:
    model = encoder(needy()).eval()
    batch = batch_of(model)
    seen = calls(model.towers.visual), calls(model.towers.transformer)
    features = model(batch.images, batch.texts, None, batch.for_towers)
    assert seen == ([ROWS * 3], [ROWS * 6]), "further columns pass a tower with the pairs' own"
    assert_told_apart(model, batch, features.extra)
    torch.testing.assert_close(features.text, model.encode_text(batch.texts), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(features.image, model.encode_image(batch.images), rtol=1e-9, atol=1e-12)


def test_views_of_another_size_take_a_pass_of_their_own() -> None:
    model, seen = encoder(needy()).eval(), list[int]()

    def any_size(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.flatten(1)[:, :8].double()

    model.encode_image = any_size  # type: ignore[method-assign]
    batch = batch_of(model, view_size=(16, 16))
    features = model(batch.images, batch.texts, None, batch.for_towers)
    assert seen == [ROWS * 2, ROWS]
    assert_told_apart(model, batch, features.extra)
    assert torch.equal(features.image, any_size(batch.images))


def assert_told_apart(model: DualEncoder, batch: Batch, extra: dict[str, Tensor]) -> None:
    """Every column's features are those of its own rows."""
    assert extra.keys() == batch.for_towers.keys() == {"image_views", "text_views", "captions"}
    for name, column in batch.for_towers.items():
        encode = model.encode_image if name == "image_views" else model.encode_text
        assert extra[name].shape[:2] == column.shape[:2]
        for at in range(column.shape[1]):
            torch.testing.assert_close(extra[name][:, at], encode(column[:, at]), rtol=1e-9, atol=1e-12)


def test_the_pairs_own_texts_travel_first_and_alone() -> None:
    model = encoder(needy())
    batch, images, announced = batch_of(model), calls(model.towers.visual), []

    def announce(text: Tensor) -> Tensor:
        assert not images, "before the image tower"
        announced.append(text)
        return text * 1.0

    features = model(batch.images, batch.texts, announce, batch.for_towers)
    assert announced[0].shape == features.text.shape == (ROWS, model.towers.text_projection.shape[1])
    assert torch.equal(announced[0], features.text)


def test_a_batch_keeps_its_columns() -> None:
    batch = batch_of(encoder(needy()))
    for part, start in zip(batch.split(3), (0, 3, 6), strict=True):
        for name in COLUMNS:
            torch.testing.assert_close(
                part.extra[name], batch.extra[name][start : start + 3], rtol=0, atol=0, equal_nan=True
            )
    assert tuple(batch.to(CPU).extra) == COLUMNS
    assert set(batch.for_towers) | set(batch.columns) == set(COLUMNS)
    assert not set(batch.for_towers) & set(batch.columns)


def test_needs_follow_options() -> None:
    method = type(needy())
    found = wanted.of_objectives([method(method.Options(views=5)), method(method.Options())])
    assert (found.captions, found.image_views, found.text_views) == (3, 5, 5)
    assert {field.name for field in found.fields} == {"boxes", "label", "language", "score"}
    assert wanted.of_objectives([objectives.find("clip")(objectives.find("clip").Options())]) == Wanted()


def test_options_of_a_dotted_name_are_read_and_written(tmp_path: Path) -> None:
    """Else neither a file nor a run folder's own config.yaml could name them."""
    needy()
    path = tmp_path / "run.yaml"
    path.write_text("{train: {samples: 8}, data: {train: [synthetic:1024]}, objective: {name: toys.needy, views: 3}}")
    run = runfile.load(path, [])
    assert run.objective[0].options.views == 3
    path.write_text(runfile.dump(run))
    assert runfile.load(path, []) == run


def shard(path: Path, samples: int = 24) -> str:
    """Pictures with captions and every field that the objective needs, here and there without one."""
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "JPEG")
            meta = {"label": number % 5, "score": number / samples, "language": ("en", "de")[number % 2],
                    "boxes": [[0.1, 0.2, 0.3, number / samples]] * (number % 4),
                    "captions": [f"caption {number} in words {n}" for n in range(1 + number % 4)]}  # fmt: skip
            if number % 3 == 2:
                meta |= {"label": None, "score": None}
            for extension, content in (("jpg", image.getvalue()), ("json", json.dumps(meta).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def train(
    program: Any, folder: Path, ranks: int = 1, expect: int = 0, **options: Any
) -> tuple[str, list[dict[str, Any]]]:
    """The first rank's stderr, and the records."""
    run = yaml.safe_load((ROOT / "configs" / "debug.yaml").read_text())
    train = shard(folder / "a.tar")
    run |= {"name": "needy", "folder": str(folder / f"runs{ranks}"), "objective": {"name": "toys.needy"} | options}
    run["data"] = {"train": [train], "workers": 1}
    run["train"], run["optim"] = {"samples": 48, "global_batch": 8}, {"lr": 1e-3}
    run["log"] = {"every_steps": 1, "batch_digest": True}
    (folder / "needy.yaml").write_text(yaml.safe_dump(run))
    paths = {"PYTHONPATH": HERE}
    first, *_ = program.run_ranks(ranks, "train", folder / "needy.yaml", variables=paths, expect=expect)
    return first.err, program.records(folder / f"runs{ranks}" / "needy")


@pytest.mark.slow
def test_a_run_with_every_need(program: Any, tmp_path: Path) -> None:
    _, alone = train(program, tmp_path)
    assert [record["step"] for record in alone] == [1, 2, 3, 4, 5, 6]
    assert alone[0]["terms"].keys() == {"clip", "views", "captions"}
    assert all(np.isfinite(record["loss"]) for record in alone)
    _, together = train(program, tmp_path, ranks=2)
    for one, two in zip(alone, together, strict=True):
        assert one["batch_digest"] == two["batch_digest"]
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-4)


@pytest.mark.slow
def test_what_the_data_cannot_give_ends_the_run_before_its_first_batch(program: Any, tmp_path: Path) -> None:
    told, records = train(program, tmp_path, expect=2, more="meta:lable")
    assert "none of the first 16 samples of data.train has 'lable'" in told
    assert "Traceback" not in told
    assert records == []


def test_a_need_that_nobody_knows_ends_the_run_before_its_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    method = type(needy())
    run = config.Run(
        data=config.Data(train=("synthetic:1024",)),
        train=config.Train(samples=8),
        objective=(config.Choice("toys.needy", method.Options(more="teacher")),),
    )
    monkeypatch.setattr(trainer, "build", lambda *args: pytest.fail("built"))
    with pytest.raises(UserError, match="objective Needy needs 'teacher', which no data can give; there are captions"):
        trainer.Training(run, World(0, 1, 0, CPU), {})
