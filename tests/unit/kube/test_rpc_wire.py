"""What gRPC puts into headers: deadlines and texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.kube.rpc.status import AbortedError, Code
from nodeagent.kube.rpc.wire import LONGEST_STATUS_BYTES, methods_of, status_of, status_text, timeout_s, timeout_text
from nodeagent.pb import dra_v1_pb2 as pb


@given(st.text() | st.text(" a"))
def test_a_text_survives_its_header(text: str) -> None:
    """Which is printable ASCII, whatever the text; a lone surrogate, which is no character, is escaped."""
    sent = status_text(text)
    assert all(0x20 <= one < 0x7F for one in sent)
    assert sent == sent.strip(b" ")
    expected = text.encode(errors="backslashreplace").decode()
    assert status_of({b"grpc-status": b"5", b"grpc-message": sent}) == (Code.NOT_FOUND, expected)


@given(st.text(min_size=1) | st.text(" a"), st.integers(1, 2 * LONGEST_STATUS_BYTES))
def test_a_text_that_is_too_long_is_cut_between_two_characters(piece: str, size: int) -> None:
    """And no sooner than it has to be."""
    text = (piece * (size // len(piece) + 1))[:size] if piece else " " * size
    text = text.encode(errors="backslashreplace").decode()
    sent = status_text(text)
    assert len(sent) <= LONGEST_STATUS_BYTES
    _, found = status_of({b"grpc-status": b"5", b"grpc-message": sent})
    if found != text:
        kept = found.removesuffix("…")
        assert text.startswith(kept) and found == f"{kept}…"
        assert len(status_text(text[: len(kept) + 1])) + len(status_text("…")) > LONGEST_STATUS_BYTES


@given(st.floats(0, 90_000))
def test_a_deadline_is_sent_to_the_millisecond_and_never_shortened(seconds: float) -> None:
    text = timeout_text(seconds)
    assert len(text) <= 9
    assert 0 <= timeout_s(text) - seconds <= 0.0011


def test_the_longest_deadline_fits_its_header() -> None:
    assert timeout_s(timeout_text(1e12)) == 99_999.999


@pytest.mark.parametrize(
    ("text", "seconds"), [(b"2H", 7200), (b"3M", 180), (b"5S", 5), (b"5m", 5e-3), (b"5u", 5e-6), (b"5n", 5e-9)]
)
def test_every_unit_is_read(text: bytes, seconds: float) -> None:
    assert timeout_s(text) == pytest.approx(seconds)


@given(st.binary(max_size=12))
def test_no_other_deadline_is(text: bytes) -> None:
    digits, unit = text[:-1], text[-1:]
    if unit in b"HMSmun" and unit and digits.isdigit() and len(digits) <= 8:
        timeout_s(text)
    else:
        with pytest.raises(AbortedError):
            timeout_s(text)


def test_methods_are_those_of_the_protocol() -> None:
    found = {one.path: (one.request, one.answer, one.streams) for one in methods_of(pb.DESCRIPTOR, "DRAPlugin")}
    assert found == {
        b"/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodePrepareResources": (
            pb.NodePrepareResourcesRequest,
            pb.NodePrepareResourcesResponse,
            False,
        ),
        b"/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodeUnprepareResources": (
            pb.NodeUnprepareResourcesRequest,
            pb.NodeUnprepareResourcesResponse,
            False,
        ),
    }
