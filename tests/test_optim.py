"""Parameter groups, schedules against open_clip's formulas, moments by name, gradient norms and clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pretrain import optim
from pretrain.config import Data, Optim, Run, Train
from pretrain.errors import UserError


class Trunk(nn.Module):
    """A tower in timm's manner."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 6))
        self.fc = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.proj = nn.Parameter(torch.randn(6, 5))


class Dual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(7, 6)
        self.ln_matrix = nn.Parameter(torch.randn(2, 2))
        self.text_projection = nn.Parameter(torch.randn(6, 5))
        self.unused = nn.Parameter(torch.randn(3, 3))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self) -> torch.Tensor:
        image = self.visual.trunk.norm(self.visual.trunk.fc(self.visual.trunk.pos_embed)) @ self.visual.proj
        text = self.token_embedding.weight @ self.text_projection
        return (image.mean(1) @ text.t() * self.logit_scale + self.logit_bias).square().mean() + self.ln_matrix.sum()


def tower_of(name: str) -> str:
    if name in ("logit_scale", "logit_bias"):
        return "head"
    return "image" if name.startswith("visual.") else "text"


def names(optimizer: torch.optim.Optimizer, model: nn.Module, decay: float) -> set[str]:
    chosen = {id(p) for g in optimizer.param_groups if g["weight_decay"] == decay for p in g["params"]}
    return {name for name, param in model.named_parameters() if id(param) in chosen}


def test_no_decay_for_vectors_norms_scale_bias_and_what_towers_ask_for() -> None:
    model = Dual()
    optimizer = optim.build(model, Optim(weight_decay=0.2, betas=(0.9, 0.95), eps=1e-7))
    decayed = {"visual.trunk.fc.weight", "visual.proj", "token_embedding.weight", "text_projection", "unused"}
    assert names(optimizer, model, 0.2) == decayed
    assert names(optimizer, model, 0.0) == {name for name, _ in model.named_parameters()} - decayed
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-7


def test_groups_of_a_real_open_clip_model() -> None:
    from pretrain.compat import open_clip

    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8},
        text_cfg={"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1},
    )
    spared = optim.undecayed(model)
    assert {"positional_embedding", "visual.positional_embedding", "visual.class_embedding", "logit_scale"} <= spared
    kept = {name for name, _ in model.named_parameters()} - spared
    assert {"token_embedding.weight", "visual.conv1.weight", "visual.proj", "text_projection"} <= kept
    assert not any("ln" in name or "bias" in name for name in kept)


