"""Quantities, as Kubernetes reads them, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nodeagent.core.model.quantity import LARGEST_QUANTITY, format_size, parse_quantity, parse_size
from nodeagent.errors import InputError

FACTORS = {
    **{name: Fraction(10) ** power for name, power in zip("num", (-9, -6, -3), strict=True)},
    **{name: Fraction(10) ** power for name, power in zip(("", *"kMGTPE"), range(0, 21, 3), strict=True)},
    **{f"{name}i": Fraction(1 << (10 * power)) for power, name in enumerate("KMGTPE", start=1)},
}
NUMBERS = st.from_regex(r"[+]?([0-9]{1,20}(\.[0-9]{0,12})?|\.[0-9]{1,12})", fullmatch=True)
SUFFIXES = st.sampled_from(sorted(FACTORS)) | st.from_regex(r"[eE][+-]?[0-9]{1,2}", fullmatch=True)


def exactly(number: str, suffix: str) -> Fraction:
    """What a quantity is worth, rounded up to a billionth as Kubernetes does."""
    digits = number.lstrip("+")
    value = Fraction(f"0{digits}" if digits.startswith(".") else digits)
    factor = FACTORS[suffix] if suffix in FACTORS else Fraction(10) ** int(suffix[1:])
    return Fraction(math.ceil(value * factor * 10**9), 10**9)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("4000m", 4),
        ("512Mi", 512 << 20),
        ("1e3", 1000),
        ("1E3", 1000),
        ("1E", 10**18),
        ("7Ei", 7 << 60),
        ("0.5Gi", 1 << 29),
        (".5Ki", 512),
        ("1.", 1),
        ("2k", 2000),
        ("1e+3", 1000),
        ("1500e-2", 15),
        ("00012", 12),
        ("+4", 4),
        ("-0", 0),
        ("0e99", 0),
        ("0n", 0),
        ("3.9999999999", 4),  # finer than a billionth is rounded up
        ("9223372036854775807", LARGEST_QUANTITY),
    ],
)
def test_a_quantity_means_what_kubernetes_means(text: str, value: int) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected a number"),
        ("Mi", "expected a number"),
        (".", "expected a number"),
        ("+", "expected a number"),
        ("1 Mi", "expected a number"),
        ("1mi", "expected a number"),
        ("1K", "expected a number"),
        ("1kB", "expected a number"),
        ("1e", "expected a number"),
        ("1ee3", "expected a number"),
        ("1e3Mi", "expected a number"),
        ("0x10", "expected a number"),
        ("1_000", "expected a number"),
        ("٣", "expected a number"),
        ("1\n", "expected a number"),
        ("1" * 200, "expected a number"),
        ("-1", "it is negative"),
        ("-1m", "it is negative"),
        ("100m", "it is not a whole number"),
        ("100n", "it is not a whole number"),
        ("1e-999999999999", "it is not a whole number"),
        ("1.0000000001", "it is not a whole number"),
        ("8Ei", "it is larger than 9223372036854775807"),
        ("9223372036854775808", "it is larger than 9223372036854775807"),
        ("1e999999999999", "it is larger than 9223372036854775807"),
    ],
)
def test_what_is_no_amount_is_refused_with_its_text(text: str, why: str) -> None:
    with pytest.raises(InputError) as error:
        parse_quantity(text)
    assert str(error.value).startswith(f'cannot read quantity "{text[:40]}": {why}')


@given(number=NUMBERS, suffix=SUFFIXES)
@example(number=".0000000001", suffix="E")
@example(number="0.9999999999", suffix="Ki")
def test_every_quantity_is_exact_or_refused(number: str, suffix: str) -> None:
    value = exactly(number, suffix)
    try:
        found = parse_quantity(number + suffix)
    except InputError as error:
        assert value.denominator != 1 or value > LARGEST_QUANTITY, error
    else:
        assert found == value


@given(st.text(max_size=20) | st.text(alphabet="0123456789.eE+-numkKMGTPi", max_size=12))
def test_any_text_is_a_number_or_an_input_error(text: str) -> None:
    try:
        assert 0 <= parse_quantity(text) <= LARGEST_QUANTITY
    except InputError as error:
        assert str(error).startswith("cannot read quantity")


@given(st.integers(min_value=1, max_value=1 << 60))
def test_a_size_that_was_written_is_read_again(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert parse_quantity(text) == size_bytes
    if len(text) < 18:
        assert parse_size(text) == size_bytes
