"""What others write we read, and what we write others read: webdataset 0.2.86 and 1.0.x, open_clip's own loader.

webdataset 0.2.86, which open_clip needs, lies beside the installed one, and is met in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import Data
from pretrain.data.checking.inspect import check
from pretrain.data.packing.kinds import How, pack_folder, pack_shards
from pretrain.data.patterns import entries
from pretrain.data.shards.index import make_index
from pretrain.data.shards.reader import RawSample, ShardSource
from pretrain.data.storage import make

OLD = Path(sys.prefix) / "peers" / "webdataset-0.2.86"
COUNT, PER_SHARD = 12, 5
LIBRARIES = [
    pytest.param("1.0", id="webdataset-1.0"),
    pytest.param(
        "0.2.86",
        id="webdataset-0.2.86",
        marks=pytest.mark.skipif(not OLD.is_dir(), reason=f"no webdataset 0.2.86 in {OLD}; `make {sys.prefix}/ready`"),
    ),
]

READ = """
import hashlib, json, sys
import webdataset
assert webdataset.__version__.startswith(sys.argv[1]), (webdataset.__version__, webdataset.__file__)
for sample in webdataset.WebDataset(sys.argv[2:], shardshuffle=False):
    facts = {k: v if isinstance(v, str) else hashlib.sha256(v).hexdigest() for k, v in sample.items()}
    print(json.dumps({k: v for k, v in facts.items() if k == "__key__" or not k.startswith("__")}))
"""
WRITE = """
import sys, json, pathlib
import webdataset
assert webdataset.__version__.startswith(sys.argv[1]), (webdataset.__version__, webdataset.__file__)
source, out = map(pathlib.Path, sys.argv[2:])
pairs = [(path, path.with_suffix(".txt").read_text()) for path in sorted(source.glob("*.png"))]
samples = [
    {"__key__": f"set/{path.stem}", "png": path.read_bytes(), "txt": text, "json": {"caption": text, "n": n}, "cls": n}
    for n, (path, text) in enumerate(pairs)
]
with webdataset.ShardWriter(str(out / "w-%05d.tar"), maxcount=5, verbose=0) as writer:
    for sample in samples[:10]:
        writer.write(sample)
with webdataset.TarWriter(str(out / "x.tar")) as writer:
    for sample in samples[10:]:
        writer.write(sample)
"""
OPEN_CLIP = """
import hashlib, importlib.machinery, json, sys, types
import pretrain.compat  # so that torchvision imports beside a torch for CPUs
import numpy, torch
try:
    import pandas
except ImportError:  # it is for the CSV reader, which is not met here
    pandas = sys.modules["pandas"] = types.ModuleType("pandas")
    pandas.__spec__ = importlib.machinery.ModuleSpec("pandas", None)
from open_clip_train import data
import webdataset
assert webdataset.__version__ == "0.2.86", webdataset.__version__
training = sys.argv[1] == "train"
args = types.SimpleNamespace(
    train_data=sys.argv[2], val_data=sys.argv[2], train_num_samples=None, val_num_samples=None, seed=0, workers=0,
    batch_size=4, world_size=1, dataset_resampled=False, train_data_upsampling_factors=None,
)
pixels = lambda image: torch.from_numpy(numpy.array(image))
tokens = lambda text: torch.tensor([list(text.encode().ljust(64))])
info = data.get_wds_dataset(args, pixels, training, epoch=0, tokenizer=tokens)
print(json.dumps({"samples": info.dataloader.num_samples}))
for images, texts in info.dataloader:
    for image, text in zip(images, texts):
        digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
        print(json.dumps({"image": digest, "text": bytes(text.tolist()).decode().rstrip()}))
