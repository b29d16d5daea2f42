"""Each optimizer against its formula written out in fp64, and its state by name: saved, loaded, gone on with."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain import checkpoint_files as files
from pretrain import optim
from pretrain.config import Optim
from pretrain.errors import UserError

NAMES = ("adamw", "stable_adamw", "lion", "lamb", "muon", "adamw8bit")
LR, DECAY, BETAS, EPS = 0.01, 0.3, (0.8, 0.9), 1e-6


class Nested(nn.Module):
    """Matrices inside numbered layers, a table, vectors, a scalar; one matrix is large enough for 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.layers = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 8))
        self.token_embedding = nn.Embedding(7, 8)
        self.unused = nn.Parameter(torch.randn(3, 3))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 64] -> []"""
        logits: Tensor = self.visual.layers(images) @ self.token_embedding.weight.t()
        return (logits * self.logit_scale).square().mean()


def made(name: str, model: nn.Module, **knobs: Any) -> torch.optim.Optimizer:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    return optim.build(model, Optim(name=name, **{"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS} | knobs))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps [first, last), each with a batch and a rate of its own."""
    for step in range(first, last):
        torch.manual_seed(step)
        optim.set_rate(optimizer, LR / (1 + step))
        model(torch.randn(5, 64)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_state_by_name_goes_on_bitwise(name: str, tmp_path: Path) -> None:
    """Through the file that a checkpoint holds, into an optimizer whose groups come in another order."""
    model = Nested()
    optimizer = made(name, model)
    steps(model, optimizer, 0, 3)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = optim.moments(optimizer, model)
    assert not any("unused" in key for key in state)
    files.write_tensors(tmp_path / "optimizer.safetensors", state)
    steps(model, optimizer, 3, 6)

    torch.manual_seed(99)
    other = Nested()
    other.load_state_dict(weights)
    again = made(name, other)
    steps(other, again, 0, 1)  # what it had is forgotten
    other.load_state_dict(weights)
    again.param_groups.reverse()
    optim.load_moments(again, other, files.read_tensors(tmp_path / "optimizer.safetensors"))
    taken = optim.moments(again, other)
    stored = files.read_tensors(tmp_path / "optimizer.safetensors")
    assert taken.keys() == stored.keys()
    assert all(torch.equal(value, stored[key]) for key, value in taken.items())
    steps(other, again, 3, 6)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_without_its_state_an_optimizer_goes_another_way(name: str) -> None:
    """So that the test above could fail."""
    model = Nested()
    optimizer = made(name, model)
    steps(model, optimizer, 0, 3)
    other = Nested()
    other.load_state_dict(model.state_dict())
    steps(model, optimizer, 3, 4)
    steps(other, made(name, other), 3, 4)
    assert not all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def run(name: str, shape: tuple[int, ...], grads: list[Tensor], **knobs: Any) -> tuple[Tensor, Tensor]:
    """A weight, fp64, before and after steps with given gradients."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    model = One()
    optimizer, before = made(name, model, **knobs), model.weight.detach().clone()
    for grad in grads:
        model.weight.grad = grad.clone()
        optimizer.step()
    return before, model.weight.detach()


def gradients(shape: tuple[int, ...], spike: float = 1.0) -> list[Tensor]:
    found = [torch.randn(shape, dtype=torch.float64) for _ in range(6)]
    found[3] *= spike
    return found


def clipped_adamw(weight: Tensor, grads: list[Tensor]) -> Tensor:
    """Algorithm 2 of arXiv:2304.13013, line by line."""
    weight, v, u = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for t, g in enumerate(grads, start=1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in BETAS)
        v, u = b1 * v + (1 - b1) * g, b2 * u + (1 - b2) * g**2
        rms = (g**2 / torch.maximum(u, torch.tensor(EPS**2))).mean().sqrt()
        eta = LR / max(1.0, rms.item())
        weight = weight - eta * DECAY * weight - eta * v / (u.sqrt() + EPS)
    return weight


@pytest.mark.parametrize("spike", [1.0, 50.0])
def test_stable_adamw_is_algorithm_2(spike: float) -> None:
    grads = gradients((6, 5), spike)
    before, after = run("stable_adamw", (6, 5), grads)
    assert torch.allclose(after, clipped_adamw(before, grads), rtol=1e-12, atol=1e-14)


def test_stable_adamw_holds_a_spike_back_and_is_adamw_bitwise_else() -> None:
    calm, wild = [torch.full((4, 3), 1e-3, dtype=torch.float64)] * 4, gradients((4, 3), 100.0)[:4]
    for grads, same in ((calm, True), (wild, False)):
        ends = []
        for name, count in (("adamw", 3), ("adamw", 4), ("stable_adamw", 3), ("stable_adamw", 4)):
            torch.manual_seed(1)
            ends.append(run(name, (4, 3), grads[:count], weight_decay=0.0, eps=1e-2)[1])
        plain, stable = (ends[1] - ends[0]).norm(), (ends[3] - ends[2]).norm()
        assert torch.equal(ends[3], ends[1]) == same
        assert stable == plain if same else stable < 0.6 * plain


def test_lion_is_its_formula() -> None:
    """Algorithm 2 of arXiv:2302.06675."""
    grads = gradients((6, 5))
    weight, after = run("lion", (6, 5), grads)
    m = torch.zeros_like(weight)
    for g in grads:
        weight = weight - LR * ((BETAS[0] * m + (1 - BETAS[0]) * g).sign() + DECAY * weight)
        m = BETAS[1] * m + (1 - BETAS[1]) * g
    assert torch.allclose(after, weight, rtol=1e-12)


def test_lamb_is_its_formula_and_clips_nothing_by_itself() -> None:
    """Algorithm 2 of arXiv:1904.00962; gradients of norm far above 1 must keep their size in the moments."""
    grads = [100 * grad for grad in gradients((6, 5), 7.0)]
    weight, after = run("lamb", (6, 5), grads)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, g in enumerate(grads, start=1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        r = (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS) + DECAY * weight
        weight = weight - LR * (weight.norm() / r.norm()) * r
    assert torch.allclose(after, weight, rtol=1e-9)


def test_muon_turns_matrices_into_orthogonal_steps_of_adamws_size() -> None:
    model = Nested()
    optimizer = made("muon", model, weight_decay=0.0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    hidden = {"visual.layers.0.weight", "visual.layers.2.weight"}
    for name in hidden:
        moved = model.get_parameter(name).detach() - before[name]
        values = torch.linalg.svdvals(moved / (0.2 * LR * math.sqrt(max(moved.shape))))
        assert values.min() > 0.6, name
        assert values.max() < 1.3, name
    state = optim.moments(optimizer, model)
    assert {key.split("/")[1] for key in state if key.startswith("momentum_buffer/")} == hidden
    assert "exp_avg/token_embedding.weight" in state


def test_muon_leaves_the_rest_to_adamw_bitwise() -> None:
    one, two = Nested(), Nested()
    two.load_state_dict(one.state_dict())
    steps(one, made("muon", one), 0, 1)
    steps(two, made("adamw", two), 0, 1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]) == (".layers." not in name or value.ndim < 2), name


def test_muon_keeps_its_parts_when_its_state_or_groups_change() -> None:
    model = Nested()
    optimizer = made("muon", model)
    steps(model, optimizer, 0, 2)
    twin = Nested()
    twin.load_state_dict(model.state_dict())
    again = made("muon", twin)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    group = next(group for group in again.param_groups if len(group["params"]) > 1 and not group["hidden"])
    last = group["params"].pop()
    again.add_param_group({**group, "params": [last]})
    steps(model, optimizer, 2, 4)
    steps(twin, again, 2, 4)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())


def test_8_bit_moments_are_small_and_near() -> None:
    model, plain = Nested(), Nested()
    plain.load_state_dict(model.state_dict())
    optimizer = made("adamw8bit", model)
    steps(model, optimizer, 0, 3)
    steps(plain, made("adamw", plain), 0, 3)
    state = optim.moments(optimizer, model)
    assert state["state1/visual.layers.0.weight"].dtype == torch.uint8
    assert state["state1/logit_scale"].dtype == torch.float32
    assert state["step/logit_scale"] == 3
    for name, value in model.state_dict().items():
        if not name.startswith("unused"):
            assert (value - plain.state_dict()[name]).abs().max() < 0.2 * LR, name


def test_8_bit_moments_without_the_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optim.name adamw8bit needs bitsandbytes.*pip install 'pretrain\[bitsandb"):
        optim.build(Nested(), Optim(name="adamw8bit"))


@pytest.mark.parametrize("name", ["stable_adamw", "muon"])
def test_a_closure_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="takes no closure"):
        made(name, Nested()).step(lambda: 0.0)  # type: ignore[arg-type, return-value]
