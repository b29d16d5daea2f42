"""Every faster form of a tower computes what the plain one does, or is refused: features and gradients, in fp32."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from pretrain import config
from pretrain.errors import UserError
from pretrain.model import DualEncoder, build
from pretrain.speed import causal, compiled
from pretrain.towers.architecture import SHIPPED

CPU = torch.device("cpu")
TINY = json.loads((SHIPPED / "debug-tiny.json").read_text())
TEXT = TINY["text_cfg"]
RESNET = TINY | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 32}}
END = 49407
"""The tokenizer's end of a caption: the largest number."""
CLOSE = 1e-4
"""Of a tensor's largest number: fp32, with sums in another order."""


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


def text(**more: Any) -> dict[str, Any]:
    return TINY | {"text_cfg": TEXT | more, "custom_text": True}


def hugging_face(folder: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformers.RobertaConfig(vocab_size=200, max_position_embeddings=40, **shape, **plain).save_pretrained(folder)
    tower = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
    return TINY | {"text_cfg": tower | {"hf_proj_type": "linear", "context_length": 16}}


def make(folder: Path, towers: dict[str, Any], *speed: str, **knobs: Any) -> DualEncoder:
    written = json.dumps(towers, sort_keys=True)
    path = folder / f"fast-{zlib.crc32(written.encode())}.json"  # open_clip knows one model by a name
    path.write_text(written)
    return build(config.Model(name=str(path), speed=speed, **knobs), Clip(), 0, CPU).train()


def captions(end: int = END, pad: int = 0) -> Tensor:
    """[4, 16]: captions of 3 to 6 tokens with their ends, and padding."""
    rows = torch.full((4, 16), pad)
    for number, row in enumerate(rows):
        row[: 3 + number] = torch.arange(3 + number) + 5 * number + 2
        row[2 + number] = end
    return rows


def step(model: DualEncoder, texts: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features and gradients."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, *model.image_spec.size), dtype=torch.uint8, generator=generator)
    found = model(images, texts)
    torch.nn.functional.cross_entropy(found.logit_scale * found.image @ found.text.T, torch.arange(4)).backward()
    features = {"image": found.image.detach(), "text": found.text.detach()}
    return features, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(folder: Path, towers: dict[str, Any], *speed: str, texts: Tensor | None = None) -> DualEncoder:
    texts = captions() if texts is None else texts
    plain, fast = make(folder, towers), make(folder, towers, *speed)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    for found, wanted in zip(step(fast, texts), step(plain, texts), strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            # Gradients of nothing but rounding (attention's key bias) are measured by the largest of all.
            apart = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-2)
            assert apart < CLOSE, f"{name}: {float(apart):.1e}"
    return fast


@pytest.mark.parametrize("custom_text", [False, True])
def test_causal(tmp_path: Path, custom_text: bool) -> None:
    fast = check(tmp_path, TINY | {"custom_text": custom_text}, "causal")
    tower = fast.towers.text if custom_text else fast.towers
    assert {type(block.attn) for block in tower.transformer.resblocks} == {causal.CausalAttention}
    assert {type(block.attn) for block in fast.towers.visual.transformer.resblocks} == {torch.nn.MultiheadAttention}


@pytest.mark.parametrize(
    ("towers", "why"),
    [
        (text(no_causal_mask=True, pool_type="last"), "no causal mask"),
        (text(embed_cls=True, pool_type="last"), "masks padding and its class token"),
        (text(qk_norm=True, block_type="custom"), "has a form of its own"),
    ],
    ids=["siglip", "coca", "custom"],
)
def test_other_masks_are_left_alone(tmp_path: Path, towers: dict[str, Any], why: str) -> None:
    fast = make(tmp_path, towers, "causal")
    assert not any(isinstance(module, causal.CausalAttention) for module in fast.modules())
    assert why in str(causal.unfit(fast.towers))
    step(fast, captions())


@pytest.mark.parametrize("pool", ["open", "argmax", "eos"])
def test_short_texts(tmp_path: Path, pool: str) -> None:
    towers = TINY if pool == "open" else text(pool_type=pool, eos_id=END)
    fast, seen = make(tmp_path, towers, "short_texts"), []
    transformer = getattr(fast.towers, "text", fast.towers).transformer
    transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    fast.encode_text(captions())
    fast.encode_text(captions().roll(6, 1))
    assert seen == [8, 16], "the longest caption, rounded up to a multiple of 8"
    check(tmp_path, towers, "short_texts")


def test_short_texts_of_hugging_face(tmp_path: Path) -> None:
    check(tmp_path, hugging_face(tmp_path / "roberta"), "short_texts", texts=captions(end=150, pad=1))


@pytest.mark.parametrize(
    ("towers", "entry", "says"),
    [
        (text(no_causal_mask=True, pool_type="last"), "short_texts", "no causal mask"),
        (text(pool_type="last"), "short_texts", "pools by 'last'"),
        (TINY, "channels_last", "no convolutions"),
        (TINY, "cuda_graphs", "needs a CUDA device"),
    ],
    ids=["siglip", "last", "vit", "cpu"],
)
def test_what_would_do_nothing_is_refused(tmp_path: Path, towers: dict[str, Any], entry: str, says: str) -> None:
    with pytest.raises(UserError, match=f"model.speed {entry}.*{says}") as caught:
        make(tmp_path, towers, entry)
    assert "\n" not in str(caught.value)


def test_channels_last(tmp_path: Path) -> None:
    fast, formats = check(tmp_path, RESNET, "channels_last"), []
    convolution = fast.towers.visual.layer3[0].conv2
    convolution.register_forward_pre_hook(
        lambda _, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    step(fast, captions())
    assert formats == [True], "activations follow the pixels"


@pytest.mark.parametrize("custom_text", [False, True])
def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, custom_text: bool) -> None:
    """Blocks share a compiled form; without gradients there is another one."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend := torch._dynamo.testing.CompileCounter())
    fast = check(tmp_path, TINY | {"custom_text": custom_text}, "compile", "causal")
    assert backend.frame_count == 2, "one for the image tower's blocks, one for the text tower's"
    with torch.no_grad():
        fast.encode_text(captions())
    assert backend.frame_count == 3


def test_compiled_texts_of_many_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend := torch._dynamo.testing.CompileCounter())
    towers = text(context_length=77)
    fast = make(tmp_path, towers, "compile", "short_texts")
    for length in range(2, 77, 5):
        texts = torch.zeros(2, 77, dtype=torch.int64)
        texts[:, length] = END
        fast.encode_text(texts)
    assert backend.frame_count <= 2, "lengths are dynamic"


@pytest.mark.slow
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler itself, with short texts and selective checkpointing on top; its cache lies where it is told to."""
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    check(tmp_path, TINY, "compile", "short_texts")
    assert any((tmp_path / "inductor").rglob("*.so"))


def test_a_tower_without_blocks_is_compiled_whole(tmp_path: Path) -> None:
    one = {"vision_cfg": TINY["vision_cfg"] | {"layers": 1}, "text_cfg": TEXT | {"layers": 1}}
    fast = make(tmp_path, TINY | one)
    found = compiled.targets(fast.towers, whole=False)
    assert found == {"image": [fast.towers.visual], "text": [fast.towers.transformer]}
    assert compiled.targets(make(tmp_path, TINY).towers, whole=True).keys() == found.keys()