def test_frozen_parameters_are_left_out() -> None:
    model = Dual()
    model.visual.requires_grad_(False)
    held = {id(p) for g in optim.build(model, Optim()).param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    model.requires_grad_(False)
    with pytest.raises(UserError, match="every parameter is frozen"):
        optim.build(model, Optim())


def open_clip_rate(schedule: str, step: int, warmup: int, steps: int, decay: int, lr: float, end: float) -> float:
    """open_clip_train/scheduler.py's three functions, written out, and linear; cosine there always ends at 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        return end + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * (lr - end)
    if schedule == "linear":
        return end + (1 - (step - warmup) / (steps - warmup)) * (lr - end)
    if step < steps - decay:
        return lr
    return (1 - (step - (steps - decay)) / decay) * (lr - end) + end


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("end", [0.0, 1e-4])
def test_schedules_equal_open_clips_at_every_step(schedule: Any, warmup: int, end: float) -> None:
    batch, steps, decay = 48, 31, 9 if schedule == "wsd" else 0
    options = Optim(lr=3e-3, schedule=schedule, warmup_samples=warmup * batch, decay_samples=decay * batch, lr_end=end)
    for step in range(steps):
        expected = open_clip_rate(schedule, step, warmup, steps, decay, 3e-3, end)
        found = optim.learning_rate(options, step * batch, steps * batch, batch)
        assert found == pytest.approx(expected, rel=1e-12), step
    if schedule != "constant":
        assert optim.learning_rate(options, steps * batch, steps * batch, batch) == pytest.approx(end, abs=1e-18)


def test_schedule_is_the_same_in_samples_for_another_batch() -> None:
    options = Optim(lr=1.0, warmup_samples=100, schedule="cosine")
    rates = [optim.learning_rate(options, 600, 1000, batch) for batch in (1, 10, 100)]
    assert rates[0] == rates[1] == rates[2]
    assert optim.learning_rate(options, 96, 1000, 32) == 1.0


@pytest.mark.parametrize("decay", [0, 300])
def test_rsqrt_goes_on_from_the_warm_up_and_ends_linearly(decay: int) -> None:
    end = 0.02 if decay else 0.0
    options = Optim(lr=0.8, schedule="rsqrt", warmup_samples=100, decay_samples=decay, lr_end=end)

    def rate(samples: int) -> float:
        return optim.learning_rate(options, samples, 1600, 10)

    assert [rate(0), rate(40), rate(90), rate(100)] == pytest.approx([0.08, 0.4, 0.8, 0.8])
    assert [rate(400), rate(900)] == pytest.approx([0.4, 0.8 / 3])
    if not decay:
        assert rate(1590) == pytest.approx(0.8 / math.sqrt(15.9))
        return
    top = 0.8 / math.sqrt(13)
    assert [rate(1300), rate(1450), rate(1600)] == pytest.approx([top, (top + end) / 2, end])


@pytest.mark.parametrize(("rule", "factor"), [(None, 1.0), ("linear=64", 4.0), ("sqrt=64", 2.0), ("sqrt=1024", 0.5)])
def test_the_rate_scales_to_the_batch_on_request(rule: str | None, factor: float) -> None:
    """All of the curve, its end too; by default not a bit of it."""
    options = Optim(lr=3e-3, lr_end=1e-4, warmup_samples=512, lr_scaling=rule)
    plain = Optim(lr=3e-3, lr_end=1e-4, warmup_samples=512)
    for samples in range(0, 4096, 256):
        expected = optim.learning_rate(plain, samples, 4096, 256) * factor
        assert optim.learning_rate(options, samples, 4096, 256) == pytest.approx(expected, rel=1e-12)
    assert optim.learning_rate(options, 4096, 4096, 256) == pytest.approx(1e-4 * factor)


def test_the_scaled_rate_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pretrain")
    optim.tell(Optim(), 512)
    assert not caplog.messages
    optim.tell(Optim(lr=1e-3, lr_scaling="linear=256"), 512)
    assert caplog.messages == ["optim.lr 0.001 becomes 0.002: optim.lr_scaling linear=256, train.global_batch 512"]


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"lr_scaling": "linear"}, r"optim.lr_scaling 'linear' must be 'linear=B' or 'sqrt=B'"),
        ({"lr_scaling": "sqrt=0"}, r"optim.lr_scaling 'sqrt=0' must be"),
        ({"layer_decay": 0.0}, r"optim.layer_decay 0.0 must lie in \(0, 1\]"),
        ({"layer_decay": 1.5}, r"optim.layer_decay 1.5 must lie in \(0, 1\]"),
        ({"image_lr": 0.0}, r"optim.image_lr 0.0 must be positive; to freeze a tower, lock it"),
        ({"text_lr": -1.0}, r"optim.text_lr -1.0 must be positive"),
        ({"text_lr": math.inf}, r"optim.text_lr inf must be a finite number"),
        ({"schedule": "rsqrt"}, r"optim.warmup_samples 0 must be positive with optim.schedule rsqrt"),
        ({"schedule": "rsqrt", "warmup_samples": 8, "lr_end": 1e-5}, r"optim.lr_end 1e-05 is never reached"),
        ({"schedule": "constant", "lr_end": 1e-5}, r"optim.lr_end 1e-05 is never reached by optim.schedule constant"),
        ({"schedule": "rsqrt", "warmup_samples": 8, "decay_samples": -1}, r"optim.decay_samples -1 must not be neg"),
        ({"schedule": "linear", "decay_samples": 9}, r"optim.decay_samples 9 belongs to optim.schedule wsd and rsqrt"),
    ],
)
def test_knobs_that_cannot_be_are_refused(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Run(data=Data(train=("synthetic:1024",)), train=Train(samples=64, global_batch=8), optim=Optim(**knobs))


def test_8_bit_moments_of_pieces_are_refused() -> None:
    with pytest.raises(UserError, match=r"optim.name adamw8bit cannot update weights that engine fsdp2 has cut"):
        Run(
            data=Data(train=("synthetic:1024",)), engine="fsdp2", train=Train(samples=64), optim=Optim(name="adamw8bit")
        )


def test_schedule_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"warmup_samples 80 .* exceed the run's 60 samples"):
        optim.learning_rate(Optim(warmup_samples=80), 0, 60, 10)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_moments_round_trip_bitwise_whatever_the_order() -> None:
    model = Dual()
    optimizer = optim.build(model, Optim(lr=0.01))
    steps(model, optimizer, 3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    saved = {k: v.clone() for k, v in optim.moments(optimizer, model).items()}
    assert "exp_avg/visual.proj" in saved
    assert "exp_avg_sq/logit_scale" in saved
    assert saved["step/visual.proj"] == 3
    assert not any("unused" in name for name in saved)
    steps(model, optimizer, 2)

    other = Dual()
    other.load_state_dict(weights)
    turned = torch.optim.AdamW(
        [{**g, "params": g["params"][::-1]} for g in optim.build(other, Optim(lr=0.01)).param_groups[::-1]]
    )
    optim.load_moments(turned, other, dict(reversed(saved.items())))
    assert all(torch.equal(v, saved[k]) for k, v in optim.moments(turned, other).items())
    steps(other, turned, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_moments_that_do_not_fit_are_refused() -> None:
    model = Dual()
    optimizer = optim.build(model, Optim())
    with pytest.raises(UserError, match=r"exp_avg/visual\.other: the model has no such trainable"):
        optim.load_moments(optimizer, model, {"exp_avg/visual.other": torch.zeros(1)})
    with pytest.raises(UserError, match=r"exp_avg/visual.proj: shape \[2\], parameter \[6, 5\]"):
        optim.load_moments(optimizer, model, {"exp_avg/visual.proj": torch.zeros(2)})


def test_loaded_moments_are_copies() -> None:
    model = Dual()
    optimizer = optim.build(model, Optim())
    steps(model, optimizer, 1)
    saved = {k: v.clone() for k, v in optim.moments(optimizer, model).items()}
    kept = {k: v.clone() for k, v in saved.items()}
    optim.load_moments(optimizer, model, saved)
    steps(model, optimizer, 1)
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


def test_grad_norms_by_tower() -> None:
    model = Dual().double()
    model().backward()
    norms = optim.grad_norms(model, tower_of)
    squares = {"image": 0.0, "text": 0.0, "head": 0.0}
    for name, param in model.named_parameters():
        if param.grad is not None:
            squares[tower_of(name)] += sum(x * x for x in param.grad.flatten().tolist())
    assert norms.image.item() == pytest.approx(math.sqrt(squares["image"]), rel=1e-12)
    assert norms.text.item() == pytest.approx(math.sqrt(squares["text"]), rel=1e-12)
    assert norms.total.item() == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-12)
    assert squares["head"] > 0


def test_grad_norms_without_gradients_and_in_half_precision() -> None:
    model = Dual()
    assert optim.grad_norms(model, tower_of).total.item() == 0.0
    model.visual.proj.data = model.visual.proj.data.bfloat16()
    model.visual.proj.grad = torch.full((6, 5), 3.0, dtype=torch.bfloat16)
    norms = optim.grad_norms(model, tower_of)
    assert norms.total.dtype == torch.float32
    assert norms.image.item() == pytest.approx(3 * math.sqrt(30), rel=1e-6)


@pytest.mark.parametrize(("share", "clipped"), [(0.5, True), (2.0, False)])
def test_clip_scales_to_the_norm_or_leaves_alone(share: float, clipped: bool) -> None:
    model = Dual()
    model().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norms = optim.grad_norms(model, tower_of)
    limit = norms.total.item() * share
    optim.clip(model, norms, limit)
    after = optim.grad_norms(model, tower_of).total.item()
    assert after == pytest.approx(limit if clipped else limit / share, rel=1e-5)
    for name, param in model.named_parameters():
        if param.grad is not None:
            assert torch.allclose(param.grad, before[name] * (share if clipped else 1.0), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fused_adamw_moments_round_trip_on_cuda() -> None:
    model = Dual().cuda()
    optimizer = optim.build(model, Optim(lr=0.01))
    assert optimizer.defaults["fused"]
    steps(model, optimizer, 2)
    weights, saved = model.state_dict(), {k: v.cpu() for k, v in optim.moments(optimizer, model).items()}
    other = Dual().cuda()
    other.load_state_dict(weights)
    again = optim.build(other, Optim(lr=0.01))
    optim.load_moments(again, other, saved)
    steps(model, optimizer, 2)
    steps(other, again, 2)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
