"""What systemd is told over its private socket."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.systemd import units
from tests.doubles.systemd import FakeSystemd

UNIT = "kubepods-podu_1.slice"
ACCEPTED = (
    b"l\x01\x00\x01B\x00\x00\x00\x01\x00\x00\x00\x85\x00\x00\x00"
    b"\x01\x01o\x00\x19\x00\x00\x00/org/freedesktop/systemd1\x00\x00\x00\x00\x00\x00\x00"
    b"\x02\x01s\x00 \x00\x00\x00org.freedesktop.systemd1.Manager\x00\x00\x00\x00\x00\x00\x00\x00"
    b"\x03\x01s\x00\x11\x00\x00\x00SetUnitProperties\x00\x00\x00\x00\x00\x00\x00"
    b"\x08\x01g\x00\x07sba(sv)\x00\x00\x00\x00"
    b"\x15\x00\x00\x00kubepods-podu_1.slice\x00\x00\x00\x01\x00\x00\x00\x1a\x00\x00\x00\x00\x00\x00\x00"
    b"\x0b\x00\x00\x00AllowedCPUs\x00\x02ay\x00\x02\x00\x00\x00\xf8\x0f"
)
"""CPUs 3-11 for UNIT, as systemd 257 took it."""


def allow(root: Path, *cpus: str, unit: str = UNIT) -> list[str]:
    with contextlib.closing(units.Systemd(SysFs(root))) as systemd:
        return [systemd.allow(unit, CpuSet.parse(one)) for one in cpus]


async def test_a_slice_is_told_its_cpus_in_the_form_that_systemd_takes(tmp_path: Path) -> None:
    async with FakeSystemd(tmp_path / units.SOCKET) as systemd:
        await asyncio.to_thread(allow, tmp_path, "3-11")
        assert systemd.messages[0] == ACCEPTED


async def test_a_call_returns_when_systemd_has_written_what_it_was_told(tmp_path: Path) -> None:
    """It writes after its answer and before the answer to the next call."""
    async with FakeSystemd(tmp_path / units.SOCKET) as systemd:
        await asyncio.to_thread(allow, tmp_path, "0", "2-3,64,127")
        assert systemd.told == [(UNIT, {0}), (UNIT, {2, 3, 64, 127})]
        assert [b"Ping\0" in one for one in systemd.messages] == [False, True, False, True]


@pytest.mark.parametrize("length", range(20, 30))
async def test_names_of_every_length_arrive(tmp_path: Path, length: int) -> None:
    unit = "k" * (length - 6) + ".slice"
    async with FakeSystemd(tmp_path / units.SOCKET) as systemd:
        await asyncio.to_thread(allow, tmp_path, "1", unit=unit)
        assert systemd.told == [(unit, {1})]


async def test_what_systemd_refuses_is_said_with_its_words(tmp_path: Path) -> None:
    async with FakeSystemd(tmp_path / units.SOCKET) as systemd:
        systemd.refusal = f"Unit {UNIT} not found."
        assert await asyncio.to_thread(allow, tmp_path, "1") == [f"Unit {UNIT} not found."]
        systemd.refusal = ""
        assert await asyncio.to_thread(allow, tmp_path, "1") == [""]


async def test_a_systemd_that_takes_nobody_is_said(tmp_path: Path) -> None:
    async with FakeSystemd(tmp_path / units.SOCKET) as systemd:
        systemd.greeting = b"REJECTED\r\n"
        with pytest.raises(HostError, match=r"cannot reach .*/private: it answers b'REJECTED"):
            await asyncio.to_thread(allow, tmp_path, "1")


async def test_a_systemd_that_does_not_answer_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "CALL_S", 0.05)
    async with FakeSystemd(tmp_path / units.SOCKET) as systemd:
        systemd.silent = True
        with pytest.raises(HostError, match=f"cannot confine {UNIT} through .*/private: timed out"):
            await asyncio.to_thread(allow, tmp_path, "1")


def test_no_systemd_is_said(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=f"cannot reach {tmp_path}/run/systemd/private: No such file or directory"):
        allow(tmp_path, "1")
