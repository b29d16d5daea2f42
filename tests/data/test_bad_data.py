"""Whatever is in the shards: no run stops, hangs or loses its balance, and every skip says where and why."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import random
import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config import Data, Run, Train
from pretrain.data.images.transforms import ImageSpec
from pretrain.data.loader import combine, eval_loader, row_digests, train_loader, train_source
from pretrain.data.order import mix
from pretrain.data.shards.tar import contents
from pretrain.errors import UserError
from pretrain.values import Batch, Skip
from pretrain.world import World

ROOT = Path(__file__).resolve().parents[2]
SPEC = ImageSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Member = tuple[str, bytes, dict[str, Any]]
"""Name, content, fields of its header."""


def encoded(image: Image.Image, format: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **how)
    return file.getvalue()


def pixels(number: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (24, 32, channels), dtype=np.uint8)


def jpeg(number: int = 0, **how: Any) -> bytes:
    return encoded(Image.fromarray(pixels(number)), "JPEG", quality=90, **how)


def sample(key: str, **members: bytes) -> list[Member]:
    """A good one unless `members` says otherwise."""
    whole = {"jpg": jpeg(mix(*key.encode()) % 1000), "txt": f"a caption of {key}".encode()} | members
    return [(f"{key}.{suffix}", content, {}) for suffix, content in whole.items()]


def tar(members: list[Member], ended: bool = True) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content, fields in members:
            info = tarfile.TarInfo(name)
            for attribute, value in fields.items():
                setattr(info, attribute, value)
            info.size = 0 if "type" in fields else len(content)
            archive.addfile(info, io.BytesIO(content))
        end = archive.offset
    return file.getvalue() if ended else file.getvalue()[:end]


A, B, C = (sample(key) for key in "abc")
ABC = tar([*A, *B, *C])
B_JPG = ABC.index(b"b.jpg\0")
"""Where the header of b's picture begins."""


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def gnu_sparse(folder: Path) -> bytes:
    """What GNU tar makes of a file with holes."""
    for name, content, _ in [*A, *C]:
        (folder / name).write_bytes(content)
    with (folder / "b.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    names = ["a.jpg", "a.txt", "b.jpg", "c.jpg", "c.txt"]
    subprocess.run(["tar", "-S", "--format=gnu", "-cf", "s.tar", *names], cwd=folder, check=True)
    return (folder / "s.tar").read_bytes()


@dataclass
class Horror:
    """A shard, and what must come of it."""

    content: bytes | Callable[[Path], bytes]
    good: str = "a b c"
    """Keys of what can be used."""
    notes: tuple[tuple[str, str], ...] = ()
    """(key, pattern of the reason) of what is known at the start."""
    bad: dict[str, str] = field(default_factory=dict)
    """Key -> pattern of the reason, of what is met while reading."""


NO_IMAGE = r"has no jpg.* member, only txt"
PAX_BOMB = header("PaxHeader", 2 << 20, b"x") + padded(b"2097152 path=" + b"b" * ((2 << 20) - 14) + b"\n")
SHARDS = {
    "whole": Horror(ABC),
    "cut in a member": Horror(ABC[: B_JPG + 700], "a", (("b", r"cut short at byte \d+ inside 'b\.jpg'"),)),
    "cut in a header": Horror(ABC[: B_JPG + 300], "a", (("", r"cut short at byte"),)),
    "cut between members": Horror(ABC[:B_JPG], "a", (("", r"no end marker"),)),
    "cut in the first header": Horror(ABC[:300], "", (("", r"cut short at byte 300"),)),
    "a damaged header": Horror(
        ABC[: B_JPG + 100] + b"junk" + ABC[B_JPG + 104 :], "a", (("", rf"no tar header at byte {B_JPG}"),)
    ),
    "an unreadable size": Horror(
        tar(A, ended=False) + (lambda h: h[:148] + b"%06o\0 " % (256 + sum(h[:148]) + sum(h[156:])) + h[156:])(
            header("b.jpg", 0)[:124] + b"whatever...." + header("b.jpg", 0)[136:]
        ),
        "a", (("", r"unreadable size"),),
    ),
    "no bytes": Horror(b"", "", (("", "is empty"),)),
    "zeros alone": Horror(bytes(1 << 20), "", (("", r"ends at byte 0, and 1048576 bytes follow"),)),
    "zeros inside": Horror(tar(A) + bytes(1 << 17) + tar(B), "a", (("", r"bytes follow that are not read"),)),
    "a member twice": Horror(
        tar([*A, ("a.jpg", b"<html>", {}), *B, *C]), notes=(("a", r"'a\.jpg' more than once"),)
    ),
    "a key twice": Horror(
        tar([*A, *sample("a", jpg=b"x", txt=b"x"), *B, *C]), notes=(("a", r"a\.jpg"), ("a", r"a\.txt"))
    ),
    "a sample split by others": Horror(tar([A[0], B[0], ("notes.d/", b"", {"type": tarfile.DIRTYPE}), *C, B[1], A[1]])),
    "members outside": Horror(
        tar([*sample("../../up"), *sample("/etc/absolute"), *sample("x/../y")]), "../../up /etc/absolute x/../y"
    ),
    "links and devices": Horror(
        tar([*A, ("b.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), B[1],
             ("c.jpg", b"", {"type": tarfile.CHRTYPE}), ("c.png", b"", {"type": tarfile.LNKTYPE, "linkname": "a.jpg"}),
             C[1], ("d.jpg", b"", {"type": tarfile.FIFOTYPE})]),
        "a", (("", r"4 links, devices or sparse files are left out: 'b\.jpg', 'c\.jpg', 'c\.png', \.\.\."),),
        {"b": NO_IMAGE, "c": NO_IMAGE},
    ),
    "a sparse member": Horror(gnu_sparse, "a c", (("", r"1 links, devices or sparse files are left out: 'b\.jpg'"),)),
    "a sparse member by pax": Horror(
        tar([*A, ("b.jpg", b"e" * 700, {"pax_headers": {"GNU.sparse.major": "1"}}), *C]), "a c", (("", r"'b\.jpg'"),)
    ),
    "a name of two megabytes": Horror(
        tar(A, ended=False) + PAX_BOMB + header("?", 3) + padded(b"xyz") + tar([*B, *C]),
        notes=(("", r"name record of 2097152 bytes"),),
    ),
    "a malformed pax header": Horror(
        tar(A, ended=False) + header("PaxHeader", 20, b"x") + padded(b"999 path=short\n     ") + tar([*B, *C]),
        "a c", (("", r"malformed pax header"),), {"b": NO_IMAGE},
    ),
    "a huge size": Horror(
        tar(A, ended=False) + header("b.jpg", 8**11 - 1) + b"x" * 512, "a", (("b", r"cut short .* inside 'b\.jpg'"),)
    ),
    "names that are odd": Horror(
        tar([*A, ("c.", b"", {}), (".hidden", b"", {}), ("README", b"", {}), ("b\n\\.jpg", B[0][1], {}),
             ("b\n\\.txt", B[1][1], {})]), "a b\n\\",
    ),
}  # fmt: skip


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def palette() -> bytes:
    image = Image.fromarray(pixels(4)).quantize(16)
    return encoded(image, "PNG", transparency=3)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(5, exif=exif)


CORRUPT = bytearray(jpeg(6))
CORRUPT[2:40] = bytes(38)
UNUSABLE = {  # members of sample b, and why it cannot be used
    "truncated jpeg": ({"jpg": jpeg(1)[:-400]}, r"does not decode"),
    "corrupt jpeg": ({"jpg": bytes(CORRUPT)}, r"does not decode"),
    "html": ({"jpg": b"<!DOCTYPE html><html><body>404</body></html>" * 20}, r"does not decode"),
    "no bytes": ({"jpg": b""}, r"does not decode"),
    "a bomb": ({"jpg": png(20_000, 20_000)}, r"(20000 x 20000|400000000) ?pixels"),
    "a truncated png": ({"jpg": encoded(Image.fromarray(pixels(2)), "PNG")[:-500]}, r"does not decode"),
    "a blank caption": ({"txt": b" \n\t"}, r"no caption"),
    "no caption": ({"txt": b""}, r"no caption"),
    "bytes for a caption": ({"txt": b"caf\xe9 \xff"}, r"not utf-8"),
    "a book for a caption": ({"txt": b"word " * 900_000}, r"txt member has 4500000 bytes, the limit is"),
    "json that does not parse": ({"json": b"{"}, r"json member does not parse"),
    "json that is no mapping": ({"json": b"[1]"}, r"json member is a list"),
    "json without a bottom": ({"json": b"[" * 100_000}, r"json member does not parse"),
    "json with other things": ({"json": b'{"caption": {"en": 1}}'}, r"caption"),
}
USABLE = {
    "cmyk": {"jpg": encoded(Image.fromarray(pixels(3)).convert("CMYK"), "JPEG")},
    "16 bits": {"jpg": encoded(Image.fromarray(pixels(3)[..., 0].astype(np.uint16) * 257), "PNG")},
    "palette and alpha": {"jpg": palette()},
    "alpha": {"jpg": encoded(Image.fromarray(pixels(3, 4)), "PNG")},
    "turned by exif": {"jpg": turned()},
    "one pixel": {"jpg": encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")},
    "a line": {"jpg": encoded(Image.new("L", (4000, 1), 7), "PNG")},
    "a megabyte of caption": {"txt": b"word " * 200_000},
    "a mark before a caption": {"txt": b"\xef\xbb\xbfa caption"},
    "a zero byte in a caption": {"txt": b"a \0 caption"},
}
SAMPLES = {name: Horror(tar([*A, *sample("b", **members), *C]), "a c", (), {"b": reason})
           for name, (members, reason) in UNUSABLE.items()}  # fmt: skip
SAMPLES |= {name: Horror(tar([*A, *sample("b", **members), *C])) for name, members in USABLE.items()}


def make_run(paths: list[Path], batch: int = 12, **data: Any) -> Run:
    options = {"workers": 0, "max_bad": 1.0, "shuffle_window": 8} | data
    return Run(
        seed=3, data=Data(train=tuple(map(str, paths)), **options), train=Train(samples=1000, global_batch=batch)
    )


def read(run: Run, words: Any, samples: int, ranks: int) -> list[list[Batch]]:
    """Batches of each rank."""
    found = []
    for rank in range(ranks):
        with train_loader(run, World(rank, ranks, rank, torch.device("cpu")), SPEC, words, 0, samples) as loader:
            found.append(list(loader))
    return found


def digests(ranks: list[list[Batch]]) -> list[str]:
    return [combine(itertools.chain.from_iterable(map(row_digests, parts))) for parts in zip(*ranks, strict=True)]


def skips(ranks: list[list[Batch]]) -> set[Skip]:
    return {skip for batches in ranks for batch in batches for skip in batch.skips}


def put(folder: Path, name: str, horror: Horror) -> Path:
    path = folder / name
    (folder / f"making {name}").mkdir()
    path.write_bytes(horror.content(folder / f"making {name}") if callable(horror.content) else horror.content)
    return path


@pytest.mark.parametrize("name", [*SHARDS, *SAMPLES])
def test_nothing_stops_or_unbalances_a_run(name: str, tmp_path: Path, words: Any) -> None:
    horror = (SHARDS | SAMPLES)[name]
    place = tmp_path / "x" / "y"
    place.mkdir(parents=True)
    paths = [put(place, "bad.tar", horror), place / "good.tar"]
    paths[1].write_bytes(tar([*sample("p"), *sample("q"), *sample("r")]))
    run = make_run(paths)
    before = set(tmp_path.rglob("*"))

    source = train_source(run.data, World(0, 1, 0, torch.device("cpu")), SPEC)
    assert [(note.index, note.shard, note.key) for note in source.damage] == [
        (-1, "bad.tar", key) for key, _ in horror.notes
    ]
    for note, (_, pattern) in zip(source.damage, horror.notes, strict=True):
        assert re.search(pattern, note.reason), note
        assert "\n" not in note.reason

    alone, two = read(run, words, 60, 1), read(run, words, 60, 2)
    assert digests(alone) == digests(two)
    assert len(alone[0]) == 5
    assert skips(alone) == skips(two)
    assert {skip.key for skip in skips(alone)} == set(horror.bad)
    for skip in skips(alone):
        assert (skip.shard, 0 <= skip.index < 60) == ("bad.tar", True)
        assert re.search(horror.bad[skip.key], skip.reason), skip
    used = {key for batch in alone[0] for key in batch.keys}
    good = [key for key in re.split(r" ", horror.good) if key]
    assert used == {f"bad.tar/{key}" for key in good} | {f"good.tar/{key}" for key in "pqr"}
    indexes = {place / f"{path.name}.index" for path in paths}
    assert set(tmp_path.rglob("*")) == before | indexes, "nothing is extracted"


def test_a_member_of_two_gigabytes_is_not_read(tmp_path: Path, words: Any) -> None:
    path, size = tmp_path / "big.tar", 2 << 30
    with path.open("wb") as file:
        file.write(tar(A, ended=False) + header("b.jpg", size))
        file.seek(size, os.SEEK_CUR)
        file.write(header("b.txt", 4) + padded(b"text") + tar(C))
    assert path.stat().st_blocks * 512 < 1 << 20, "the file system keeps holes"
    (batches,) = read(make_run([path]), words, 36, 1)
    assert {skip.reason for skip in skips([batches])} == {f"the jpg member has {size} bytes, the limit is {1 << 28}"}
    assert {key for batch in batches for key in batch.keys} == {"big.tar/a", "big.tar/c"}


def test_a_shard_that_shrinks_later(tmp_path: Path, words: Any) -> None:
    """In use it is refused; the next start takes what is left, as another data set."""
    paths = [tmp_path / "a.tar"]
    paths[0].write_bytes(ABC)
    run = make_run(paths)
    source = train_source(run.data, World(0, 1, 0, torch.device("cpu")), SPEC)
    os.truncate(paths[0], B_JPG + 700)
    with pytest.raises(UserError, match=r"a\.tar: changed while it was in use") as caught:
        source.sample(2)
    assert "\n" not in str(caught.value)
    again = train_source(run.data, World(0, 1, 0, torch.device("cpu")), SPEC)
    assert (len(again), [note.key for note in again.damage]) == (1, ["b"])
    assert again.fingerprint != source.fingerprint


@pytest.mark.parametrize("opened", [False, True])
def test_a_shard_that_vanishes(tmp_path: Path, opened: bool) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(ABC)
    run = make_run([tmp_path / "a.tar", tmp_path / "b.tar"])
    source = train_source(run.data, World(0, 1, 0, torch.device("cpu")), SPEC)
    whole = source.sample(3) if opened else None
    os.unlink(tmp_path / "b.tar")
    if opened:  # an open file outlives its name
        assert source.sample(3) == whole
    else:
        with pytest.raises(UserError, match=r"b\.tar: .*(vanished|no such file)"):
            source.sample(3)


def test_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.train: .*a\.tar.*holds no samples; a\.tar: is empty") as caught:
        train_source(make_run(paths).data, World(0, 1, 0, torch.device("cpu")), SPEC)
    assert "\n" not in str(caught.value)


def test_a_thousand_defects_are_told_briefly(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar([*A, *[("a.txt", b"again", {})] * 1000]))
    source = train_source(make_run([path]).data, World(0, 1, 0, torch.device("cpu")), SPEC)
    assert len(source.damage) == 21
    assert source.damage[-1].reason == "and 980 more defects"


def test_a_damaged_held_out_shard_is_an_error(tmp_path: Path, words: Any) -> None:
    """A run can do with less; a measurement over less than was named is another measurement."""
    (tmp_path / "a.tar").write_bytes(ABC[: B_JPG + 700])
    with pytest.raises(UserError, match=r"data\.eval: a\.tar: is cut short .*'b\.jpg'") as caught:
        eval_loader(Data(eval=(str(tmp_path / "a.tar"),)), World(0, 1, 0, torch.device("cpu")), SPEC, words, 2)
    assert "\n" not in str(caught.value)


def test_random_damage_is_survived(tmp_path: Path) -> None:
    """Whatever happens to an archive's bytes, it is refused in one line or indexed, with members inside the file."""
    whole = tar([*A, *sample("n" * 120), ("d/l.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "x"}), *B])
    outcomes = set[str]()
    for turn in range(1500):
        rng = random.Random(turn)
        raw = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            if len(raw) < 512:
                break
            at = 512 * rng.randrange(len(raw) // 512) if rng.random() < 0.7 else rng.randrange(len(raw))
            what = rng.randrange(5)
            if what == 0:
                raw = raw[: at + 1]
            elif what == 1:
                raw[at : at + 512] = raw[:512]
            elif what == 2:
                raw[at : at + 8] = rng.randbytes(8)
            elif what == 3:  # another kind or size, under a checksum that is right
                block = raw[at : at + 512].ljust(512, b"\0")
                block[124:136], block[156] = (
                    b"%011o\0" % rng.randrange(1 << rng.randrange(33)),
                    rng.choice(b"012567xgLKS"),
                )
                block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
                raw[at : at + 512] = block
            else:
                del raw[at : at + rng.randrange(1, 2000)]
        try:
            found = contents("a.tar", lambda offset, size, raw=bytes(raw): raw[offset : offset + size], len(raw))
        except UserError as error:
            outcomes.add("refused" if "\n" not in str(error) else "refused in several lines")
            continue
        assert all(0 <= member.offset <= member.offset + member.size <= len(raw) for member in found.members)
        assert all("\n" not in note.reason for note in found.notes)
        outcomes.add(f"{min(len(found.members), 4)} members, {'noted' if found.notes else 'silent'}")
    assert "refused in several lines" not in outcomes
    assert {"refused", "0 members, noted", "4 members, noted", "4 members, silent"} <= outcomes


class Trap:
    """Pickled, it leaves a file wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_member_is_ever_unpickled(tmp_path: Path, words: Any) -> None:
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap)
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    torch_file = io.BytesIO()
    torch.save(Trap(sprung), torch_file)
    numpy_file = io.BytesIO()
    np.save(numpy_file, np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    traps = {"pyd": trap, "pkl": trap, "pickle": trap, "pth": torch_file.getvalue(), "npy": numpy_file.getvalue(),
             "pt": torch_file.getvalue(), "cls": trap, "ten": trap, "mp": trap}  # fmt: skip
    path = tmp_path / "a.tar"
    path.write_bytes(tar([*sample("a", **traps), *sample("b", jpg=trap), *sample("c", json=trap), *sample("d")]))
    keys = ("txt", "pyd", "pkl", "json:caption")
    (batches,) = read(make_run([path], text_keys=keys, image_keys=("jpg", "pth")), words, 24, 1)
    assert {skip.key for skip in skips([batches])} == {"a", "b", "c"}, "a's .pyd was read as text, which it is not"
    (batches,) = read(make_run([path]), words, 24, 1)
    assert {key for batch in batches for key in batch.keys} == {"a.tar/a", "a.tar/d"}
    assert not sprung.exists()


DEBUG = ("train", "configs/debug.yaml", "--data.max-bad", "1", "--folder")


@pytest.mark.slow
@pytest.mark.ranks
def test_a_folder_of_horrors_as_a_user_trains_on_it(program: Any, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    every = SHARDS | SAMPLES
    for number, horror in enumerate(every.values()):
        put(shards, f"{number:02d}.tar", horror)
    flags = ("--data.train", shards / "*.tar", "--data.workers", 1, "--train.samples", 320)
    flags = (*flags, "--log.batch-digest", "true")
    first, _ = program.run_ranks(2, *DEBUG, tmp_path / "runs", *flags)
    run = tmp_path / "runs" / "debug"
    told = program.lines(run / "skips.jsonl")
    notes, met = ([skip for skip in told if (skip["index"] == -1) == known] for known in (True, False))
    assert [(note["shard"], note["key"]) for note in notes] == [
        (f"{number:02d}.tar", key) for number, horror in enumerate(every.values()) for key, _ in horror.notes
    ]
    assert f"{len(notes)} notes in skips.jsonl" in first.err
    bad = {(f"{number:02d}.tar", key) for number, horror in enumerate(every.values()) for key in horror.bad}
    assert {(skip["shard"], skip["key"]) for skip in met} == bad
    steps = program.lines(run / "metrics.jsonl")
    assert (steps[-1]["step"], steps[-1]["skipped"]) == (10, len(met))

    program.run(*DEBUG, tmp_path / "alone", *flags)
    other = program.lines(tmp_path / "alone" / "debug" / "metrics.jsonl")
    assert [step["batch_digest"] for step in other] == [step["batch_digest"] for step in steps]
    key = lambda skip: (skip["index"], skip["reason"])  # noqa: E731
    assert sorted(program.lines(tmp_path / "alone" / "debug" / "skips.jsonl"), key=key) == sorted(told, key=key)


@pytest.mark.slow
def test_a_changed_data_set_is_refused_by_name(program: Any, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in "pqrs":
        (shards / f"{name}.tar").write_bytes(tar([*sample(f"{name}0"), *sample(f"{name}1")]))
    flags = ("--train.samples", 320, "--data.train")
    program.run(*DEBUG, tmp_path, *flags, shards / "*.tar")
    before = (tmp_path / "debug" / "data.json").read_text()
    program.run(*DEBUG, tmp_path, *flags, shards.rename(tmp_path / "moved") / "*.tar")  # the same ones, elsewhere
    (tmp_path / "moved").rename(shards)
    (shards / "p.tar").write_bytes(tar(sample("p0"), ended=False))
    (shards / "q.tar").unlink()
    (shards / "t.tar").write_bytes((shards / "r.tar").read_bytes())
    refused = program.run(*DEBUG, tmp_path, *flags, shards / "*.tar", expect=2)
    (said,) = [line for line in refused.err.splitlines() if "data.train" in line]
    assert re.search(
        r"data\.train: shard p\.tar was replaced since the run began \(size \d+ -> \d+, samples 2 -> 1\); "
        r"shard q\.tar is missing \(2 samples\); shard t\.tar is new \(2 samples\): restore", said
    ), said  # fmt: skip
    assert (tmp_path / "debug" / "data.json").read_text() == before
