"""The engine of the packers: the same bytes from any number of workers and starts, and nothing lost in silence."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain import cli
from pretrain.config import Data
from pretrain.data.images.decode import BadSample, decode
from pretrain.data.packing.engine import Build, Unit
from pretrain.data.packing.kinds import FolderInputs, How, pack_folder, pack_shards, pack_table
from pretrain.data.packing.places import Folder
from pretrain.data.packing.polish import Polish
from pretrain.data.processes import Tick, spread
from pretrain.errors import UserError


def folder_of(place: Path, picture: Any, count: int, size: tuple[int, int] = (30, 40)) -> Path:
    place.mkdir(parents=True)
    for number in range(count):
        (place / f"{number:04d}.png").write_bytes(picture(number, size))
        (place / f"{number:04d}.txt").write_text(f"picture &amp; {number}")
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


@pytest.fixture
def source(tmp_path: Path, picture_bytes: Any) -> Path:
    place = folder_of(tmp_path / "in", picture_bytes, 23)
    (place / "0005.png").write_bytes(b"<html>")
    (place / "0011.txt").write_text("&nbsp;")
    return place


def test_workers_change_no_byte(source: Path, tmp_path: Path) -> None:
    found = []
    for workers in (1, 3):
        how = How(samples_per_shard=4, resize=20, clean=True, workers=workers)
        report = pack_folder(source, tmp_path / str(workers), how=how)
        found.append(contents(tmp_path / str(workers)))
        assert report.samples == {"": 21}
        assert report.shards == {"": 6}
        assert report.changed == {"captions: entities": 21, "images shrunk": 21}
        assert [line.rpartition("/")[2].partition(":")[0] for line in report.first_skipped] == ["0005.png", "0011.png"]
    assert found[0] == found[1]
    skipped = [json.loads(line) for line in found[0]["skipped.jsonl"].splitlines()]
    assert [line["input"].rpartition("/")[2] for line in skipped] == ["0005.png", "0011.png"]
    assert skipped[1]["reason"] == "no caption is left after cleaning"
    assert sum(json.loads(found[0]["sizes.json"]).values()) == 21


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_it_goes_on(program: Any, tmp_path: Path, picture_bytes: Any, workers: int) -> None:
    source = folder_of(tmp_path / "in", picture_bytes, 60, (500, 400))
    how = How(samples_per_shard=5, resize=300, workers=1)
    pack_folder(source, tmp_path / "once", how=how)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    words = ("pack", "folder", source, out, "--samples-per-shard", 5, "--resize", 300, "--workers", workers)
    for done in (1, 5):
        with program.start(*words) as job:
            program.until(job, lambda done=done: len(list(partial.glob("units/*.json"))) >= done)
            job.kill()
        assert job.returncode == -signal.SIGKILL, "it ended before it could be killed"
        assert not out.exists()
    before = {path.name: path.stat().st_ino for path in partial.glob("units/*.json")}
    assert 5 <= len(before) < 12
    program.run(*words)
    assert contents(out) == contents(tmp_path / "once")
    assert not partial.exists()


def interrupted(source: Path, out: Path, how: How, units: int) -> None:
    """What a command leaves behind that was killed after some units."""
    place = Folder(out)
    inputs = FolderInputs(source)
    work = Build(inputs, place, how)

    class Killed(BaseException): ...

    done = iter(range(units))

    def call(task: Any, tick: Tick) -> Any:
        if next(done, None) is None:
            raise Killed
        return work(task, tick)

    from pretrain.data.packing import engine as packing

    original = packing.Build
    packing.Build = lambda *_: call  # type: ignore[assignment,misc]
    try:
        pack_folder(source, out, how=how)
    except Killed:
        pass
    finally:
        packing.Build = original  # type: ignore[misc]


def test_only_what_is_missing_is_built_again(source: Path, tmp_path: Path) -> None:
    how, out, partial = How(samples_per_shard=4, workers=1), tmp_path / "out", tmp_path / "out.partial"
    interrupted(source, out, how, 3)
    assert sorted(path.name for path in partial.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    (partial / "00001.tar").write_bytes(b"cut short")
    (partial / "left.tmp").mkdir()
    (partial / "left.tmp" / "00003.tar").write_bytes(b"begun")
    kept = (partial / "00000.tar").stat().st_mtime_ns
    pack_folder(source, out, how=how)
    assert (out / "00000.tar").stat().st_mtime_ns == kept
    pack_folder(source, tmp_path / "once", how=how)
    assert contents(out) == contents(tmp_path / "once")


def test_other_arguments_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    how = How(samples_per_shard=4, workers=1)
    interrupted(source, tmp_path / "out", how, 2)
    with pytest.raises(
        UserError, match=r"other arguments \(quality was 95, now 90; resize was null, now 9\)"
    ) as caught:
        pack_folder(source, tmp_path / "out", how=How(samples_per_shard=4, workers=1, resize=9, quality=90))
    assert "\n" not in str(caught.value)
    (source / "0002.png").rename(source / "0002.jpg")
    with pytest.raises(UserError, match="inputs of unit 0 are others than when this was begun"):
        pack_folder(source, tmp_path / "out", how=how)
    (source / "0002.jpg").rename(source / "0002.png")
    with (tmp_path / "out.partial" / "arguments.json").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is packing there"):
            pack_folder(source, tmp_path / "out", how=how)
    assert pack_folder(source, tmp_path / "out", how=how).samples == {"": 22}


def test_what_training_would_not_read_is_told(source: Path, tmp_path: Path) -> None:
    (source / "0007.json").write_text(json.dumps({"exif": "x" * (1 << 22)}))
    (source / "0008.txt").write_text("long " * 700_000)
    report = pack_folder(source, tmp_path / "out", how=How(workers=1))
    assert report.skipped["the json member has # bytes, the limit is #"] == 1
    assert report.samples == {"": 21}, "a long caption is cut, as in training"


def test_tars_left_by_other_inputs_do_not_stay(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out", How(samples_per_shard=4, workers=1), 1)
    (tmp_path / "out.partial" / "00099.tar").write_bytes(b"of a unit without a record")
    pack_folder(source, tmp_path / "out", how=How(samples_per_shard=4, workers=1))
    assert "00099.tar" not in contents(tmp_path / "out")


def test_limit_of_a_shard(source: Path, tmp_path: Path) -> None:
    how = How(samples_per_shard=10, max_shard_mb=0.02, workers=1)
    report = pack_folder(source, tmp_path / "out", how=how)
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert list(sizes)[:3] == ["00000-00.tar", "00000-01.tar", "00000-02.tar"]
    assert (sum(sizes.values()), len(sizes)) == (22, report.shards[""])
    keys = [name.partition(".")[0] for tar in sizes for name in members(tmp_path / "out" / tar) if name.endswith("png")]
    assert keys == sorted(keys)
    assert len(set(keys)) == 22
    assert all((tmp_path / "out" / tar).stat().st_size <= 30_720 for tar in sizes), "with the end of a tar"


@pytest.mark.parametrize(
    ("options", "size"),
    [({"resize": 15}, (20, 15)), ({"max_side": 20}, (20, 15)), ({"resize": 15, "max_side": 16}, (16, 12)), ({}, None)],
)
def test_sides(tmp_path: Path, picture_bytes: Any, options: dict[str, int], size: tuple[int, int] | None) -> None:
    source = folder_of(tmp_path / "in", picture_bytes, 1)
    pack_folder(source, tmp_path / "out", how=How(workers=1, **options))
    image = next(iter(members(tmp_path / "out" / "00000.tar").values()))
    if size is None:
        assert image == (source / "0000.png").read_bytes()
    else:
        opened = Image.open(io.BytesIO(image))
        assert (opened.size, opened.format) == (size, "JPEG")


def test_jpegs_shrink_by_way_of_a_fraction_as_if_at_full_size(photos: list[Path], tmp_path: Path) -> None:
    """Scaled decoding changes photographs by less than the JPEG coding that follows it does."""
    for number, path in enumerate(photos[:6]):
        image = Image.open(path).convert("RGB").resize((1600, 1200), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=92)
        polished, extension, size = Polish(How(resize=256)).image(file.getvalue(), "jpg")
        assert (extension, size) == ("jpg", (341, 256))
        full = decode(file.getvalue()).resize(size, Image.Resampling.BICUBIC)
        error = np.abs(np.asarray(Image.open(io.BytesIO(polished)), float) - np.asarray(full, float))
        coded = io.BytesIO()
        full.save(coded, "JPEG", quality=95)
        coding = np.abs(np.asarray(Image.open(coded), float) - np.asarray(full, float))
        assert error.mean() < 2 * coding.mean(), number


def test_turned_jpegs_come_upright(photos: list[Path]) -> None:
    image = Image.open(photos[0]).convert("RGB").resize((800, 600))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.save(file, "JPEG", quality=95, exif=exif)
    polished, _, size = Polish(How(resize=150)).image(file.getvalue(), "jpg")
    assert size == (150, 200)
    expected = image.transpose(Image.Transpose.ROTATE_270).resize(size, Image.Resampling.BICUBIC)
    found = Image.open(io.BytesIO(polished))
    assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).mean() < 4
    assert Polish(How()).image(file.getvalue(), "jpg")[0] == file.getvalue(), "as it is, the orientation with it"


@pytest.mark.parametrize("kept", [0.5, 0.98])
@pytest.mark.parametrize("how", [How(), How(resize=64), How(resize=299)])
def test_jpegs_that_are_cut_short_are_found(photos: list[Path], how: How, kept: float) -> None:
    data = photos[0].read_bytes()
    with pytest.raises(BadSample, match="does not decode"):
        Polish(how).image(data[: int(kept * len(data))], "jpg")


def test_quality(tmp_path: Path, picture_bytes: Any) -> None:
    source = folder_of(tmp_path / "in", picture_bytes, 1, (200, 200))
    sizes = [
        pack_folder(source, tmp_path / str(quality), how=How(workers=1, resize=100, quality=quality)).bytes
        for quality in (95, 30)
    ]
    assert sizes[1] < 0.7 * sizes[0]


OTHER = {"cls": b"7", "npy": b"\x93NUMPY\0raw"}


@pytest.fixture
def old(tmp_path: Path, picture_bytes: Any, tar_writer: Any) -> Path:
    """Two shards with equal keys, members of other kinds, a sample without a caption and one without an image."""
    meta = {"caption": "b  1", "llava": ["x  y", "x y"], "width": 40, "height": 30, "score": 0.5, "none": None}
    samples = {
        "a": {"png": picture_bytes(1, (30, 40)), "txt": b"a  1", **OTHER},
        "b": {"json": json.dumps(meta).encode(), "jpg": picture_bytes(2, (30, 40), "JPEG")},
        "c": {"png": picture_bytes(3)},
        "d": {"txt": b"no image"},
        f"long/{'n' * 120}": {"webp": picture_bytes(4, (20, 20), "WEBP"), "txt": "ä".encode()},
    }
    (tmp_path / "old").mkdir()
    tar_writer(tmp_path / "old" / "0.tar", samples)
    tar_writer(tmp_path / "old" / "1.tar", {"a": {"png": picture_bytes(5), "txt": b"again"}})
    return tmp_path / "old"


def test_shards_stay_as_they_are(old: Path, tmp_path: Path) -> None:
    report = pack_shards([f"{old}/*.tar"], tmp_path / "new", how=How(workers=1))
    assert report.samples == {"": 4}
    assert report.changed == {"keys renamed": 1}
    assert [line.rpartition("/")[2] for line in report.first_skipped] == [
        "c: there is no caption",
        "d: the sample has no jpg, jpeg, png, webp member, only txt",
    ]
    before, after = members(old / "0.tar"), members(tmp_path / "new" / "00000.tar")
    again = {name.replace("a.", "a~2."): content for name, content in members(old / "1.tar").items()}
    assert after == {name: content for name, content in before.items() if name[0] not in "cd"} | again


def test_shards_shrunk_and_cleaned(old: Path, tmp_path: Path) -> None:
    how = How(workers=2, resize=15, clean=True)
    keys = ("txt", "json:caption", "json:llava")
    pack_shards([f"{old}/0.tar"], tmp_path / "new", text_keys=keys, how=how)
    after = members(tmp_path / "new" / "00000.tar")
    assert set(after) >= {"a.jpg", "a.txt", "a.cls", "a.npy", "b.jpg", "b.json"}
    assert "a.png" not in after
    assert after["a.txt"] == b"a 1"
    assert (after["a.cls"], after["a.npy"]) == tuple(OTHER.values())
    meta = {"caption": "b 1", "llava": ["x y"], "width": 20, "height": 15, "score": 0.5, "none": None}
    assert json.loads(after["b.json"]) == meta
    assert Image.open(io.BytesIO(after["b.jpg"])).size == (20, 15)


def test_damage_of_shards_is_told(old: Path, tmp_path: Path) -> None:
    whole = (old / "0.tar").read_bytes()
    (old / "0.tar").write_bytes(whole[: whole.index(b"b.jpg") + 700])
    report = pack_shards([f"{old}/*.tar"], tmp_path / "new", how=How(workers=1))
    assert report.samples == {"": 2}
    assert any("cut short" in line for line in report.first_skipped), report.first_skipped


def test_a_shard_that_is_gone_or_another_is_an_error_and_no_skip(old: Path, tmp_path: Path) -> None:
    from pretrain.data.packing.engine import Task
    from pretrain.data.packing.repack import ShardInputs

    place = Folder(tmp_path / "new")
    for change, says in ((lambda path: path.write_bytes(b"other"), "changed while"), (Path.unlink, "no such")):
        inputs = ShardInputs([f"{old}/0.tar"], Data.image_keys, Data.text_keys, None)
        content = (old / "0.tar").read_bytes()
        change(old / "0.tar")
        with place.begin({}), pytest.raises(UserError, match=says):
            Build(inputs, place, How())(Task(0, list(inputs.items()), ""), lambda *_: None)
        (old / "0.tar").write_bytes(content)


def test_shards_that_cannot_be_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no file"):
        pack_shards([f"{tmp_path}/none/*.tar"], tmp_path / "new")
    with pytest.raises(UserError, match=r"text_keys parquet:TEXT"):
        pack_shards(["x.tar"], tmp_path / "new", text_keys=("parquet:TEXT",))


def test_packed_shards_train(source: Path, tmp_path: Path) -> None:
    """sizes.json is what data.sizes wants."""
    pack_folder(source, tmp_path / "out", how=How(samples_per_shard=8, workers=1))
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    from pretrain.data.shards.indexing import open_shards
    from pretrain.data.storage import make

    paths = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert {shard.name: shard.samples for shard in open_shards(paths, Data(), make(Data()))} == sizes


def test_to_a_url_and_from_one(source: Path, tmp_path: Path) -> None:
    """fsspec's memory lasts as long as the process: one worker, then everything again from there."""
    pytest.importorskip("fsspec")
    url, how = "memory://pack/out", How(samples_per_shard=8, workers=1)
    pack_folder(source, url, how=how)
    pack_folder(source, tmp_path / "local", how=how)
    import fsspec

    files = fsspec.filesystem("memory")
    there = {name.removeprefix("/pack/out/"): files.cat(name) for name in files.find("/pack/out")}
    assert {name: content for name, content in there.items() if name in contents(tmp_path / "local")} == contents(
        tmp_path / "local"
    )
    with pytest.raises(UserError, match="already there"):
        pack_folder(source, url, how=how)
    report = pack_shards([f"{url}/*.tar"], tmp_path / "back", how=How(workers=1, index_dir=str(tmp_path / "index")))
    assert report.samples == {"": 22}
    files.rm("/pack/out/pack.json")
    files.rm("/pack/out/units/00001.json")
    with pytest.raises(UserError, match="resize was null, now 5"):
        pack_folder(source, url, how=How(samples_per_shard=8, workers=1, resize=5))
    assert pack_folder(source, url, how=how).samples == {"": 22}


