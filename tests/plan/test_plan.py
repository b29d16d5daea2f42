"""`pretrain plan` as a user meets it, and what must hold between its numbers."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pretrain import cli, runfile
from pretrain.errors import UserError
from pretrain.plan import gpus, picture, report
from pretrain.plan.case import Question
from pretrain.plan.feed import DECODED, cores
from pretrain.plan.pace import pace
from pretrain.plan.predict import advice, engines, exchanges, largest_micro_batch, predict
from pretrain.plan.scaling import SIZES, same_batch, same_share
from pretrain.plan.towers import Sizes
from pretrain.plan.trace import trace
from pretrain.plan.work import Work
from pretrain.verbs_plan import Options, split, spread

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")
LARGE = str(ROOT / "configs" / "clip_vit_l14_datacomp_xlarge.yaml")
SMALLER = ("--model.name", "ViT-B-32", "--model.grad-checkpointing", "off", "--train.micro-batch", "None")
"""A large recipe's batch with towers that are traced in a second."""


@cache
def work_of(*knobs: str) -> Work:
    return trace(runfile.load(LARGE, [*SMALLER, *knobs]))


def ask(count: int = 64, kind: str = "h100", *knobs: str, traced: tuple[str, ...] = (), **more: Any) -> Question:
    return Question(runfile.load(LARGE, [*SMALLER, *traced, *knobs]), work_of(*traced), gpus.find(kind), count, **more)


def test_the_parts_of_a_step_add_up() -> None:
    found = predict(ask())
    assert found.step_s == pytest.approx(sum(dataclasses.astuple(found.pace)))
    assert found.samples_per_s == pytest.approx(found.gpus * found.pairs_per_gpu / found.step_s)
    assert 0.1 < found.mfu < 0.6


def test_given_efficiency_is_the_towers() -> None:
    asked = ask(efficiency=0.5)
    towers = pace(asked, "gather")
    assert towers.image + towers.text == pytest.approx(asked.work.flops * asked.rows / (0.5 * 989e12), rel=0.01)


def test_memory_decides_the_pass() -> None:
    roomy, narrow = ask(64, "h200"), ask(64, "a100-40")
    assert largest_micro_batch(roomy) > largest_micro_batch(narrow) > 0
    for asked in (roomy, narrow):
        largest = largest_micro_batch(asked)
        assert predict(asked.with_run(micro_batch=largest)).fits
        assert largest == asked.rows or not predict(asked.with_run(micro_batch=largest + 1)).fits


def test_checkpointing_takes_less_memory_and_more_time() -> None:
    plain, again = (ask(512, traced=("--model.grad-checkpointing", how)) for how in ("off", "all"))
    one, two = (predict(asked.with_run(micro_batch=asked.rows)) for asked in (plain, again))
    assert two.memory.activations < 0.5 * one.memory.activations
    assert two.pace.image > 1.1 * one.pace.image
    assert two.mfu < one.mfu


