"""What tracing finds, against torch's own counter, published figures and the memory of real steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pretrain import config, engines, exchange, objectives, runfile, step
from pretrain.errors import UserError
from pretrain.model import build
from pretrain.plan import gpus
from pretrain.plan.case import Question
from pretrain.plan.footprint import footprint
from pretrain.plan.trace import sizes_of, trace
from pretrain.plan.work import Highest, Linear, Work
from pretrain.values import Batch
from pretrain.world import World

pytestmark = pytest.mark.slow

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
HF_TEXT = {"hf_model_name": "NAME", "hf_model_pretrained": False, "hf_tokenizer_name": "NAME", "context_length": 16}


def run_of(model: str, *more: str) -> config.Run:
    return runfile.load(None, ["--data.train", "synthetic:64", "--train.samples", "64", "--model.name", model, *more])


@cache
def traced(model: str, *more: str) -> Work:
    return trace(run_of(model, *more))


def shapes(run: config.Run) -> Any:
    chosen = [objectives.find(one.name)(one.options) for one in run.objective]
    return build(run.model, chosen, 0, torch.device("meta")).train()


def counted(run: config.Run, tower: str) -> tuple[int, int]:
    """FLOP of one row, forward and backward, by torch's counter on the meta device, in plain attention."""
    model = shapes(run)
    pixels = torch.empty(1, 3, *model.image_spec.size, device="meta")
    tokens = torch.zeros(1, int(model.towers.context_length), dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as forward, _a_mask_is_kept():
        found = model.towers.encode_image(pixels) if tower == "image" else model.towers.encode_text(tokens)
    with FlopCounterMode(display=False) as backward:
        found.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@contextmanager
def _a_mask_is_kept() -> Iterator[None]:
    """transformers asks a mask's values whether it can be left out, and shapes have none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_: False, raising=False)
        yield


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP"])
def test_flops_are_those_of_the_counter(name: str) -> None:
    """Towers of open_clip and of timm."""
    run, work = run_of(name), traced(name)
    for tower in (work.image, work.text):
        assert tower.model_flops == pytest.approx(counted(run, tower.name), rel=0.01), tower.name
    assert work.sizes.total == sum(param.numel() for param in shapes(run).towers.parameters())


def test_flops_are_those_that_open_clip_publishes() -> None:
    """docs/model_profile.csv of open_clip, GFLOP forward of image and text."""
    for name, image, text in (("ViT-B-32", 8.82, 5.96), ("ViT-B-16", 35.13, 5.96)):
        work = traced(name)
        assert work.image.model_flops[0] / 1e9 == pytest.approx(image, rel=0.01)
        assert work.text.model_flops[0] / 1e9 == pytest.approx(text, rel=0.01)


def test_channels_in_groups_cost_backward_twice_what_they_cost_forward() -> None:
    """Where torch's own counter says eight times; forward as open_clip publishes it, GFLOP."""
    forward, backward = traced("convnext_base").image.model_flops
    assert forward / 1e9 == pytest.approx(30.76, rel=0.01)
    assert backward == pytest.approx(2 * forward, rel=0.01)


def test_a_text_tower_of_transformers_is_traced(tmp_path: Path) -> None:
    bert = {"model_type": "bert", "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(bert | {"intermediate_size": 128}))
    text = {key: str(tmp_path / "bert") if value == "NAME" else value for key, value in HF_TEXT.items()}
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    described = tmp_path / "model.json"
    described.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    run = run_of(str(described))
    assert trace(run).text.model_flops == pytest.approx(counted(run, "text"), rel=0.01)


def test_what_is_computed_twice_costs_time_and_no_model_flops() -> None:
    plain, again = (trace(run_of("digits-vit", "--model.grad-checkpointing", how)) for how in ("off", "all"))
    assert again.flops == plain.flops
    more = again.image.whole.products.per_row / plain.image.whole.products.per_row
    assert 1.15 < more < 1.34  # at most a third: one more forward pass, up to what is needed last
    assert again.image.saved.per_row < 0.2 * plain.image.saved.per_row


def test_dropped_patches_are_not_paid_for() -> None:
    whole, half = (traced("ViT-B-32", *more) for more in ((), ("--model.patch-dropout", "0.5")))
    assert 0.45 < half.image.model_flops[0] / whole.image.model_flops[0] < 0.6  # all patches are embedded
    assert half.image.saved.per_row < 0.65 * whole.image.saved.per_row


def test_a_gpu_takes_norms_in_fp32_under_autocast() -> None:
    run = run_of("digits-vit", "--model.precision", "bf16")
    assert trace(run, "gpu").image.saved.per_row > trace(run, "cpu").image.saved.per_row


def test_a_peak_moves_with_the_rows() -> None:
    peak = Highest((Linear(100, 1), Linear(10, 10)))
    assert [peak.at(rows) for rows in (1, 10, 100)] == [101, 110, 1010]


def test_what_does_not_run_without_data_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(self: Any, image: torch.Tensor) -> torch.Tensor:
        return image * float(image.sum())

    monkeypatch.setattr("open_clip.CLIP.encode_image", looks)
    with pytest.raises(UserError, match=r"model.name debug-tiny: the image tower cannot be planned, since it does not"):
        trace(run_of("debug-tiny"))


CASES = {
    "fp32": (),
    "bf16": ("--model.precision", "bf16"),
    "checkpointing all": ("--model.grad-checkpointing", "all"),
    "every second": ("--model.grad-checkpointing", "every=2"),
    "selective": ("--model.grad-checkpointing", "selective"),
    "bf16, all": ("--model.precision", "bf16", "--model.grad-checkpointing", "all"),
    "in parts": ("--train.micro-batch", "16"),
    "siglip": ("--objective", "siglip"),
    "few rows": ("--train.global-batch", "8"),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_of_a_step_is_what_the_allocator_gives(case: str) -> None:
    """Everything that a step allocates at its fullest, within 10 %; weights, moments and the batch are there before."""
    run = run_of("digits-vit", "--train.global-batch", "64", *CASES[case])
    found = footprint(Question(run, trace(run, "cpu"), gpus.CPU, 1), "local")
    predicted = found.peak - found.weights - found.optimizer - found.batch
    assert predicted == pytest.approx(allocated(run, run.train.global_batch), rel=0.1)


def allocated(run: config.Run, rows: int) -> int:
    """Peak bytes of a second step, by the allocator's own record."""
    chosen = [objectives.find(one.name)(one.options) for one in run.objective]
    model = build(run.model, chosen, 0, CPU).train()
    engine = engines.find("single", 1)(model, run.optim, World(0, 1, 0, CPU), run.parallel)
    images = torch.zeros(rows, 3, *model.image_spec.size, dtype=torch.uint8)
    texts = torch.ones(rows, int(model.towers.context_length), dtype=torch.int64)
    batch, columns = Batch(images, texts, torch.arange(rows), ("",) * rows), exchange.make("local", 0, 1)

    def call() -> None:
        if run.train.micro_batch:
            step.cached_step(engine, chosen, columns, batch, run.train.micro_batch)
        else:
            step.plain_step(engine, chosen, columns, batch)

    call()
    engine.step(1e-4, None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    level = most = 0
    for _, size in changes:
        level += size
        most = max(most, level)
    return most


def test_blocks_are_those_that_are_gathered_on_their_own() -> None:
    sizes = sizes_of(shapes(run_of("ViT-B-32")).towers)
    assert len(sizes.blocks) == 24 + 1  # and the token embedding
    assert sizes.largest_units > 49408 * 512
