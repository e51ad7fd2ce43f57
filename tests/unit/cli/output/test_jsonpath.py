"""-o jsonpath: what kubectl would print of the same document, and where a template is wrong."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cli.output.jsonpath import printed
from nodeagent.cli.output.jsonpath_syntax import parse
from nodeagent.errors import InputError

DOCUMENT: Any = {
    "kind": "List",
    "ready": True,
    "none": None,
    "items": [
        {"id": "a", "cpus": 4, "labels": {"x.y/z": "1", "b": "2"}, "pod": {"name": "till"}},
        {"id": "b", "cpus": 8, "labels": {}, "pod": {"name": "book"}},
        {"id": "c", "cpus": 2, "labels": {"b": "3"}},
    ],
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{.kind}", "List"),
        ("{$.kind}", "List"),
        ("{.ready} and {.none}", "true and null"),
        ("kind: {.kind}!", "kind: List!"),
        ("{.items[*].id}", "a b c"),
        ("{.items[*]['id','cpus']}", "a b c 4 8 2"),
        ("{.items[*]['id', 'pod.name']}", "a b c till book"),
        ("{.items[0].id}{.items[-1].id}", "ac"),
        ("{.items[0,2].id}", "a c"),
        ("{.items[1:].id}", "b c"),
        ("{.items[:2].id}", "a b"),
        ("{.items[0:3:2].id}", "a c"),
        ("{.items[0].labels.x\\.y/z}", "1"),
        ("{.items[0].labels['x\\.y/z']}", "1"),
        ("{.items[0].labels['x.y/z']}", ""),
        ("{.items[0]['pod.name']}", "till"),
        ("{.items[0].labels}", '{"x.y/z":"1","b":"2"}'),
        ("{.items[0].labels.*}", "1 2"),
        ("{..name}", "till book"),
        ("{..pod.name}", "till book"),
        ("{.items[?(@.cpus>2)].id}", "a b"),
        ("{.items[?(@.cpus<=2)].id}", "c"),
        ('{.items[?(@.id=="b")].cpus}', "8"),
        ("{.items[?(@.id!='b')].cpus}", "4 2"),
        ('{.items[?(@.pod.name=="till")].id}', "a"),
        ("{.items[?(@.pod)].id}", "a b"),
        ("{.items[?( @.cpus == 8 )].id}", "b"),
        ('{range .items[*]}{.id}={.cpus}{"\\n"}{end}', "a=4\nb=8\nc=2\n"),
        ("{range .items[*]}{.id}:{range .labels.*}{@},{end} {end}", "a:1,2, b: c:3, "),
        ('{.kind}{"\\t"}{.ready}', "List\ttrue"),
        ("{.missing}", ""),
        ("{.items[9].id}", ""),
        ("{.kind.name}", ""),
        ("{@}", json.dumps(DOCUMENT, separators=(",", ":"))),
    ],
)
def test_a_template_prints_what_kubectl_prints(template: str, expected: str) -> None:
    """As read in kubectl's source: a quoted name is a path, and several names give one group each."""
    assert printed(parse(template), DOCUMENT) == expected


@pytest.mark.parametrize(
    ("template", "place", "why"),
    [
        (".kind", 1, "expected a path in braces"),
        ("", 1, "expected a path in braces"),
        ("{.kind", 1, "a brace is not closed"),
        ("{}", 1, "expected a path between the braces"),
        ("{kind}", 2, "expected a path"),
        ("{.items[}", 9, "expected *, a number"),
        ("{.items[1:2:0]}", 9, "step 0"),
        ("{.items[?(@.a~2)]}", 14, "expected )"),
        ("{.items[?(@.a==)]}", 16, "expected a quoted text"),
        ("{.items['a]}", 9, "expected a name in quotes"),
        ("{.items[?(@.a=~2)]}", 14, "expected )"),
        ("{range .items[*]}{.id}", 23, "lacks its {end}"),
        ("{.id}{end}", 6, "no range to end"),
        ("{.items[(@.length-1)]}", 9, "expected *, a number"),
        ('{"\\q"}', 3, "unknown escape"),
        ("{.a.}", 5, "expected a name"),
    ],
)
def test_a_wrong_template_is_refused_with_its_place(template: str, place: int, why: str) -> None:
    with pytest.raises(InputError) as refused:
        parse(template)
    assert f"at character {place}," in str(refused.value) and why in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.sampled_from("abc"), below, max_size=3),
    max_leaves=20,
)


@given(st.text(alphabet="{}[].*@$?()'\"\\,:-012abrangeed =<>!", max_size=40), JSON)
def test_any_text_is_a_template_or_is_refused(template: str, document: Any) -> None:
    with contextlib.suppress(InputError):
        printed(parse(template), document)


@given(JSON, st.lists(st.sampled_from("abc"), max_size=3))
def test_a_path_of_names_is_that_of_the_document(document: Any, names: list[str]) -> None:
    """Compared with plain look-ups."""
    value: Any = document
    for name in names:
        value = value.get(name, ...) if isinstance(value, dict) else ...
    path = "{@" + "".join(f".{name}" for name in names) + "}"
    shown = "" if value is ... else value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    assert printed(parse(path), document) == shown
