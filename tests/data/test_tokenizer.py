"""Token for token what open_clip gives, in bounded memory, with truncation counted."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.compat import open_clip
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError

TEXTS = [*tokenizer.PROBE, "a cat " * 50, "!", "!!!!!" * 80, "<end_of_text> inside", "ALL CAPS\nand\ttabs", "x" * 500]


@pytest.fixture(scope="module")
def clip() -> tokenizer.Tokenizer:
    return tokenizer.build("ViT-B-32")


def test_equals_open_clip(clip: tokenizer.Tokenizer) -> None:
    expected = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert torch.equal(clip(TEXTS), expected)
    assert (clip(TEXTS).dtype, clip.context_length) == (torch.int64, 77)
    assert clip([]).shape == (0, 77)


def test_truncated_captions_are_counted(clip: tokenizer.Tokenizer) -> None:
    fits, cut = "cat " * 75, "cat " * 76
    for texts, expected in (([fits], 0), ([cut], 1), ([cut, "a", fits, cut], 2), (["", "!"], 0), (["! " * 76], 1)):
        assert clip.truncated(texts, clip(texts)) == expected
    short = tokenizer.build("ViT-B-32", context_length=8)
    assert short(["a b c d e f"]).shape == (1, 8)
    texts = ["a b c d e f", "a b c d e f g"]
    assert short.truncated(texts, short(texts)) == 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_CACHED_WORDS", 50)
    small, words = tokenizer.build("ViT-B-32"), [f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(400)]
    assert torch.equal(small(words), open_clip.get_tokenizer("ViT-B-32")(words))
    cache = small._tokenize.cache
    assert len(cache) <= 50
    assert cache["<end_of_text>"] == "<end_of_text>", "special tokens are never dropped"
    assert torch.equal(small(["<end_of_text>"]), open_clip.get_tokenizer("ViT-B-32")(["<end_of_text>"]))


def test_memory_of_a_tokenizer_inside_another_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with Hugging Face's tokenizers in Python, whose BPE keeps every word too."""
    from transformers import CTRLTokenizer

    monkeypatch.setattr(tokenizer, "_CACHED_WORDS", 5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {piece: n for n, piece in enumerate(["<unk>", *letters, *(f"{letter}@@" for letter in letters)])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    inside = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), pad_token="<unk>")
    small = tokenizer.Tokenizer(Wrapped(inside), 8)
    assert isinstance(inside.cache, dict)
    words = [f"w{letter}{other}" for letter in letters for other in letters]
    small(words)
    assert 0 < len(inside.cache) <= 5


class Wrapped:
    """open_clip's HFTokenizer around a tokenizer that is already there."""

    context_length = 8

    def __init__(self, inside: object) -> None:
        self.tokenizer = inside

    def __call__(self, texts: list[str], context_length: int | None = None) -> torch.Tensor:
        options = {"max_length": context_length, "padding": "max_length", "truncation": True}
        return self.tokenizer(texts, return_tensors="pt", **options).input_ids  # type: ignore[operator]


FLAT = """
import os, sys
import torch
from pretrain.data.texts import tokenizer

torch.set_num_threads(1)
tokenize, letters = tokenizer.build("ViT-B-32"), "abcdefghijklmnopqrstuvwxyz"


def captions(start, stop):
    for n in range(start, stop, 256):
        yield [" ".join("".join(letters[w // 26**k % 26] for k in range(5)) for w in range(10 * m, 10 * m + 10))
               for m in range(n, min(n + 256, stop))]


def run(start, stop):
    for texts in captions(start, stop):
        tokens = tokenize(texts)
        tokenize.truncated(texts, tokens)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


warm = run(0, 20_000)  # 200,000 words: the cache was full, emptied and full again
print(run(20_000, 60_000) - warm)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_many_distinct_words() -> None:
    """40,000 captions of 10 words that never came before: without a bound they take 60 MB, with it 2."""
    done = subprocess.run([sys.executable, "-c", FLAT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 20, f"{int(done.stdout) / 2**20:.1f} MB more after 400,000 words"


def test_travels_to_another_process(clip: tokenizer.Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(clip))
    assert torch.equal(copy(TEXTS), clip(TEXTS))
    assert copy.fingerprint == clip.fingerprint


def test_fingerprint_tells_tokenizers_apart(clip: tokenizer.Tokenizer) -> None:
    assert tokenizer.build("ViT-L-14").fingerprint == clip.fingerprint
    assert tokenizer.build("ViT-B-32", context_length=64).fingerprint != clip.fingerprint


def test_an_unknown_model_is_no_silent_default() -> None:
    with pytest.raises(UserError, match=r"model\.name 'ViT-B-33'"):
        tokenizer.build("ViT-B-33")


def test_a_tokenizer_that_drops_words_at_random_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    config["text_cfg"]["tokenizer_kwargs"] = {"reduction_mask": "random"}
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: config)
    with pytest.raises(UserError, match="at random"):
        tokenizer.build("ViT-B-32")
