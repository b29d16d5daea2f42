"""The moving average: its formula, what it covers, evaluation with it, and going on bit for bit."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from pretrain.ema import Average
from pretrain.errors import UserError


def a_model() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[2].bias.requires_grad_(False)
    model.register_buffer("mask", torch.ones(2), persistent=False)
    return model


def train(model: nn.Module, steps: int) -> None:
    with torch.no_grad():
        for _ in range(steps):
            model(torch.randn(8, 4))
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(torch.randn_like(param))


def test_formula_in_double_precision() -> None:
    model = a_model()
    average = Average(model, 0.9)
    expected = {n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(5):
        train(model, 1)
        average.update(model)
        for name, param in model.named_parameters():
            if param.requires_grad:
                expected[name] = 0.9 * expected[name] + 0.1 * param.detach().double()
    for name, value in expected.items():
        assert average.state()[name].dtype == torch.float32
        assert torch.allclose(average.state()[name].double(), value, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(average.state()[name].double(), dict(model.named_parameters())[name].double())


def test_covers_trainable_parameters_and_saved_buffers() -> None:
    model = a_model()
    average = Average(model, 0.9)
    train(model, 2)
    average.update(model)
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert average.state().keys() == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"} | buffers
    for name in buffers:
        assert torch.equal(average.state()[name], model.state_dict()[name])


def test_is_kept_in_fp32_for_half_precision_weights() -> None:
    model = nn.Linear(2, 2).bfloat16()
    average = Average(model, 0.999)
    start = average.state()["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(model)
    moved = average.state()["weight"] - start
    assert moved.dtype == torch.float32
    assert torch.allclose(moved, torch.full((2, 2), 1e-3), rtol=0.02)
    with average.swap(model):
        assert model.weight.dtype == torch.bfloat16


def test_swap_gives_the_average_and_then_the_weights_back_bitwise() -> None:
    model = a_model()
    average = Average(model, 0.9)
    train(model, 3)
    average.update(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept = {k: v.clone() for k, v in average.state().items()}
    with contextlib.suppress(KeyError), average.swap(model):
        for name, value in kept.items():
            assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(model.state_dict()["2.bias"], before["2.bias"])
        with torch.no_grad():
            model[1].running_mean.add_(5.0)
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, kept[k]) for k, v in average.state().items())


def test_update_inside_a_swap_is_a_bug_that_shows() -> None:
    model = a_model()
    average = Average(model, 0.9)
    with average.swap(model), pytest.raises(AssertionError):
        average.update(model)


def test_going_on_is_bitwise() -> None:
    model, other = a_model(), a_model()
    average = Average(model, 0.99)
    train(model, 3)
    average.update(model)
    state = {k: v.clone() for k, v in average.state().items()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}

    other.load_state_dict(weights)
    resumed = Average(other, 0.99)
    resumed.load(state)
    for each, its in ((model, average), (other, resumed)):
        torch.manual_seed(1)
        train(each, 1)
        its.update(each)
    assert all(torch.equal(v, resumed.state()[k]) for k, v in average.state().items())
    assert all(not torch.equal(v, state[k]) for k, v in average.state().items())


def test_another_models_average_is_refused() -> None:
    average = Average(nn.Linear(2, 2), 0.9)
    with pytest.raises(UserError, match="bias"):
        average.load({"weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"weight: shape \[3, 2\], model \[2, 2\]"):
        average.load({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
