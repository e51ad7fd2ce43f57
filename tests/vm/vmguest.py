"""One QEMU guest: booted, asked, driven through QMP, ended.

Promises: one guest at a time on a machine (a lock; NODEAGENT_VM_LOCK names another, for a guest on another core); no
call waits beyond its limit or the guest's life; a guest that hangs at boot is started once more, which is printed. The
folder `share` is /share in the guest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from tests.vm import vmmachine

QEMU = "qemu-system-x86_64"
LOCK = Path(tempfile.gettempdir()) / os.environ.get("NODEAGENT_VM_LOCK", "nodeagent-vm.lock")
BOOT_S, REBOOT_S, LIFE_S, LOCK_S = 240.0, 480.0, 1800.0, 2700.0
POLL_S = 0.05
_own: list[Path] = []
"""What this process has locked."""
ACCELERATOR = "tcg,thread=single"
"""With thread=multi a boot in ten hangs (RCU stall); /dev/kvm may be there and fail."""
KERNEL = (
    "console=ttyS0 root=/dev/vda panic=-1 quiet mitigations=off no_timer_check tsc=reliable cryptomgr.notests "
    "init_on_alloc=0 systemd.show_status=0 intel_iommu=on"
)


class GuestError(Exception):
    """The guest did not come, answer or do what it was told."""


class _Line:
    """Lines of JSON over a unix socket that QEMU serves."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._socket = _connected(path, deadline)
        self._buffered = b""

    def send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, deadline: float) -> Any:
        """The next line; GuestError at the deadline (time.monotonic) or the end."""
        while b"\n" not in self._buffered:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                more = self._socket.recv(1 << 16)
            except OSError as error:
                raise GuestError(f"cannot read from the guest: {error!r}") from None
            if not more:
                raise GuestError("cannot read from the guest: it has ended")
            self._buffered += more
        line, self._buffered = self._buffered.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        self._socket.close()


def _connected(path: Path, deadline: float) -> socket.socket:
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(str(path))
            return line
        except OSError as error:
            line.close()
            if time.monotonic() > deadline:
                raise GuestError(f"cannot reach {path}: {error}") from None
            time.sleep(POLL_S)