"""


def run(code: str, *args: str, library: str = "1.0") -> list[dict[str, Any]]:
    """The lines that a program prints in a process that meets one version of webdataset."""
    path = str(OLD) if library == "0.2.86" else ""
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def samples(*patterns: str) -> list[RawSample]:
    data = Data(train=patterns)
    store = make(data)
    source = ShardSource(entries(patterns, store, "test"), data, store, field="test")
    return [source.sample(number) for number in range(len(source))]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np
    from PIL import Image

    place = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:03d}.png")
        (place / f"{number:03d}.txt").write_text(f"Bild Nr. {number}, schön")
    return place


@pytest.fixture(scope="module")
def packed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack_folder(pictures, out, how=How(samples_per_shard=PER_SHARD, workers=1))
    return out


@pytest.mark.parametrize("library", LIBRARIES)
def test_webdataset_reads_what_we_pack(packed: Path, pictures: Path, library: str) -> None:
    paths = sorted(map(str, packed.glob("*.tar")))
    theirs, ours = run(READ, library, *paths, library=library), samples(*paths)
    assert len(theirs) == len(ours) == COUNT
    for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        assert set(their) == {"__key__", "png", "txt", "json"}
        assert our.key.endswith("/" + their["__key__"])
        assert their["png"] == digest(our.image_bytes) == digest((pictures / f"{number:03d}.png").read_bytes())
        assert their["txt"] == digest(our.captions[0].encode())


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_we_read_what_webdataset_writes(pictures: Path, tmp_path: Path, library: str) -> None:
    run(WRITE, library, str(pictures), str(tmp_path), library=library)
    ours = samples(f"{tmp_path}/w-{{00000..00001}}.tar", f"{tmp_path}/x.tar")
    assert [item.key for item in ours] == [
        f"{'x.tar' if n >= 10 else f'w-{n // 5:05d}.tar'}/set/{n:03d}" for n in range(COUNT)
    ]
    for number, our in enumerate(ours):
        text = (pictures / f"{number:03d}.txt").read_text()
        assert our.image_bytes == (pictures / f"{number:03d}.png").read_bytes()
        assert our.texts == {"txt": [text], "json:caption": [text]}
        assert our.meta == {"caption": text, "n": number}
    theirs = run(READ, library, *sorted(map(str, tmp_path.glob("*.tar"))), library=library)
    assert [their["png"] for their in theirs] == [digest(our.image_bytes) for our in ours]
    pack_shards([f"{tmp_path}/*.tar"], tmp_path / "again", how=How(workers=1))
    again = run(READ, library, str(tmp_path / "again" / "00000.tar"), library=library)
    assert again == theirs, "packed again, with all members and keys"


@pytest.mark.slow
@pytest.mark.skipif(not OLD.is_dir(), reason=f"no webdataset 0.2.86 in {OLD}; `make {sys.prefix}/ready`")
@pytest.mark.parametrize("split", ["train", "eval"])
def test_open_clip_reads_what_we_pack(packed: Path, pictures: Path, split: str) -> None:
    """In training it takes the number of samples from the sizes.json beside the shards."""
    import io

    import numpy as np
    from PIL import Image

    pytest.importorskip("open_clip_train")
    head, *rows = run(OPEN_CLIP, split, f"{packed}/{{00000..00002}}.tar", library="0.2.86")
    assert head["samples"] == (COUNT if split == "train" else 0), "of an evaluation it does not know"
    pixels = {
        (digest(np.array(Image.open(io.BytesIO(item.image_bytes)).convert("RGB")).tobytes()), item.captions[0])
        for item in samples(f"{packed}/*.tar")
    }
    assert len(pixels) == len(rows) == COUNT
    assert {(row["image"], row["text"]) for row in rows} == pixels


FIELDS = {"url": "https://example.org/1.jpg", "status": "success", "error_message": None, "width": 24, "height": 20,
          "original_width": 640, "original_height": 480, "exif": "{}", "sha256": "00"}  # fmt: skip


def by_img2dataset(place: Path, picture: Any, tar_writer: Any) -> dict[str, tuple[bytes, str]]:
    """Its layout: failed samples are in the parquet alone, and whole shards may be missing. Key -> image, caption."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    written = {}
    for shard in (0, 1, 3):
        members, rows = {}, []
        for number in range(4):
            key, caption = f"{shard:05d}{number:04d}", f"a caption, {shard} {number}"
            failed = number == shard
            rows.append({"key": key, "caption": caption, **FIELDS, "status": "failed" if failed else "success"})
            if not failed:
                image = picture(10 * shard + number, (20, 24), "JPEG")
                meta = {"caption": caption, "key": key, **FIELDS}
                members[key] = {"jpg": image, "json": json.dumps(meta, indent=4).encode(), "txt": caption.encode()}
                written[f"{shard:05d}.tar/{key}"] = (image, caption)
        tar_writer(place / f"{shard:05d}.tar", members)
        parquet.write_table(pyarrow.Table.from_pylist(rows), place / f"{shard:05d}.parquet")
        (place / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 4, "successes": len(members)}))
    return written


def test_we_read_img2dataset(tmp_path: Path, picture_bytes: Any, tar_writer: Any) -> None:
    written = by_img2dataset(tmp_path, picture_bytes, tar_writer)
    ours = samples(f"{tmp_path}/*.tar")
    assert {item.key: (item.image_bytes, item.captions[0]) for item in ours} == written
    assert all(item.captions == [item.meta["caption"]] for item in ours), "txt and json say the same, once"
    assert all(FIELDS.items() <= item.meta.items() for item in ours)
    make_index([f"{tmp_path}/*.tar"])
    found = check([f"{tmp_path}/*.tar"], workers=1)
    assert found.missing_numbers == (f"1 numbers of {tmp_path}/*.tar: 00002",)
    assert found.problems == ()


@pytest.mark.slow
@pytest.mark.skipif(not OLD.is_dir(), reason=f"no webdataset 0.2.86 in {OLD}; `make {sys.prefix}/ready`")
def test_img2dataset_made_smaller_keeps_its_keys(tmp_path: Path, picture_bytes: Any, tar_writer: Any) -> None:
    (tmp_path / "old").mkdir()
    written = by_img2dataset(tmp_path / "old", picture_bytes, tar_writer)
    pack_shards([f"{tmp_path}/old/*.tar"], tmp_path / "new", how=How(samples_per_shard=6, resize=10, workers=1))
    rows = run(READ, "0.2.86", *sorted(map(str, (tmp_path / "new").glob("*.tar"))), library="0.2.86")
    assert [row["__key__"] for row in rows] == [key.partition("/")[2] for key in written]
    assert [row["txt"] for row in rows] == [digest(caption.encode()) for _, caption in written.values()]
    for item in samples(f"{tmp_path}/new/*.tar"):
        assert item.meta | {"width": 24, "height": 20} == item.meta | FIELDS
        assert (item.meta["width"], item.meta["height"]) == (12, 10)
