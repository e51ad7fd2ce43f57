"""Accelerators on the bus `dsa` and their work queues: reading and writing, one file at a time. Decides nothing.

Source: Documentation/ABI/stable/sysfs-driver-dma-idxd, drivers/dma/idxd/sysfs.c and cdev.c. Enabling is binding to a
driver: an accelerator to `idxd`, a queue to the one that its type says; disabling is unbinding. A write can hang while
a queue is drained, and has a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nodeagent.core.dsa.division import USER, Accelerator, More, Wq
from nodeagent.errors import HostError
from nodeagent.host import pci
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut

BUS, DRIVERS = "sys/bus/dsa/devices", "sys/bus/dsa/drivers"
NODE_S, POLL_S = 3.0, 0.02
"""How long the node of a queue that was enabled may take to appear."""


WQ_ZEROS = "block_on_fault", "ats_disable", "prs_disable"
WQ_DEFAULTS = "max_transfer_size", "max_batch_size", "enqcmds_retries", "op_config"
GROUP_ZEROS = "read_buffers_reserved", "use_read_buffer_limit", "desc_progress_limit", "batch_progress_limit"
GROUP_DEFAULTS = "read_buffers_allowed", "traffic_class_a", "traffic_class_b"
OLD_NAMES = {
    "read_buffers_reserved": "tokens_reserved",
    "use_read_buffer_limit": "use_token_limit",
    "read_buffers_allowed": "tokens_allowed",
    "read_buffer_limit": "token_limit",
}
"""As kernels before 5.17 call them. Later ones have both, and log that the old one was read."""
LIMITS = ("read_buffer_limit",)
"""Of an accelerator."""


def numbers_of(path: str) -> tuple[int, int] | None:
    """Return the major and the minor number of a character device, or None if there is none at a path."""
    with contextlib.suppress(OSError):
        found = Path(path).stat()
        if stat.S_ISCHR(found.st_mode):
            return os.major(found.st_rdev), os.minor(found.st_rdev)
    return None


class Accelerators:
    """Those of this machine. Every method blocks."""

    def __init__(
        self,
        sysfs: SysFs,
        put: TimedPut | None = None,
        numbers_of: Callable[[str], tuple[int, int] | None] = numbers_of,
    ) -> None:
        """numbers_of: returns those of a character device, as the function of that name."""
        self._sysfs = sysfs
        self._put = put or TimedPut()
        self._numbers_of = numbers_of

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield the address and the name of each. Raise HostError if they cannot be listed: that is not to have
        none."""
        for name in self._sysfs.names(BUS):
            address, tail = pci.split(self._sysfs.entry(BUS, name))
            if address is not None and tail == name:
                yield address, name

    def find(self, address: str) -> Accelerator | None:
        """Return the accelerator of a PCI function, or None if no driver has it. Raise HostError if it cannot be read
        whole."""
        name = next((name for at, name in self.places() if at == address), None)
        return self.read(address, name) if name is not None else None

    def read(self, address: str, name: str) -> Accelerator:
        """Return an accelerator. Raise HostError."""
        path = self._sysfs.entry(BUS, name)
        number = name.lstrip("abcdefghijklmnopqrstuvwxyz")
        wqs = self._sysfs.numbered(path, f"wq{number}.")
        return Accelerator(
            address=address,
            name=name,
            state=self._sysfs.text(f"{path}/state"),
            driver=self._sysfs.link_name(f"{path}/driver") or "",
            configurable=self._number(f"{path}/configurable") == 1,
            pasid=self._sysfs.number(f"{path}/pasid_enabled", 0) == 1,
            total=self._number(f"{path}/max_work_queues_size"),
            wqs=tuple(self._wq(one, index, number) for index, (_, one) in enumerate(wqs)),
            engines=tuple(self._number(f"{one}/group_id") for _, one in self._sysfs.numbered(path, f"engine{number}.")),
            groups=tuple(
                self._more(one, GROUP_ZEROS, GROUP_DEFAULTS) for _, one in self._sysfs.numbered(path, f"group{number}.")
            ),
            more=self._more(path, LIMITS, ()),
        )

    def _more(self, path: str, zeros: tuple[str, ...], defaults: tuple[str, ...]) -> More:
        return More(
            zeros=tuple(self._if_shown(path, file) for file in zeros),
            defaults=tuple(self._if_shown(path, file) for file in defaults),
        )

    def _if_shown(self, path: str, file: str) -> str:
        """Return a file's text, or "" where this hardware or kernel has none: some are there, and cannot be read."""
        try:
            found = self._sysfs.text(f"{path}/{file}", None)
            old = OLD_NAMES.get(file)
            return found if found is not None else self._sysfs.text(f"{path}/{old}", "") if old is not None else ""
        except HostError as error:
            if os.strerror(errno.EOPNOTSUPP) in str(error):
                return ""
            raise

    def _wq(self, path: str, index: int, number: str) -> Wq:
        name = path.rpartition("/")[2]
        if name != f"wq{number}.{index}":
            raise HostError(f"cannot read {self._sysfs.path(path)}: there is no wq{number}.{index} before it")
        return Wq(
            name=name,
            label=self._sysfs.text(f"{path}/name"),
            type=self._sysfs.text(f"{path}/type"),
            mode=self._sysfs.text(f"{path}/mode"),
            state=self._sysfs.text(f"{path}/state"),
            size=self._number(f"{path}/size"),
            group=self._number(f"{path}/group_id"),
            priority=self._number(f"{path}/priority"),
            threshold=self._number(f"{path}/threshold"),
            driver_name=self._sysfs.text(f"{path}/driver_name", ""),
            driver=self._sysfs.link_name(f"{path}/driver") or "",
            clients=self._number(f"{path}/clients"),
            more=self._more(path, WQ_ZEROS, WQ_DEFAULTS),
        )

    def _number(self, path: str) -> int:
        found = self._sysfs.number(path)
        if found is None:
            raise HostError(f"cannot read {self._sysfs.path(path)}: there is no number")
        return found

    def why_read_only(self, seen: Accelerator) -> str:
        """Return why the agent cannot make queues of an accelerator, whatever they are, or ""."""
        bind = f"{DRIVERS}/{USER}/bind"
        if not self._sysfs.exists(bind):
            return f"the kernel has no driver `{USER}` on the bus dsa"
        sizes = (f"{self._sysfs.entry(BUS, seen.name)}/{one.name}/size" for one in seen.wqs[:1])
        for path in (bind, *sizes):
            if not os.access(self._sysfs.path(path), os.W_OK):
                return f"the agent may not write {self._sysfs.path(path)}; under systemd, nodeagent-dsa.conf allows it"
        return ""

    # ---------------------------------------------------------------- writing

    def set(self, seen: Accelerator, part: str, file: str, value: str | int) -> None:
        """Write a file of a queue or an engine. Raise HostError."""
        self._write(seen, f"{self._sysfs.entry(BUS, seen.name)}/{part}/{file}", str(value))

    def has(self, seen: Accelerator, part: str, file: str) -> bool:
        """Return whether a queue has a file."""
        return self._sysfs.exists(f"{self._sysfs.entry(BUS, seen.name)}/{part}/{file}")

    def bind(self, seen: Accelerator, part: str, driver: str) -> None:
        """Enable a queue, or the accelerator by its own name. Raise HostError."""
        self._write(seen, f"{DRIVERS}/{driver}/bind", part)

    def unbind(self, seen: Accelerator, part: str, driver: str) -> None:
        """Disable a queue, or the accelerator by its own name. Raise HostError."""
        self._write(seen, f"{DRIVERS}/{driver}/unbind", part)

    def node(self, seen: Accelerator, wq: str) -> str:
        """Return the node of a queue that is enabled. Raise HostError if it does not appear, or something else is
        there: an older node, or a file."""
        path, until_s = seen.node_of(wq), time.monotonic() + NODE_S
        folder = self._sysfs.entry(BUS, seen.name)
        numbers = self._number(f"{folder}/cdev_major"), self._number(f"{folder}/{wq}/cdev_minor")
        while (found := self._numbers_of(self._sysfs.path(path[1:]))) != numbers:
            if time.monotonic() > until_s:
                what = f"there is no character device {numbers[0]}:{numbers[1]} at {path} after {NODE_S:g} s"
                other = f", but {found[0]}:{found[1]}" if found is not None else ""
                raise HostError(f"cannot find the node of {wq}: {what}{other}")
            time.sleep(POLL_S)
        return path

    def _write(self, seen: Accelerator, path: str, text: str) -> None:
        bound = (f" {one}" for one in (seen.name, *(wq.name for wq in seen.wqs)))
        if any(map(self._put.hangs, (f"/{seen.name}/", *bound))):
            raise HostError(f"cannot change {seen.name}: an earlier write has not ended")
        try:
            self._put(self._sysfs.path(path), text)
        except HostError as error:
            said = self._sysfs.text(f"{BUS}/{seen.name}/cmd_status", "")
            raise HostError(f"{error}{f' (cmd_status {said})' if said not in ('', '0x0', '0') else ''}") from None
