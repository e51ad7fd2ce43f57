"""What `nodeagent doctor` asks the running machine: real disks, the real clock, real programs and ports."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from nodeagent.cli.node.doctor import probes
from nodeagent.cli.node.doctor.probes import Probes
from nodeagent.errors import HostError


def test_a_folder_that_is_still_to_be_made_has_the_space_of_the_one_above(tmp_path: Path) -> None:
    space = Probes().space(tmp_path / "not" / "yet")
    assert space.path == str(tmp_path) and space.kind
    assert 0 < space.free_bytes <= shutil.disk_usage(tmp_path).total


def test_the_time_of_an_fsync_is_measured_and_leaves_no_file(tmp_path: Path) -> None:
    assert Probes().sync_s(tmp_path) > 0
    assert not list(tmp_path.iterdir())


def test_the_kernels_clock_can_be_asked_by_any_user() -> None:
    assert Probes().clock_is_synchronised() in (True, False)


def test_a_port_answers_while_a_program_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert Probes().answers("127.0.0.1", port)
    assert not Probes().answers("127.0.0.1", port)


def test_a_program_prints_its_version() -> None:
    assert Probes().output(sys.executable, "--version").startswith("Python 3.")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("/nonexistent/program",), "No such file"),
        ((sys.executable, "-c", "import sys; sys.exit('out of order')"), "out of order"),
        ((sys.executable, "-c", "raise SystemExit(7)"), "exit 7"),
    ],
)
def test_a_program_that_fails_is_an_error_with_its_reason(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(HostError, match=why):
        Probes().output(*words)


def test_a_program_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROGRAM_S", 0.1)
    with pytest.raises(HostError, match=r"does not end within 0.1 s"):
        Probes().output("sleep", "infinity")


def test_the_library_is_tried_in_a_process_of_its_own() -> None:
    """Where it is missing, the reason names it."""
    assert "libnvidia-ml" in (Probes().library_error() or "libnvidia-ml")