class Guest:
    """A context manager: entered, the guest has booted; left, it is gone."""

    def __init__(self, image: Path, share: Path, *, life_s: float = LIFE_S, devices: Sequence[str] = ()) -> None:
        """`image` is what vmimage made; `life_s` ends every wait, counted from the boot; `devices` are more arguments
        of QEMU's."""
        self.share = share
        self.version = qemu_version()
        self.topology = vmmachine.big(self.version)
        self.boot_s = 0.0
        self._image, self._life_s, self._devices = image, life_s, devices
        self._stack, self._machine = contextlib.ExitStack(), contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._stack.enter_context(_alone())
            self._stack.enter_context(self._machine)
            self._boot_twice()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # What can be asked of it

    def run(self, command: str, limit_s: float = 180.0, *, until: bool = False) -> str:
        """What a shell command prints; GuestError where it fails. until: it is repeated until it succeeds."""
        said = self._ask({"command": command, "limit_s": limit_s, "until": until}, limit_s + 10)
        if said["rc"]:
            raise GuestError(f"{command!r} ended with {said['rc']}:\n{said['out']}")
        out: str = said["out"]
        return out

    def kubelet(self, do: str, limit_s: float = 180.0, **arguments: Any) -> dict[str, Any]:
        """One call to the kubelet in the guest (inside/kubelet.py); GuestError with its state where it fails."""
        if do == "until":
            arguments = {"has": [], "lacks": [], "shown": [], "gone": [], "limit_s": limit_s, **arguments}
        said: dict[str, Any] = self._ask({"kubelet": {"do": do, **arguments}}, limit_s + 10)
        return said

    def qmp(self, execute: str, **arguments: Any) -> Any:
        """One command to QEMU; names with a hyphen are written with an underscore."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._monitor.send({"execute": execute, "arguments": named})
        while True:
            said = self._monitor.receive(self._deadline(30.0))
            if "error" in said:
                raise GuestError(f"cannot {execute} {named}: {said['error']['desc']}")
            if "return" in said:
                return said["return"]

    def plug(self, driver: str, name: str, **properties: Any) -> None:
        self.qmp("device_add", driver=driver, id=name, **properties)

    def unplug(self, name: str) -> None:
        """The guest's kernel lets it go about five seconds later: the attention button of PCI Express."""
        self.qmp("device_del", id=name)

    def reboot(self) -> None:
        """As systemd does it; return when it is up again. What was in memory is gone, the disk is as it was left."""
        self.qmp("set-action", reboot="reset")
        self._control.send({"command": "systemctl --no-block reboot", "limit_s": 60.0, "until": False})
        deadline = self._deadline(REBOOT_S)
        while "up_s" not in self._control.receive(deadline):
            pass

    # Its life

    def _ask(self, request: dict[str, Any], limit_s: float) -> Any:
        self._control.send(request)
        said = self._control.receive(self._deadline(limit_s))
        if "error" in said:
            raise GuestError(f"{request}: {json.dumps(said, indent=1)[:4000]}")
        return said

    def _deadline(self, limit_s: float) -> float:
        return min(time.monotonic() + limit_s, self._ends_at)

    def _boot_twice(self) -> None:
        try:
            self._boot()
        except GuestError as error:
            self._machine.close()
            print(f"vm: the guest hung at boot and is started once more: {error}", file=sys.stderr, flush=True)
            self._boot()

    def _boot(self) -> None:
        started = time.monotonic()
        self._ends_at = started + self._life_s
        sockets = Path(self._machine.enter_context(tempfile.TemporaryDirectory(prefix="na-vm-")))
        log = self._machine.enter_context((self.share / "out" / "qemu.log").open("w"))
        process = subprocess.Popen(self._arguments(sockets), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._machine.callback(_end, process)
        self._monitor = _Line(sockets / "qmp", started + 20)
        self._machine.callback(self._monitor.close)
        self._monitor.receive(started + 20)
        self.qmp("qmp_capabilities")
        self._control = _Line(sockets / "control", started + 20)
        self._machine.callback(self._control.close)
        self._control.receive(started + BOOT_S)
        self.boot_s = time.monotonic() - started

    def _arguments(self, sockets: Path) -> list[str]:
        disk = f"file={self._image}/root.img,if=none,id=root,format=raw,snapshot=on"
        return [
            *(QEMU, "-accel", ACCELERATOR, "-machine", "q35,hmat=on", "-cpu", "max,vendor=GenuineIntel"),
            *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{self.share}/out/console.log"),
            *("-kernel", f"{self._image}/vmlinux", "-initrd", f"{self._image}/initrd.img", "-append", KERNEL),
            *("-drive", disk, "-device", "virtio-blk-pci,drive=root"),
            *("-virtfs", f"local,path={self.share},mount_tag=share,security_model=none"),
            *("-qmp", f"unix:{sockets}/qmp,server=on,wait=off", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=control,path={sockets}/control,server=on,wait=off"),
            *("-device", "virtserialport,chardev=control,name=vm.control"),
            *vmmachine.arguments(self.topology, self.version),
            *self._devices,
        ]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def qemu_version() -> int:
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    found = re.search(r"version (\d+)", said)
    if found is None:
        raise GuestError(f"cannot read QEMU's version from {said!r}")
    return int(found[1])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Waits for another guest on this machine to end, unless it is this process's own."""
    if _own:
        raise GuestError("cannot boot a guest: another one of these tests lives")
    deadline = time.monotonic() + LOCK_S
    with LOCK.open("w") as held:
        said = False
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise GuestError(f"cannot have {LOCK}: another guest has had it for {LOCK_S:g} s") from None
                if not said:
                    print("vm: waiting for another guest on this machine to end", file=sys.stderr, flush=True)
                    said = True
                time.sleep(POLL_S)
        _own.append(LOCK)
        try:
            yield
        finally:
            _own.clear()