def mistake(task: int, tick: Tick) -> int:
    tick(1, 10)
    if task == 3:
        raise UserError("three")
    if task == 4:
        raise ZeroDivisionError("four")
    if task == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task


@pytest.mark.slow
def test_processes() -> None:
    ticks: list[tuple[int, int]] = []
    assert sorted(spread(mistake, range(3), 2, lambda *done: ticks.append(done))) == [0, 1, 4]
    assert ticks == [(1, 10)] * 3
    for task, kind, says in (
        (3, UserError, "^three$"),
        (4, RuntimeError, "ZeroDivisionError: four"),
        (5, RuntimeError, "a worker process ended by SIGKILL, perhaps for want of memory"),
    ):
        with pytest.raises(kind, match=says):
            list(spread(mistake, [0, task], 2, lambda *_: None))


def test_a_full_disk_is_one_line_and_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how, real = How(samples_per_shard=8, workers=1), Folder.take

    def full(self: Folder, name: str, file: Path) -> None:
        if name == "00001.tar":
            raise OSError(28, "No space left on device", name)
        real(self, name, file)

    monkeypatch.setattr(Folder, "take", full)
    with pytest.raises(UserError, match=r"No space left on device: 00001.tar; mend that") as caught:
        pack_folder(source, tmp_path / "out", how=how)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert (tmp_path / "out.partial" / "00000.tar").exists()
    assert pack_folder(source, tmp_path / "out", how=how).samples == {"": 22}


