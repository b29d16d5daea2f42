"""Where scale and bias start."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import pytest

from pretrain import config
from pretrain.errors import UserError
from pretrain.towers.head import Head, choose
from pretrain.towers.weights import Head as Loaded


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


@dataclass(frozen=True)
class SigLip(Clip):
    init_logit_scale: float = 10.0
    init_logit_bias: float | None = -10.0
    max_logit_scale: float = math.inf


def start(objective: Clip, loaded: Loaded | None = None, *more: Clip, **knobs: float) -> Head:
    return choose(config.Model(pretrained="start.pt" if loaded else None, **knobs), [objective, *more], loaded)


@pytest.fixture(autouse=True)
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "pretrain")
    return caplog


@pytest.mark.parametrize(("objective", "scale", "bias"), [(Clip(), 1 / 0.07, None), (SigLip(), 10.0, -10.0)])
def test_fresh_heads_are_the_objectives(
    objective: Clip, scale: float, bias: float | None, messages: pytest.LogCaptureFixture
) -> None:
    assert start(objective) == Head(math.log(scale), bias, math.log(objective.max_logit_scale))
    assert not messages.records


def test_d14_siglip_from_a_clip_checkpoint(messages: pytest.LogCaptureFixture) -> None:
    """open_clip starts such a run from bias 0 and scale 100, whose first loss is enormous."""
    head = start(SigLip(), Loaded(math.log(100), None))
    assert (head.log_scale, head.bias) == (math.log(10), -10.0)
    assert len(messages.records) == 1
    assert "trained without a bias" in messages.text


def test_siglip_from_a_siglip_checkpoint_keeps_both(messages: pytest.LogCaptureFixture) -> None:
    head = start(SigLip(), Loaded(4.7215, -12.9))
    assert (head.log_scale, head.bias) == (4.7215, -12.9)
    assert not messages.records


def test_clip_from_a_siglip_checkpoint_drops_the_bias(messages: pytest.LogCaptureFixture) -> None:
    head = start(Clip(), Loaded(4.2, -12.9))
    assert (head.log_scale, head.bias) == (4.2, None)
    assert len(messages.records) == 1
    assert "dropped" in messages.text


def test_clip_from_a_clip_checkpoint_keeps_the_scale(messages: pytest.LogCaptureFixture) -> None:
    assert start(Clip(), Loaded(4.0, None)).log_scale == 4.0
    assert start(Clip(), Loaded(None, None)).log_scale == math.log(1 / 0.07)
    assert not messages.records


def test_d15_a_loaded_scale_above_the_ceiling_is_kept(messages: pytest.LogCaptureFixture) -> None:
    """open_clip clamps it to 100 in the first step and says nothing."""
    head = start(Clip(), Loaded(4.7215, None))
    assert head.log_scale == head.max_log_scale == 4.7215
    assert len(messages.records) == 1
    assert "ceiling is raised" in messages.text


def test_the_users_values_win() -> None:
    loaded = Loaded(4.0, -3.0)
    assert start(SigLip(), loaded, logit_scale=20.0).log_scale == math.log(20)
    assert start(SigLip(), loaded, logit_scale=20.0).bias == -3.0
    assert start(SigLip(), loaded, logit_bias=-5.0) == Head(4.0, -5.0, math.inf)
    assert start(SigLip(), Loaded(4.0, None), logit_bias=-5.0).log_scale == math.log(10)
    assert start(Clip(), logit_scale_max=50.0).max_log_scale == math.log(50)
    assert start(Clip(), logit_scale=200.0).max_log_scale == math.log(200)


def test_nothing_is_said_of_values_the_user_chose(messages: pytest.LogCaptureFixture) -> None:
    start(SigLip(), Loaded(4.0, None), logit_scale=20.0, logit_bias=-5.0)
    assert not messages.records


def test_the_users_ceiling_lowers_a_loaded_scale_and_says_so(messages: pytest.LogCaptureFixture) -> None:
    head = start(Clip(), Loaded(math.log(112), None), logit_scale_max=100.0)
    assert head.log_scale == head.max_log_scale == math.log(100)
    assert "lowers the logit scale from 112" in messages.text


def test_several_objectives() -> None:
    """The one with a bias speaks for all; the lowest ceiling counts."""
    assert start(Clip(max_logit_scale=math.inf), None, SigLip()).bias == -10.0
    assert start(SigLip(), None, Clip()).max_log_scale == math.log(100)


@pytest.mark.parametrize(
    ("knobs", "says"), [({"logit_bias": -1.0}, "no bias"), ({"logit_scale": 20.0, "logit_scale_max": 10.0}, "exceeds")]
)
def test_contradictions_are_refused(knobs: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        start(Clip(), None, **knobs)
