"""Features on the disk: what they are, on any ranks, after any stop, and of which model and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import errors
from pretrain.data.images.decode import decode
from pretrain.data.images.transforms import eval_image
from pretrain.errors import UserError
from pretrain.evaluate.base.sources import open_source
from pretrain.search import store
from pretrain.search.embed import embed
from pretrain.world import World, environment


def files(out: Path) -> dict[str, bytes]:
    """Features and keys by shard: the name of a part holds the rank that wrote it, which may differ."""
    return {path.name.split("-", 2)[2]: path.read_bytes() for path in out.glob("part-*.*.*")}


def test_features_are_the_encoders(made: Any, features: Path) -> None:
    opened = open_source(made.run, None, torch.device("cpu"))
    shard = features / "part-0000-0001.image"
    entries = [json.loads(line) for line in shard.with_suffix(".image.jsonl").read_text().splitlines()]
    stored = np.load(f"{shard}.npy")
    assert [entry["sample"] for entry in entries] == list(range(6))
    assert stored.dtype == np.float16
    for row, entry in zip(stored, entries, strict=True):
        name = f"{6 + entry['sample']:03d}"
        pixels = eval_image(decode((made.pictures / f"{name}.png").read_bytes()), opened.encoder.image_spec)
        with torch.inference_mode():
            image = opened.encoder.encode_image(torch.from_numpy(pixels)[None])[0]
        assert np.abs(row - image.numpy()).max() < 1e-3
        assert entry["captions"] == [(made.pictures / f"{name}.txt").read_text()]
    texts = [json.loads(line)["text"] for line in (features / "part-0000-0001.text.jsonl").read_text().splitlines()]
    with torch.inference_mode():
        expected = opened.encoder.encode_text(opened.tokenize(texts)).numpy()
    assert np.abs(np.load(features / "part-0000-0001.text.npy") - expected).max() < 1e-3


def on_a_rank(run: str, shards: str, out: str) -> dict[str, Any]:
    rank, size, local = environment()
    world = World(rank, size, local, torch.device("cpu"))
    return embed(run, (shards,), Path(out), world=world, workers=0, batch_size=4)


@pytest.mark.ranks
def test_resumed_on_other_ranks_it_is_the_same(made: Any, features: Path, tmp_path: Path, ranks: Any) -> None:
    """Three ranks, of which a kill has left two whole shards and remains; then three shards come from three ranks."""
    out = tmp_path / "out"
    shutil.copytree(features, out)
    kept = {"part-0000-0000", "part-0000-0003"}
    for path in out.glob("part-*.json"):
        if path.stem not in kept:
            path.unlink()  # written last: without it the others are remains
    (out / "part-0000-0002.text.npy").unlink()
    (out / ".part-0000-0002.text.npy.77").write_bytes(b"half")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-0000-000[03].*")}
    results = ranks(3).run(on_a_rank, str(made.run), made.shards, str(out))
    assert files(out) == files(features)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("part-0000-000[03].*")} == before
    assert (results[0]["shards"], results[0]["embedded_now"], results[0]["images"]) == (5, 3, 25)
    assert results[1] | {"seconds": 0} == results[0] | {"seconds": 0}
    assert {part.name[:9] for part in store.parts(out)} == {"part-0000", "part-0001", "part-0002"}
    assert not list(out.glob(".part*"))
    meta = store.read_meta(out)
    assert [(part["shard"], part["rows"]["image"]) for part in meta["finished"]] == list(enumerate([6, 6, 6, 6, 1]))


@pytest.mark.slow
def test_killed_it_goes_on(made: Any, features: Path, tmp_path: Path, program: Any) -> None:
    out, words = tmp_path / "out", ["embed", made.run, made.shards, tmp_path / "out", "--workers", 1, "--batch-size", 4]
    program.run(*words, expect=-9, variables={"PRETRAIN_FAULT": "kill@writing:nth=3"})
    assert len(store.parts(out)) == 2
    done = json.loads(program.run(*words, "--json").out)
    assert (done["shards"], done["embedded_now"]) == (5, 3)
    assert files(out) == files(features)


def test_finished_nothing_is_done_again(made: Any, features: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in features.glob("part*")}
    assert made.embed(features, batch_size=4)["embedded_now"] == 0
    assert {path.name: path.stat().st_mtime_ns for path in features.glob("part*")} == before


def test_a_part_that_was_cut_short_is_made_again(made: Any, features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(features, out)
    (out / "part-0000-0004.image.npy").write_bytes(b"short")
    assert made.embed(out, batch_size=4)["embedded_now"] == 1
    assert files(out) == files(features)


@pytest.mark.parametrize(("tower", "ends"), [("image", {"image"}), ("text", {"text"})])
def test_one_tower(made: Any, features: Path, tmp_path: Path, tower: str, ends: set[str]) -> None:
    result = made.embed(tmp_path / "out", tower=tower, dtype="fp32", batch_size=4)
    own = {path.name.split(".")[1] for path in (tmp_path / "out").glob("*.npy")}
    assert own == ends
    assert result[f"{tower}s"] == 25
    array = np.load(tmp_path / "out" / f"part-0000-0000.{tower}.npy")
    assert array.dtype == np.float32
    assert np.array_equal(array.astype(np.float16), np.load(features / f"part-0000-0000.{tower}.npy"))


def test_a_bad_image_is_left_out_and_told(made: Any, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(made.pictures, photos)
    from pretrain.data.packing.kinds import pack_folder

    pack_folder(photos, tmp_path / "shards")
    tar = next((tmp_path / "shards").glob("*.tar"))
    content, whole = tar.read_bytes(), (photos / "003.png").read_bytes()
    assert whole in content
    tar.write_bytes(content.replace(whole, whole[:16] + bytes(len(whole) - 16)))
    result = made.embed(tmp_path / "out", shards=(str(tar),))
    assert (result["images"], result["texts"], result["left_out"]) == (24, 24, 1)
    (part,) = store.parts(tmp_path / "out")
    assert part.left_out[0].startswith(f"{tar.name}/0000000003: ")
    keys = [json.loads(line)["key"] for line in (tmp_path / "out" / f"{part.name}.text.jsonl").read_text().splitlines()]
    assert f"{tar.name}/0000000003" not in keys


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "other"}, r"holds other features \(model .*run.* -> .*other"),
        ({"tower": "image"}, r"towers \['image', 'text'\] -> \['image'\]"),
        ({"dtype": "fp32"}, "dtype fp16 -> fp32"),
        ({"fewer": True}, "shard .* is missing"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"tower": "sound"}, "tower 'sound' must be both, image or text"),
        ({"shards": ("nowhere/*.tar",)}, "shards: 'nowhere"),
    ],
)
def test_other_features_and_mistakes_are_refused(made: Any, features: Path, options: dict[str, Any], says: str) -> None:
    options = dict(options)
    if "source" in options:
        options["source"] = made.run.parent / options["source"]
    if options.pop("fewer", False):
        options["shards"] = (made.shards.replace("*", "{00000..00003}"),)
    with pytest.raises(UserError, match=says) as caught:
        made.embed(features, **options)
    assert "\n" not in str(caught.value)


def test_a_foreign_folder_is_refused(made: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"is not empty \(thesis.tex\)"):
        made.embed(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.slow
def test_two_starts_do_not_write_at_once(made: Any, tmp_path: Path, program: Any) -> None:
    with store.locked(tmp_path / "out"):
        said = program.run("embed", made.run, made.shards, tmp_path / "out", expect=errors.USER_ERROR).err
    assert "is being written by process" in said
    assert len([line for line in said.splitlines() if line.startswith("pretrain embed:")]) == 1


def broken_on_a_rank(run: str, shards: str, out: str) -> str:
    if environment()[0] == 1:
        from pretrain.search.growing import Growing

        Growing.write = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # type: ignore[assignment,method-assign]
    try:
        on_a_rank(run, shards, out)
    except UserError as error:
        return str(error)
    return "nothing failed"


@pytest.mark.ranks
def test_what_fails_on_one_rank_ends_all(made: Any, tmp_path: Path, ranks: Any) -> None:
    pool = ranks(2)
    try:
        said = pool.run(broken_on_a_rank, str(made.run), made.shards, str(tmp_path / "out"))
    finally:
        pool.close()  # its second rank cannot write any more
    assert said[0] == said[1]
    assert "No space left on device" in said[0]
    assert [part.shard for part in store.parts(tmp_path / "out")] == [0]
