"""Scripts and commands as golden files, options that are refused, and a launcher that never imports torch.

`python tests/launch/test_render.py` writes the golden files anew.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import cli, errors, flags
from pretrain.config import Run
from pretrain.launch import asked, deepspeed, sbatch, slurm, snapshot, torchrun
from pretrain.launch.job import Job

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
RUNS = Path("/home/me/runs")
FOLDER = RUNS / "b16" / "launch" / "0001"
WHERE: Any = {"name": "b16", "run_folder": RUNS / "b16", "work_folder": Path("/home/me")}
ODD = Path("/r/it's $x/launch/0001")
FROZEN = Job(**WHERE, config=FOLDER / "config.yaml", code=FOLDER / "code")
OPEN = Job(**WHERE, config=Path("b16.yaml"), flags=("--seed", "1"))


def options(schema: type, *args: str) -> Any:
    """Options as the command line gives them, with an interpreter that is the same on every machine."""
    want = asked.parse(["CONFIG", *args], schema)
    return flags.parse(schema, ["--python", "/env/bin/python", *want.own], "test", schema())


def script(*args: str) -> Callable[[], str]:
    return lambda: slurm.render(options(slurm.Slurm, *args), FROZEN, FOLDER)


RENDERED: dict[str, Callable[[], str]] = {
    "cpu.sh": script("--cluster", "cpu", "--nodes", "2"),
    "gpu.sh": script("--cluster", "gpu", "--nodes", "4", "--exclude", "n7", "n9", "--directives", "mail-type=END"),
    "pyxis.sh": script("--cluster", "pyxis", "--nodes", "2"),
    "apptainer.sh": script("--cluster", "apptainer", "--nodes", "2", "--account", "vision"),
    "odd.sh": lambda: slurm.render(
        options(slurm.Slurm, "--preflight", "a 'b' || c", "--environment", 'A=it\'s "x"', "--exclude", "n[1-3]"),
        Job(name='it\'s "b" #1', run_folder=Path("/r/it's $x"), work_folder=Path("/w d"), config=ODD / "config.yaml"),
        ODD,
    ),
    "torchrun.sh": script("--nodes", "2", "--gpus-per-node", "8", "--form", "torchrun"),
    "deepspeed.sh": script("--nodes", "2", "--gpus-per-node", "8", "--form", "deepspeed"),
    "seeds.sh": script("--gpus-per-node", "8", "--seeds", "0", "1", "7"),
    "torchrun_nodes.sh": lambda: torchrun.render(options(torchrun.Torchrun, "--nodes", "2", "--head", "n1"), OPEN),
    "deepspeed_nodes.sh": lambda: deepspeed.render(
        options(deepspeed.DeepSpeed, "--nodes", "2", "--gpus-per-node", "8", "--hosts", "n1", "n2"), OPEN
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_golden(name: str) -> None:
    assert RENDERED[name]() == (GOLDEN / name).read_text(), f"if meant: python {Path(__file__).relative_to(ROOT)}"


@pytest.mark.parametrize("name", RENDERED)
def test_scripts_are_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(GOLDEN / name)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    command = ["shellcheck", "-s", "bash", "-S", "warning", *map(str, sorted(GOLDEN.glob("*.sh")))]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_every_rendering_has_its_golden_file() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(RENDERED)


WRONG = {
    "nodes": (["--nodes", "0"], "nodes 0 must be 1 or more"),
    "no ranks": (["--gpus-per-node", "0"], "ranks_per_node 0: without GPUs say how many ranks a node has"),
    "time": (["--time", "soon"], "time 'soon'"),
    "grace": (["--grace-s", "0"], "grace_s 0 must be 1 or more"),
    "dashes": (["--directives=x=1"], None),
    "variable": (["--environment", "NCCL"], "write NAME=VALUE"),
    "seeds": (["--seeds", "1", "1"], "each may be listed once"),
    "mounts": (["--mounts", "/a:/a"], "name the container too"),
    "line break": (["--setup", "a\nb"], "must be one line"),
    "spaces": (["--partition", "two words"], "have no spaces"),
    "typo": (["--partion", "gpu"], "no option of this launcher and no knob of a run; did you mean --partition?"),
    "no cluster": (["--cluster", "moon"], "there are apptainer, cpu, gpu, pyxis"),
    "two clusters": (["--cluster", "cpu", "gpu"], "name one file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line(name: str) -> None:
    args, said = WRONG[name]
    if said is None:
        assert options(slurm.Slurm, *args).directives == ("x=1",)
        return
    with pytest.raises(errors.UserError) as caught:
        options(slurm.Slurm, *args)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_clusters_file_comes_before_flags(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("gpus_per_node: 4\nexclusive: true\nsetup: [module load a, module load b]\n")
    got = options(slurm.Slurm, "--cluster", str(file), "--gpus-per-node", "2")
    assert (got.gpus_per_node, got.exclusive, got.setup) == (2, True, ("module load a", "module load b"))
    file.write_text("gpus: 4\n")
    with pytest.raises(errors.UserError, match=r"gpus in .* is no option"):
        options(slurm.Slurm, "--cluster", str(file))


def test_no_option_of_a_launcher_hides_a_knob() -> None:
    knobs = set(Run.__dataclass_fields__)
    for schema in (slurm.Slurm, torchrun.Torchrun, deepspeed.DeepSpeed):
        assert not knobs & (set(schema.__dataclass_fields__) | {"cluster", "dry_run", "json"})


def test_knobs_and_options_are_told_apart() -> None:
    args = ["c.yaml", "--nodes=2", "--optim.lr", "1e-3", "--dry-run", "--seed=5", "--setup", "a", "b"]
    want = asked.parse(args, slurm.Slurm)
    assert want.own == ("--nodes", "2", "--setup", "a", "b")
    assert want.knobs == ("--optim.lr", "1e-3", "--seed", "5")
    assert (want.dry_run, want.as_json) == (True, False)


@pytest.mark.parametrize(
    ("schema", "args", "said"),
    [
        (torchrun.Torchrun, ["--nodes", "2"], "name the first with --head"),
        (deepspeed.DeepSpeed, ["--nodes", "2", "--hosts", "n1"], "name each of the 2 nodes"),
        (deepspeed.DeepSpeed, ["--nodes", "2", "--hosts", "n1", "n1"], "named once"),
        (deepspeed.DeepSpeed, ["--max-restarts", "1"], "does not restart"),
    ],
)
def test_other_launchers_refuse_too(schema: type, args: list[str], said: str) -> None:
    with pytest.raises(errors.UserError, match=said):
        options(schema, *args)


def test_bad_nodes_of_earlier_attempts_are_left_out(tmp_path: Path) -> None:
    job = Job(name="b16", run_folder=tmp_path, work_folder=tmp_path, config=tmp_path / "c.yaml")
    bad = tmp_path / "launch" / "bad_nodes"
    bad.mkdir(parents=True)
    (bad / "n2").touch()
    text = slurm.render(options(slurm.Slurm, "--exclude", "n3"), job, tmp_path)
    assert "#SBATCH --exclude=n2,n3" in text.splitlines()


def test_a_container_mounts_no_name_that_would_be_two(tmp_path: Path) -> None:
    job = Job(name="a", run_folder=tmp_path / "a:b", work_folder=tmp_path, config=tmp_path / "c.yaml")
    with pytest.raises(errors.UserError, match="comma or a colon"):
        slurm.render(options(slurm.Slurm, "--container", "image"), job, tmp_path)


def test_directives_are_one_line() -> None:
    with pytest.raises(errors.UserError, match="must be one line"):
        sbatch.quoted("a\n#SBATCH --account=other")


def test_a_script_outranks_variables_and_the_job_around_it() -> None:
    script = "#SBATCH --time=1\n#SBATCH --account=vision\n#SBATCH --requeue\n"
    sites = {"SBATCH_ACCOUNT": "x", "SBATCH_TIMELIMIT": "2", "SBATCH_NO_REQUEUE": "1", "SBATCH_QOS": "low", "A": "1"}
    inside = {"SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "mask", "SLURM_CONF": "/etc/slurm.conf"}
    assert sbatch.environment(script, sites) == {"SBATCH_QOS": "low", "A": "1"}
    assert sbatch.environment(script, inside) == {"SLURM_CONF": "/etc/slurm.conf"}
    assert sbatch.environment(script, {"SLURM_EXACT": "1"}) == {"SLURM_EXACT": "1"}


@pytest.mark.slow
def test_a_dry_run_checks_the_config_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "debug.yaml")
    assert cli.run(["launch", "slurm", config, "--nodes", "2", "--name", "x", "--dry-run", "--json"]) == errors.DONE
    assert "--job-name=x\n" in json.loads(capsys.readouterr().out)["script"]
    assert not list(tmp_path.iterdir())
    assert cli.run(["launch", "slurm", config, "--optim.lrr", "1", "--dry-run"]) == errors.USER_ERROR
    assert "optim.lrr is not a knob" in capsys.readouterr().err
    assert cli.run(["launch", "torchrun", config, "--gpus-per-node", "3", "--dry-run"]) == errors.USER_ERROR
    said = capsys.readouterr().err
    assert "train.global_batch 32 is not a multiple of 3 ranks (1 nodes x 3); nearest: 30, 33" in said


def test_a_launcher_imports_no_torch() -> None:
    code = "import sys, pretrain.verbs_launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_submissions_are_numbered_and_frozen(tmp_path: Path) -> None:
    package = tmp_path / "pretrain"
    package.mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one.py").write_text("1")
    (package / "kernels").symlink_to("../kernels")
    first = snapshot.next_folder(tmp_path / "run")
    snapshot.freeze(first, "name: x\n", package)
    assert first == tmp_path / "run" / "launch" / "0001"
    assert (first / "code" / "pretrain" / "kernels" / "one.py").read_text() == "1"
    assert not (first / "code" / "pretrain" / "kernels").is_symlink()
    assert (first / "config.yaml").read_text() == "name: x\n"
    assert snapshot.next_folder(tmp_path / "run").name == "0002"
    with pytest.raises(errors.UserError, match="cannot be kept"):
        snapshot.freeze(first, "", package)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in RENDERED.items():
        (GOLDEN / name).write_text(text())
