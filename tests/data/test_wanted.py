"""What objectives need, and metadata as columns of one shape on every rank."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.data import wanted
from pretrain.data.images.decode import BadSample
from pretrain.data.wanted import Field, Wanted
from pretrain.errors import UserError

NAN = math.nan


def objective(*needs: str) -> Any:
    return SimpleNamespace(needs=frozenset(needs))


def test_needs_are_read() -> None:
    needs = [
        "meta:boxes:10x4:float",
        "captions:4",
        "meta:label",
        "image_views:2",
        "text_views:3",
        "meta:l:text",
        "meta:t:5",
    ]
    assert Wanted.of(needs) == Wanted(
        4, 2, 3, (Field("boxes", "float", (10, 4)), Field("l", "text"), Field("label"), Field("t", "int", (5,)))
    )
    assert Wanted.of(reversed(needs)) == Wanted.of(needs)
    assert Wanted.of([]) == Wanted()
    assert not Wanted.of([])
    assert Wanted.of(["text_views:1"])


def test_objectives_share_what_they_need() -> None:
    needy = [
        objective("captions:4", "meta:label"),
        objective(),
        objective("captions:2", "text_views:1", "meta:label:int"),
    ]
    assert wanted.of_objectives(needy) == Wanted(4, 0, 1, (Field("label"),))
    assert wanted.of_objectives([]) == Wanted()


@pytest.mark.parametrize(
    "need", ["", "captions", "captions:", "captions:0", "captions:-1", "captions:1.5", "captions:4:float", "views:2",
             "meta", "meta:", "meta:a:long", "meta:a:float:3", "meta:a:0", "meta:a:3x", "meta:a:3:float:x",
             "Captions:4"],
)  # fmt: skip
def test_an_unknown_need_names_its_objective_and_what_there_is(need: str) -> None:
    with pytest.raises(UserError, match=r"^objective SimpleNamespace needs '.*'.*captions:COUNT.*meta:FIELD") as caught:
        wanted.of_objectives([objective(need)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("needs", [["meta:a", "meta:a:float"], ["meta:a:3", "meta:a:4"], ["meta:a", "meta:a:text"]])
def test_one_field_in_two_forms_is_refused(needs: list[str]) -> None:
    with pytest.raises(UserError, match="meta:a is needed as"):
        Wanted.of(needs)
    with pytest.raises(UserError, match="meta:a is needed as"):
        wanted.of_objectives([objective(needs[0]), objective(needs[1])])


@pytest.mark.parametrize(
    ("need", "values", "expected"),
    [
        ("meta:x", [3, None, True, 4.0, -5], [3, -1, 1, 4, -5]),
        ("meta:x:float", [0.5, None, 3, NAN], [0.5, NAN, 3.0, NAN]),
        ("meta:x:3", [[1, 2, 3, 4], [5], None, []], [[1, 2, 3], [5, -1, -1], [-1] * 3, [-1] * 3]),
        ("meta:x:2x2:float", [[[1, 2], [3, 4], [5, 6]], [[7, None, 9]]], [[[1, 2], [3, 4]], [[7, NAN], [NAN, NAN]]]),
    ],
)
def test_columns(need: str, values: list[Any], expected: list[Any]) -> None:
    fields = Wanted.of([need]).fields
    metas = [{"x": value} for value in values]
    found = wanted.columns(metas, fields)
    assert found.keys() == {"meta:x"}
    dtype = torch.float32 if need.endswith("float") else torch.int64
    torch.testing.assert_close(found["meta:x"], torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True)
    absent = wanted.columns([{}], fields)["meta:x"]
    assert absent.shape == (1, *fields[0].shape)
    assert wanted.columns([], fields)["meta:x"].shape == (0, *fields[0].shape)
    assert wanted.columns([], fields)["meta:x"].dtype == dtype


def test_texts_are_ids_that_are_the_same_everywhere() -> None:
    fields = Wanted.of(["meta:x:text"]).fields
    ids = wanted.columns([{"x": text} for text in ("en", "de", "en", "", None, "\ud800")], fields)["meta:x"].tolist()
    assert ids[0] == ids[2]
    assert len(set(ids)) == 5
    assert ids[4] == -1
    assert all(value >= 0 for value in ids[:4])
    assert ids[0] == 7433380151925236255, "kept by runs that go on: never to change"


@pytest.mark.parametrize(
    ("need", "value", "reason"),
    [
        ("meta:x", "3", "holds '3': an integer of 64 bits is needed"),
        ("meta:x", 3.5, "an integer"),
        ("meta:x", NAN, "an integer"),
        ("meta:x", math.inf, "an integer"),
        ("meta:x", 2**63, "an integer"),
        ("meta:x", [3], "an integer"),
        ("meta:x:float", "0.5", "a number within fp32"),
        ("meta:x:float", math.inf, "a number within fp32"),
        ("meta:x:float", 1e39, "a number within fp32"),
        ("meta:x:float", 10**400, "a number within fp32"),
        ("meta:x:text", 3, "a text is needed"),
        ("meta:x:2", 3, "a list is needed"),
        ("meta:x:2x2", [3], "a list is needed"),
        ("meta:x:2", [[3]], "an integer"),
        ("meta:x:2", {"a": 1}, "a list is needed"),
    ],
)
def test_other_values_are_bad_samples(need: str, value: Any, reason: str) -> None:
    fields = Wanted.of([need]).fields
    with pytest.raises(BadSample, match=f"the field 'x' .*{reason}"):
        wanted.refuse_bad({"x": value}, fields)
    with pytest.raises(BadSample, match=reason):
        wanted.columns([{"x": value}], fields)


class Source:
    """Five samples, the first of them bad."""

    def __init__(self, *metas: dict[str, Any]) -> None:
        self.metas = metas

    def __len__(self) -> int:
        return 1 + len(self.metas)

    def sample(self, number: int) -> Any:
        if not number:
            raise BadSample("no image")
        return SimpleNamespace(meta=self.metas[number - 1])


def test_a_field_that_no_sample_has_is_refused_before_the_run() -> None:
    source = Source({"label": 1, "url": "a", "score": None}, {"url": "b", "text": "c"})
    wanted.refuse_missing(Wanted.of(["meta:label", "captions:2"]), source)
    for need in ("meta:lable", "meta:score:float"):
        name = need.split(":")[1]
        with pytest.raises(
            UserError, match=f"{need[:8]}.* first 3 .* has '{name}' .*they have label, url, text"
        ) as caught:
            wanted.refuse_missing(Wanted.of([need]), source)
        assert "\n" not in str(caught.value)
    wanted.refuse_missing(Wanted(), Source())


def test_a_field_needed_as_what_it_is_not_is_refused_before_the_run() -> None:
    source = Source({"language": "en", "boxes": [[1, 2, 3, 4]]}, {"language": "de", "boxes": [[1, 2, 3, 4.5]]})
    for fits in ("meta:language:text", "meta:boxes:2x4:float", "meta:boxes:2x4"):  # one sample that fits is enough
        wanted.refuse_missing(Wanted.of([fits]), source)
    for need, why in (("meta:language", "holds 'en': an integer"), ("meta:boxes:float", "a number within fp32")):
        with pytest.raises(UserError, match=f"objective needs meta:.*{why}.*the need says it: meta:FIELD") as caught:
            wanted.refuse_missing(Wanted.of([need]), source)
        assert "\n" not in str(caught.value)
