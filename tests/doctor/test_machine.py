"""Single checks, on what is found here and on what is told of machines that are not here."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import Data
from pretrain.doctor import compute, data, disk, gpu, same, smi, system, trackers, versions
from pretrain.doctor.base import Finding
from pretrain.errors import UserError

CPU = torch.device("cpu")
SMI = """\
GPU-1b2c3d4e-0000-1111-2222-333344445555, 550.54.15, 34, 1980, 1980, 612, 81559, 0, [N/A], 0x0000000000000001
GPU-9f8e7d6c-0000-1111-2222-333344445555, 550.54.15, 91, 345, 1980, 40960, 81559, 2, Yes, 0x0000000000000068
GPU-00000000-0000-1111-2222-333344445555, 550.54.15, [Not Supported], 210, 1980, 5, 24576, [N/A], No, 0x4
Failed to initialize NVML: Driver/library version mismatch
"""


def test_lines_of_nvidia_smi_are_read() -> None:
    well, ill, plain = smi.parse(SMI)
    assert (well.driver, well.temperature, well.used, well.pending, well.slowed) == ("550.54.15", 34, 612, False, ())
    assert (ill.uncorrected, ill.pending) == (2, True)
    assert ill.slowed == ("hardware slowdown", "software thermal", "hardware thermal")
    assert (plain.temperature, plain.uncorrected, plain.slowed) == (None, None, ())


def test_a_gpu_that_is_not_well_is_told_by_what_it_is() -> None:
    well, ill, plain = ({each.name: each for each in gpu.condition(found)} for found in smi.parse(SMI))
    assert set(well) == set(plain) == {"gpu health"}
    assert {name: each.status for name, each in ill.items()} == {
        "gpu memory": "fail",
        "gpu clocks": "fail",
        "gpu heat": "warn",
        "gpu in use": "fail",
    }
    assert ill["gpu in use"].found == "40.0 of 79.6 GiB are held before the run begins"


def test_nvidia_smi_is_asked_by_the_older_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses a field that it does not know, with an exit code."""
    tool = tmp_path / "nvidia-smi"
    (tmp_path / "said").write_text(SMI)
    tool.write_text(f'#!/bin/sh\ncase "$1" in *event_reasons*) exit 2 ;; esac\ncat "{tmp_path / "said"}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert len(smi.gpus()) == 3
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert smi.gpus() == []
    assert smi.driver() is None


@pytest.mark.parametrize(
    ("built", "found", "status"),
    [("12.8", "550.54.15", "ok"), ("13.0", "550.54.15", "fail"), ("13.0", "580.65", "ok"), ("12.1", "470.1", "fail")],
)
def test_the_driver_must_know_torchs_cuda(built: str, found: str, status: str) -> None:
    assert versions.driver(built, found).status == status


@pytest.mark.parametrize(
    ("found", "status"), [("2.27.5", "ok"), ("2.28.3", "warn"), ("2.28.9", "ok"), ("2.29.2", "warn"), ("2.29.3", "ok")]
)
def test_bad_versions_of_nccl_are_known(found: str, status: str) -> None:
    assert versions.nccl(found).status == status


def test_unfit_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"pretrain": ["torch>=2.10", "gone>=1", 'wandb>=99; extra == "wandb"', 'other>=1; extra == "other"']}
    asked |= {"torch": ["triton==3.9.1", "sympy>=1"], "torchvision": ["torch==2.9.0"]}
    here = {"torch": "2.12.0", "triton": "3.9.0", "torchvision": "0.24", "sympy": "1.13", "wandb": "0.31"}
    monkeypatch.setattr(versions.metadata, "requires", lambda name: asked.get(name, []))
    monkeypatch.setattr(versions, "installed", lambda name: "3.12.1" if name == "python" else here.get(name))
    patient: Any = None
    assert {each.name: each.status for each in versions.packages(patient)} == {"gone": "fail", "wandb": "warn"}
    found = {each.name: each.status for each in versions.pairs(patient) if " with " in each.name}
    assert found == {"torch with triton": "fail", "torchvision with torch": "warn"}


