"""What `make demo` does to the host: nothing unasked, and what it was asked for is undone, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from demo import demo
from tests.builders.machines import machine
from tests.support.paths import CHECKOUT

MIB2 = 2 << 20
NODE = "sys/devices/system/node/node0/hugepages/hugepages-2048kB"


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pool of a machine with 7 pages, of which 3 are free."""
    machine(tmp_path, "1s1n2c", hugepages={(0, MIB2): (7, 3, 0)})
    monkeypatch.setattr(demo, "NODES", tmp_path / "sys/devices/system/node")
    monkeypatch.delenv("DEMO_HUGEPAGES", raising=False)
    return tmp_path / NODE / "nr_hugepages"


def test_no_pool_is_changed_unasked(pool: Path) -> None:
    pages = demo.Hugepages()
    assert pages.find() == "8 free pages of 2 MiB are needed; DEMO_HUGEPAGES=1 lets the demonstration reserve them"
    assert pool.read_text() == "7\n"
    pages.put_back()
    assert pool.read_text() == "7\n"


def test_a_pool_that_was_asked_for_is_put_back(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_HUGEPAGES", "1")
    pages = demo.Hugepages()
    pages.find()
    assert pool.read_text() == "12", "5 pages more, so that 8 are free"
    pages.put_back()
    assert pool.read_text() == "7"


def test_a_pool_that_may_not_be_written_is_named_and_not_written_back(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any user but root: no traceback."""
    monkeypatch.setenv("DEMO_HUGEPAGES", "1")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    pages = demo.Hugepages()
    assert pages.find() == f"cannot write {pool}: Permission denied"
    pages.put_back()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_pool_is_put_back_after_an_interruption(pool: Path, how: signal.Signals) -> None:
    code = (
        "import pathlib, signal, sys; from demo import demo; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"demo.NODES = pathlib.Path({str(pool.parents[3])!r}); sys.exit(demo.run())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env={**os.environ, "DEMO_HUGEPAGES": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("No hugepages in this demonstration")
        changed = pool.read_text()
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (130, False), errors
    assert (changed, pool.read_text()) == ("12", "7")
