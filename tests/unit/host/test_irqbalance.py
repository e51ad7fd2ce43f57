"""What irqbalance leaves alone, asked of a server that answers as irqbalance does."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError
from nodeagent.host.irq import irqbalance
from nodeagent.host.irq.irqbalance import bans
from nodeagent.host.sysfs.sysfs import SysFs

PID = 77
BANNED = "IRQ 24 LOAD 17 DIFF 3 CLASS 5 IRQ 131 LOAD 0 DIFF 0 CLASS 1 "


def running(root: Path, name: str = "irqbalance") -> None:
    folder = root / f"proc/{PID}"
    folder.mkdir(parents=True)
    (folder / "comm").write_text(f"{name}\n")
    (folder / "cmdline").write_text("/usr/sbin/irqbalance\0--foreground\0")


@contextlib.contextmanager
def answering(root: Path, answer: bytes, *, hangs: bool = False) -> Iterator[list[bytes]]:
    """A socket that answers root's "setup" once, as sock_handle of irqbalance.c does: without credentials of root it
    closes the connection. Yield what was asked."""
    running(root)
    path, asked, done = root / f"run/irqbalance/irqbalance{PID}.sock", list[bytes](), threading.Event()
    path.parent.mkdir(parents=True)

    def serve(server: socket.socket) -> None:
        peer, _ = server.accept()
        with peer:
            data, control, _, _ = peer.recvmsg(16384, socket.CMSG_SPACE(struct.calcsize("3i")))
            asked.append(data)
            uids = [struct.unpack("3i", one)[1] for _, kind, one in control if kind == socket.SCM_CREDENTIALS]
            if hangs:
                done.wait(60)
            elif uids == [os.geteuid()] and data.startswith(b"setup"):
                peer.sendall(answer)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        server.listen(1)
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        try:
            yield asked
        finally:
            done.set()
            thread.join()


def test_it_says_which_cpus_and_interrupts_it_has_banned(folder: Path) -> None:
    with answering(folder, f"SLEEP 10 {BANNED}BANNED 00000001,000000f0".encode()) as asked:
        found = bans(SysFs(folder))
    assert asked == [b"setup"]
    assert found is not None and (found.cpus, found.irqs) == (CpuSet([4, 5, 6, 7, 32]), frozenset({24, 131}))


def test_it_may_have_banned_nothing(folder: Path) -> None:
    with answering(folder, b"SLEEP 10 BANNED 00000000"):
        found = bans(SysFs(folder))
    assert found is not None and (found.cpus, found.irqs) == (CpuSet(), frozenset())


def test_where_it_does_not_run_there_are_no_bans(folder: Path) -> None:
    assert bans(SysFs(folder)) is None
    running(folder, "irqbalance-ui")
    assert bans(SysFs(folder)) is None


@pytest.mark.parametrize("answer", [b"", b"SLEEP 10 ", b"BANNED 1", b"SLEEP 10 IRQ 24 BANNED 1", b"SLEEP 1 BANNED xyz"])
def test_an_answer_of_another_form_is_an_error(folder: Path, answer: bytes) -> None:
    with answering(folder, answer), pytest.raises(HostError, match="cannot read"):
        bans(SysFs(folder))


def test_no_socket_and_no_answer_are_errors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running(folder)
    with pytest.raises(HostError, match=r"cannot ask irqbalance at .*irqbalance77.sock: No such file"):
        bans(SysFs(folder))
    monkeypatch.setattr(irqbalance, "ANSWER_S", 0.05)
    other = folder / "b"
    with answering(other, b"", hangs=True), pytest.raises(HostError, match=r"cannot ask irqbalance at .*: timed out"):
        bans(SysFs(other))
