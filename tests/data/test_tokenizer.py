"""Token for token what open_clip gives, in bounded memory, with truncation counted."""

from __future__ import annotations

import pickle

import pytest
import torch

from pretrain.compat import open_clip
from pretrain.data import tokenizer
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
