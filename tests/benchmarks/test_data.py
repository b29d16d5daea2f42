"""The data benchmark at a tiny size: both loaders load, and its records can be read by a program."""

import json
import math

import numpy as np
import pytest

from benchmarks import data, data_memory, data_shards, data_sides
from pretrain.errors import UserError


@pytest.fixture(scope="module")
def pinned():
    try:
        return data_sides.pinned_webdataset()
    except UserError as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
def test_data(tmp_path, pinned):
    data.main(["--rounds", "1", "--sizes", "300x230", "--workers", "1", "--samples", "64", "--memory", "1000",
               "--threads", "1", "--photos", "3", "--out", str(tmp_path)])  # fmt: skip
    content = json.loads((tmp_path / "data_cpu.json").read_text())
    found = {}
    for record in content["records"]:
        assert record["unit"] in {"samples/s", "1", "B/s", "B"}
        assert math.isfinite(record["value"]), record
        found.setdefault(record["case"], {})[record["metric"]] = record["value"]
    speed = found["300x230 workers=1"]
    assert min(speed.values()) > 0
    assert speed["ratio_per_cpu_second"] == pytest.approx(
        speed["samples_per_cpu_second"] / speed["open_clip_samples_per_cpu_second"]
    )
    for size in ("300x230", data.HARDEST):
        pixels = found[f"{size} pixels"]
        assert pixels["feature_cosine_min"] > 0.999
        assert pixels["centred_feature_cosine_min"] > 0.98
    assert found["300x230 pixels"]["pixel_error_max"] <= 2, "nothing is scaled"
    assert found["640x480 pixels"]["pixel_error_mean"] > 0.1, "everything is"
    assert found["index of 4 shards"]["bytes_per_second"] > 0
    memory = found["memory over 1000 samples of distinct words"]
    assert memory["worker_bytes_at_100"] > 1 << 20
    assert memory["trainer_growth_of_last_half"] == memory["trainer_bytes_at_1000"] - memory["trainer_bytes_at_500"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--samples", "100", "--workers", "1"], "--samples 100 must be a multiple of 64 with --workers 1"),
        (["--samples", "64", "--workers", "2"], "--samples 64 must be a multiple of 128 with --workers 2"),
        (["--memory", "1500"], "--memory 1500 must be a multiple of 1000"),
        (["--sizes", "512"], "--sizes 512 must be WIDTHxHEIGHT"),
        (["--sizes", "0x3"], "--sizes 0x3 must be WIDTHxHEIGHT"),
    ],
)
def test_mistakes(arguments, says, tmp_path):
    with pytest.raises(UserError, match=says):
        data.main([*arguments, "--out", str(tmp_path)])


def test_no_two_samples_share_a_word():
    words = [word for number in range(2000) for word in data_memory.distinct(number).split()]
    assert len(words) == len(set(words)) == 2000 * data_memory.WORDS


def test_captions_are_of_short_words():
    words = data_shards.caption(np.random.default_rng(0)).split()
    assert words[:3] == ["a", "photo", "of"]
    assert len(words) == 10
