"""The part of CEL that is known, on a device; all else is refused."""

from __future__ import annotations

import pytest

from nodeagent.core.advice.cel import CelError, Quantity, parse
from nodeagent.errors import InputError

DEVICE = {
    "driver": "d.dev",
    "allowMultipleAllocations": False,
    "attributes": {"d.dev": {"kind": "gpu", "index": 3, "ready": True}},
    "capacity": {"d.dev": {"memory": Quantity(80 << 30)}},
}
A, C = 'device.attributes["d.dev"]', 'device.capacity["d.dev"]'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('device.driver == "d.dev"', True),
        ("device.driver != 'd.dev'", False),
        (f'{A}.kind == "gpu" && {A}.index >= 3', True),
        (f'!({A}.kind == "gpu") || {A}.ready', True),
        (f"!{A}.ready == false", True),
        (f'{A}.kind in ["gpu", "nic"]', True),
        (f'"kind" in {A} && !("colour" in {A})', True),
        (f"has({A}.kind) && !has({A}.colour)", True),
        ('has(device.attributes["other.dev"].kind)', False),
        (f'{C}.memory.compareTo(quantity("70Gi")) >= 0', True),
        (f'{C}.memory.isLessThan(quantity("80Gi"))', False),
        (f'{C}.memory == quantity("80Gi")', True),
        (f'{A}.kind.startsWith("g") && {A}.kind.endsWith("u") && {A}.kind.contains("p")', True),
        (f'{A}.index == "3"', False),
        (f"{A}.ready != 1", True),
        (f'false && {A}.colour == "red"', False),
        (f'{A}.colour == "red" && false', False),
        (f'{A}.colour == "red" || true', True),
        ("device.allowMultipleAllocations", False),
        ('"a\\"b" == \'a"b\'', True),
    ],
)
def test_what_is_known_gives_what_cel_gives(text: str, expected: bool) -> None:
    assert parse(text).matches(DEVICE) is expected


@pytest.mark.parametrize(
    "text",
    [f'{A}.colour == "red"', f"{A}.kind < 3", "'x'", f"{A}.index && true", f'{C}.memory > quantity("1")', "1 in 2"],
)
def test_what_fails_in_cel_fails(text: str) -> None:
    with pytest.raises(CelError):
        parse(text).matches(DEVICE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "device.driver ==",
        "device.driver == 'a' ? true : false",
        f"{A}.index + 1 == 4",
        f'{A}["kind"] == "gpu"',
        f'{A}.kind.matches("g.*")',
        f"{A}.?kind.orValue('') == 'gpu'",
        'semver("1.0.0").isGreaterThan(semver("0.1.0"))',
        "device.name == 'x'",
        f"{A}.exists(a, a == 'kind')",
        "1.5 == 1.5",
        "'\\q' == 'q'",
        "(true",
        "[1, 2",
    ],
)
def test_what_is_not_known_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(InputError, match="cannot evaluate the CEL"):
        parse(text)