def test_the_command_line(source: Path, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert cli.run(["pack", "folder", str(source), out, "--samples-per-shard", "8", "--workers", "1", "--clean"]) == 0
    said = capsys.readouterr()
    assert "samples" in said.out
    assert "changed captions: entities" in said.out
    assert "23 of 23 samples" in said.err, "progress goes to standard error"
    assert (
        cli.run(["pack", "shards", f"{old}/0.tar", f"{old}/1.tar", f"{tmp_path}/new", "--json", "--workers", "1"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["samples"] == {"": 4}
    assert cli.run(["pack", "shards", f"{old}/0.tar"]) == 2
    assert "then where to pack" in capsys.readouterr().err
    assert cli.run(["pack", "folder", str(source), f"{tmp_path}/more", "--min-words", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_table_that_changed_goes_on_where_it_can(tmp_path: Path, picture_bytes: Any) -> None:
    source = folder_of(tmp_path / "in", picture_bytes, 6)
    table = tmp_path / "t.csv"
    rows = [f"in/{n:04d}.png,caption {n},{n}" for n in range(6)]
    table.write_text("\n".join(["filepath,title,label", *rows[:5], "in/0005.png,five,x"]))
    how = How(samples_per_shard=2, workers=1)
    with pytest.raises(UserError, match="row 6 has label 'x'"):
        pack_table(table, tmp_path / "out", label_column="label", how=how)
    assert len(list((tmp_path / "out.partial" / "units").iterdir())) == 2
    table.write_text("\n".join(["filepath,title,label", *rows]))
    assert pack_table(table, tmp_path / "out", label_column="label", how=how).samples == {"": 6}
    assert source.is_dir()


def test_a_record_reads_back() -> None:
    unit = Unit("d", 3, {"0.tar": 2}, {"0.tar": 9}, {"images shrunk": 1}, [["a", "why"]])
    assert Unit(**json.loads(json.dumps(unit.__dict__))) == unit
