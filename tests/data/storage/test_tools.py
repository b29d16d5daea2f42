"""`pretrain pack` and `pretrain index` where shards are objects of a store: the real commands, a real S3 protocol."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def environment(s3_port: int, tmp_path: Path) -> dict[str, str]:
    there = {"FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}", "AWS_DEFAULT_REGION": "us-east-1"}
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    return there | keys | {"XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def bucket(s3: Any, remote: Any) -> Iterator[Any]:
    system = remote.system("s3://packed/x")
    system.mkdir("packed")
    yield system
    system.rm("packed", recursive=True)


def tars(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".tar")}


def test_packed_killed_checked_and_packed_again(
    program: Any, bucket: Any, environment: dict[str, str], tmp_path: Path, picture_bytes: Any
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number:02d}.png").write_bytes(picture_bytes(number, (200, 300)))
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"picture {number}")
    how = ["--samples-per-shard", "4", "--resize", "100", "--workers", "2"]
    pack = ["pack", "folder", tmp_path / "in"]

    with program.start(*pack, "s3://packed/out", *how, variables=environment) as job:
        program.until(job, lambda: bucket.invalidate_cache() or len(bucket.find("packed/out/units")) >= 2)
        job.kill()
    assert job.returncode == -signal.SIGKILL, "it ended before it could be killed"
    bucket.invalidate_cache()
    assert not bucket.exists("packed/out/pack.json")

    for out in ("s3://packed/out", tmp_path / "local"):
        program.run(*pack, out, *how, variables=environment)
    bucket.invalidate_cache()
    found = {name.rpartition("/")[2]: bucket.cat(name) for name in bucket.find("packed/out")}
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert len(tars(found)) == 10
    assert tars(found) == tars(local)
    assert json.loads(found["sizes.json"]) == json.loads(local["sizes.json"])

    program.run("index", "s3://packed/out/*.tar", variables=environment)
    done = program.run("index", "s3://packed/out/*.tar", "--check", "--json", variables=environment)
    facts = json.loads(done.out)
    assert (facts["samples"], facts["problems"], facts["images"]["undecodable"]) == (40, [], 0)
    assert facts["captions"]["count"] == 40

    smaller = ["s3://packed/out/{00000..00009}.tar", str(tmp_path / "small"), "--resize", "50", "--workers", "2"]
    done = program.run("pack", "shards", *smaller, "--json", variables=environment)
    assert json.loads(done.out)["samples"] == {"": 40}
    assert json.loads(done.out)["changed"] == {"images shrunk": 40}