def test_parts_run_the_towers_forward_twice() -> None:
    whole = ask(64).with_run(micro_batch=None)  # passes long enough that nobody waits for the host's calls
    parts = whole.with_run(micro_batch=whole.rows // 4)
    one, two = predict(whole), predict(parts)
    assert two.parts == 4
    assert two.memory.activations < 0.4 * one.memory.activations
    assert 1.25 < two.pace.image / one.pace.image < 1.4
    assert two.pace.exchange > one.pace.exchange  # no tower is left for its messages to hide behind


def test_slower_links_show() -> None:
    near, far = (predict(ask(64, kind)) for kind in ("h100", "h100-pcie"))
    assert far.pace.engine > near.pace.engine


def test_every_way_is_listed_and_advice_names_one_with_its_reason() -> None:
    assert [way.name for way in exchanges(ask())] == ["gather", "streamed", "ring", "bidirectional", "hierarchical"]
    assert [way.name for way in engines(ask())] == ["ddp", "fsdp2", *(f"deepspeed zero{stage}" for stage in (1, 2, 3))]
    said = advice(ask())
    assert said[0].startswith("engine ddp: ")
    assert said[2].startswith("exchange gather: ")


def test_what_ddp_cannot_hold_goes_to_fsdp2() -> None:
    heavy = dataclasses.replace(work_of(), sizes=Sizes((1,), ((10**8,),) * 30))
    asked = dataclasses.replace(ask(64, "a100-40"), work=heavy)
    assert advice(asked)[0].startswith("engine fsdp2: ")
    assert "ddp does not fit" in advice(asked)[0]
    assert advice(dataclasses.replace(asked, gpu=gpus.find("rtx4090"), gpus=1).under("single"))[0].startswith(
        "does not fit: a pass of one pair takes "
    )


def test_scaling_covers_8_to_1024_and_the_picture_shows_it() -> None:
    asked = ask(64)
    assert [point.prediction.gpus for point in same_share(asked)] == list(SIZES)
    batch = same_batch(asked)
    assert max(point.efficiency for point in batch) == 1
    root = ElementTree.fromstring(picture.svg(report.plan(asked)))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 4
    assert "predicted" in "".join(root.itertext())


def test_the_cpu_preset_is_that_of_the_benchmark() -> None:
    """Both measured models, within 10 %: their rates were fitted to it."""
    records = json.loads((ROOT / "benchmarks" / "results" / "step_cpu.json").read_text())["records"]
    for name in ("digits-vit", "debug-tiny"):
        found = [one["value"] for one in records if one["case"] == f"{name} B=128 fp32, causal"
                 and one["metric"] == "samples_per_s"]  # fmt: skip
        run = runfile.load(DIGITS, ["--model.name", name, "--train.global-batch", "128"])
        predicted = predict(Question(run, trace(run, "cpu"), gpus.CPU, 1)).samples_per_s
        assert predicted == pytest.approx(found[0], rel=0.1)


def test_the_decode_rate_is_that_of_the_benchmark() -> None:
    records = json.loads((ROOT / "benchmarks" / "results" / "data_cpu.json").read_text())["records"]
    for stored, rate in DECODED.items():
        found = [one["value"] for one in records if one["case"] == f"{stored} workers=2"
                 and one["metric"] == "samples_per_cpu_second"]  # fmt: skip
        assert rate == pytest.approx(found[0], rel=0.1)
        assert cores(10 * rate, stored) == 10


def plan(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.run(["plan", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_verb_prints_a_table_json_and_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said, _ = plan(capsys, DIGITS, "--gpus", "8", "--gpu", "a100", "--picture", str(tmp_path / "scaling.svg"))
    assert code == 0
    for part in ("Every number below is predicted", "Memory of a GPU", "Time of a step", "GPU-hours", "CPU cores"):
        assert part in said
    assert ElementTree.parse(tmp_path / "scaling.svg")
    code, said, _ = plan(capsys, DIGITS, "--gpus=8", "--price", "2", "--train.samples", "3600000", "--json")
    found = json.loads(said)
    assert code == 0
    assert found["label"] == "predicted"
    assert found["run"]["usd"] == pytest.approx(2 * found["run"]["gpu_hours"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--gpus", "48"], "--gpus 48 does not divide train.global_batch 64; nearest: 32 or 64"),
        (["--gpu", "h10"], "--gpu h10: no such GPU is known; did you mean h100"),
        (["--gpus", "8", "--nodes", "3"], "--gpus 8 is not --nodes 3 times any"),
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--efficiency", "40"], "--efficiency 40.0 must lie in (0, 1]"),
        (["--price", "-1"], "--price -1.0 must not be negative"),
        (["--picture", "/nowhere/x.svg"], "--picture /nowhere/x.svg: there is no folder /nowhere"),
        (["--gpuz", "8"], "gpuz"),
        (["--gpus", "8", "--engine", "single"], "engine single does not carry 8 GPUs"),
    ],
)
def test_wrong_input_is_one_line_and_2(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    code, out, err = plan(capsys, DIGITS, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_nodes_and_gpus() -> None:
    asked = ((64, None, None), (64, 16, None), (None, 4, None), (None, None, None), (4, None, None), (None, 2, 4))
    found = [spread(Options(gpus=gpus, nodes=nodes, gpus_per_node=each)) for gpus, nodes, each in asked]
    assert found == [(64, 8), (64, 4), (32, 8), (8, 8), (4, 4), (8, 4)]
    with pytest.raises(UserError, match="--gpus 64 is not --nodes 4 times --gpus-per-node 8"):
        spread(Options(gpus=64, nodes=4, gpus_per_node=8))
    assert split(["--gpus", "8", "--optim.betas", "0.9", "0.95", "--gpu=h200"]) == (
        ["--gpus", "8", "--gpu=h200"], ["--optim.betas", "0.9", "0.95"],
    )  # fmt: skip