def test_a_device_that_repeats_itself_is_well_and_one_that_does_not_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (compute.product("matmul", torch.float32, CPU) for _ in range(2))
    assert first.status == "ok"
    assert first == second
    real, calls = torch.Tensor.cpu, []

    def flipped(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        tensor = real(tensor).clone()
        tensor[-1, -1] += 1e-3 if len(calls) == 2 else 0
        return tensor

    monkeypatch.setattr(torch.Tensor, "cpu", flipped)
    found = compute.product("matmul", torch.float32, CPU)
    assert found.status == "fail"
    assert "2 results of 3" in found.found


def test_a_kernel_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.doctor.base import Patient
    from pretrain.world import World

    patient = Patient(World(0, 1, 0, CPU), ("a",))
    assert {each.status for each in compute.kernels(patient)} == {"ok"}
    real = compute._KERNELS["ranks"]
    wrong = {"ranks": lambda form, *given: [real(form, *given)[0] + (form != "reference")]}
    monkeypatch.setattr(compute, "_KERNELS", wrong)
    (found,) = compute.kernels(patient)
    assert (found.name, found.status) == ("kernel ranks", "fail")


def shard(path: Path, keys: int = 2) -> str:
    with tarfile.open(path, "w") as tar:
        for key in range(keys):
            tar.addfile(tarfile.TarInfo(f"{key}.txt"), io.BytesIO(b""))
    return str(path)


def test_shards_are_read_and_indexes_missed(tmp_path: Path) -> None:
    names = [shard(tmp_path / f"{n}.tar") for n in range(12)]
    read, indexes = data.of_set("data.train", [str(tmp_path / "*.tar")], Data(train=tuple(names)))
    assert (read.status, read.found) == ("ok", "first bytes of 8 of 12 shards")
    assert (indexes.status, indexes.found) == ("warn", "0 of 8 shards looked at have one")
    assert data.spread(names)[::7] == [names[0], names[-1]]
    (tmp_path / "00.tar").write_text("<html>not found</html>")
    names.append(str(tmp_path / "00.tar"))
    (failed,) = data.of_set("data.train", names[-1:], Data(train=tuple(names)))
    assert failed.status == "fail"
    assert "does not begin as a tar file" in failed.found
    with pytest.raises(UserError, match="names no file"):
        list(data.of_set("data.eval", [str(tmp_path / "*.zip")], Data()))


def test_a_disk_is_written_or_said_why_not(tmp_path: Path) -> None:
    found = disk._writes("disk", tmp_path)
    assert found.amount is not None
    assert list(tmp_path.iterdir()) == []
    assert disk.existing(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").write_text("in the way")
    blocked = disk._writes("disk", disk.existing(tmp_path / "file" / "b"))
    assert (blocked.status, "Not a directory" in blocked.found) == ("fail", True)
    failed = disk._writes("disk", Path("/proc"))
    assert failed.status == "fail"
    assert "/proc is on proc" in failed.mend


def test_room_is_counted_in_checkpoints() -> None:
    assert [disk._enough(free, 40, 10) for free in (40, 39, 20, 19)] == ["ok", "warn", "warn", "fail"]


@pytest.mark.parametrize(("limit", "status"), [(-1, "ok"), (65536, "ok"), (1024, "warn"), (100, "fail")])
def test_open_files(limit: int, status: str) -> None:
    assert system.open_files(limit).status == status


def test_shared_memory_is_for_ranks_that_share_a_node() -> None:
    assert system.shared_memory(64 << 20, 1).status == "ok"
    assert system.shared_memory(64 << 20, 8).status == "warn"
    assert system.shared_memory(2 << 30, 8).status == "ok"


def test_a_name_without_an_address() -> None:
    assert system.resolves("MASTER_ADDR", "no-such-host.invalid").status == "warn"
    assert system.resolves("host name", "localhost").status == "ok"


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"WANDB_MODE": "online"}, "fail"),
        ({"WANDB_MODE": "offline"}, "ok"),
        ({"WANDB_API_KEY": "k"}, "ok"),
        ({}, "warn"),
    ],
)
def test_a_login_of_wandb(variables: dict[str, str], status: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    assert trackers.login({"NETRC": str(tmp_path / "none")} | variables).status == status


def test_a_changed_file_is_other_code(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1")
    before: Finding = same._code(tmp_path)
    assert before == same._code(tmp_path)
    (tmp_path / "a.py").write_text("a = 2")
    assert same._code(tmp_path).alike != before.alike
