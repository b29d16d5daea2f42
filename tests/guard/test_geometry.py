"""Figures of features: against plain formulas, and the same for one process and two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from pretrain.guard.geometry import NAMES, measure
from pretrain.values import Features
from pretrain.world import World


def features(rows: int = 24, width: int = 6) -> Features:
    draw = torch.Generator().manual_seed(3)
    image = normalize(torch.randn(rows, width, generator=draw), dim=1)
    text = normalize(image + torch.randn(rows, width, generator=draw) + 0.3, dim=1)
    return Features(image, text, torch.tensor(7.0), torch.tensor(-2.0))


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def test_figures_are_their_formulas() -> None:
    found, given = measure(features(), world()), features()
    assert tuple(found) == NAMES
    image, text = given.image.double(), given.text.double()
    logits = 7 * image @ text.T - 2
    off = logits[~torch.eye(24, dtype=torch.bool)]
    assert found["positive_logit"] == pytest.approx(float(logits.diag().mean()), rel=1e-5)
    assert found["negative_logit"] == pytest.approx(float(off.mean()), rel=1e-5)
    assert found["negative_logit_std"] == pytest.approx(float(off.std(correction=0)), rel=1e-4)
    assert found["negative_logit_max"] == pytest.approx(float(off.max()), rel=1e-5)
    assert found["modality_gap"] == pytest.approx(float((image.mean(0) - text.mean(0)).norm()), rel=1e-5)
    assert found["alignment"] == pytest.approx(float((image - text).square().sum(1).mean()), rel=1e-5)
    for name, rows in (("image", image), ("text", text)):
        near = (-2 * torch.pdist(rows).square()).exp().mean().log()
        assert found[f"{name}_uniformity"] == pytest.approx(float(near), rel=1e-4)
        shares = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0))
        shares = shares / shares.sum()
        assert found[f"{name}_rank"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-4)


def test_a_collapsed_tower_has_rank_one_and_what_is_not_finite_has_none() -> None:
    line = normalize(torch.stack([torch.ones(32), torch.linspace(-1, 1, 32), torch.zeros(32)], 1), dim=1)
    flat = torch.tensor([[1.0, 0.0, 0.0]]).expand(32, 3) + torch.linspace(-1e-2, 1e-2, 32)[:, None] * torch.eye(3)[1]
    found = measure(Features(line, flat, torch.tensor(1.0)), world())
    assert found["text_rank"] == pytest.approx(1.0, abs=1e-3)
    broken = features().image.clone()
    broken[0, 0] = math.nan
    found = measure(Features(broken, features().text, torch.tensor(1.0)), world())
    assert math.isnan(found["image_rank"])


def on_rank() -> dict[str, float]:
    rank, size = dist.get_rank(), dist.get_world_size()
    given, share = features(), 24 // size
    mine = slice(rank * share, (rank + 1) * share)
    part = Features(given.image[mine], given.text[mine], given.logit_scale, given.logit_bias)
    return measure(part, world(rank, size))


@pytest.mark.ranks
def test_two_ranks_find_what_one_process_does(ranks: Any) -> None:
    """All but what is of pairs within a rank."""
    one, other = ranks(2).run(on_rank)
    assert one == other
    alone = measure(features(), world())
    for name in ("positive_logit", "modality_gap", "alignment", "image_rank", "text_rank"):
        assert one[name] == pytest.approx(alone[name], rel=1e-5), name
    assert one["negative_logit_max"] <= alone["negative_logit_max"]
