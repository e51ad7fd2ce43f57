"""`nvme`: whether the kernel can speak to an NVMe controller. `smart`: what the controller says of itself.

Sources: for the file `state`, Documentation/ABI/testing/sysfs-nvme and nvme_sysfs_show_state in
drivers/nvme/host/sysfs.c (Linux 6.12); for the rest, the NVM Express base specification 2.0, Get Log Page, page 2
(SMART / Health Information), and include/uapi/linux/nvme_ioctl.h.

The log page is an admin command, for which the kernel wants CAP_SYS_ADMIN. Without it, or where /dev/nvmeN may not be
opened, `smart` says nothing. The command has the kernel's own timeout: with a shorter one the kernel would reset a
controller that is only slow.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, DeviceState
from nodeagent.host.health.source import Sight, Silence
from nodeagent.host.sysfs.lenient import Tolerant

SMART_S = 60.0
"""Between two reads of a log page, which is a command to the controller."""
_CONTROLLER = re.compile(r"nvme\d+")
_LIVE, _DEAD = "live", "dead"


class NvmeState:
    """The source `nvme`."""

    name = "nvme"
    period_s = 0.0

    def concerns(self, device: Device) -> bool:
        return device.kind == "nvme"

    def look(self, reader: Tolerant, device: Device) -> Sight | Silence:
        controller = device.attributes.get("controller", "")
        state = reader.text(f"sys/class/nvme/{controller}/state") if controller else None
        if state is None:
            return Silence.NOTHING_TO_SEE
        if state == _LIVE:
            return Sight(HEALTHY)
        return Sight(UNHEALTHY if state == _DEAD else UNKNOWN, f"controller {controller} is {state}")


# ---------------------------------------------------------------- SMART


class SmartWarning(NamedTuple):
    """One bit of the critical warning."""

    bit: int
    state: DeviceState
    text: str


WARNINGS = (
    SmartWarning(0, UNHEALTHY, "its spare capacity has fallen below the threshold"),
    # It passes when the drive cools down: nothing new is granted of it meanwhile, and its pods stay.
    SmartWarning(1, UNKNOWN, "its temperature is beyond a threshold"),
    SmartWarning(2, UNHEALTHY, "its reliability is degraded"),
    SmartWarning(3, UNHEALTHY, "its media are read only"),
    SmartWarning(4, UNHEALTHY, "the backup of its volatile memory has failed"),
    SmartWarning(5, UNHEALTHY, "its persistent memory region is read only or unreliable"),
)
LOG_PAGE_BYTES = 512
_MEDIA_ERRORS = slice(160, 176)
_SPARE_PERCENT, _USED_PERCENT = 3, 5

_COMMAND = struct.Struct("<BBHIIIQQIIIIIIIIII")
"""struct nvme_admin_cmd: opcode, flags, rsvd1, nsid, cdw2, cdw3, metadata, addr, metadata_len, data_len, cdw10 to
cdw15, timeout_ms, result."""
_ADMIN_COMMAND = 3 << 30 | _COMMAND.size << 16 | ord("N") << 8 | 0x41
"""NVME_IOCTL_ADMIN_CMD, _IOWR('N', 0x41, struct nvme_admin_cmd)."""
_GET_LOG_PAGE, _SMART_PAGE, _WHOLE_CONTROLLER = 0x02, 0x02, 0xFFFFFFFF
_MAY_NOT = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTTY)
Ioctl = Callable[[int, int, bytearray], int]


class Smart:
    """The source `smart`."""

    name = "smart"
    period_s = SMART_S

    def __init__(self, ioctl: Ioctl = fcntl.ioctl, is_device: Callable[[int], bool] = stat.S_ISCHR) -> None:
        """ioctl: as fcntl.ioctl. is_device: whether the mode of a node is that of a controller."""
        self._ioctl = ioctl
        self._is_device = is_device

    def concerns(self, device: Device) -> bool:
        return device.kind == "nvme"

    def look(self, reader: Tolerant, device: Device) -> Sight | Silence:
        controller = str(device.attributes.get("controller", ""))
        if not _CONTROLLER.fullmatch(controller):
            return Silence.NOTHING_TO_SEE
        try:
            page = self._log_page(reader.sysfs.path(f"dev/{controller}"))
        except OSError as error:
            return Silence.NOTHING_TO_SEE if error.errno in _MAY_NOT else Silence.NO_ANSWER
        return judged(page) if page is not None else Silence.NO_ANSWER

    def _log_page(self, path: str) -> bytes | None:
        """Return the log page of a controller, or None if it refuses the command. Raise OSError."""
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not self._is_device(os.fstat(handle).st_mode):
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
            page = ctypes.create_string_buffer(LOG_PAGE_BYTES)
            refused = self._ioctl(handle, _ADMIN_COMMAND, bytearray(_command(page)))
            return None if refused else page.raw
        finally:
            os.close(handle)


def _command(page: Any) -> bytes:
    """Return the command that fills a buffer; its length is given in words of four bytes, less one."""
    words = (LOG_PAGE_BYTES // 4 - 1) << 16 | _SMART_PAGE
    address = ctypes.addressof(page)
    return _COMMAND.pack(
        _GET_LOG_PAGE, 0, 0, _WHOLE_CONTROLLER, 0, 0, 0, address, 0, LOG_PAGE_BYTES, words, 0, 0, 0, 0, 0, 0, 0
    )


def judged(page: bytes) -> Sight:
    """Return what a SMART log page of LOG_PAGE_BYTES says."""
    warnings = [one for one in WARNINGS if page[0] >> one.bit & 1]
    state = next((one for one in (UNHEALTHY, UNKNOWN) if any(w.state == one for w in warnings)), HEALTHY)
    readings = {
        "spare_percent": page[_SPARE_PERCENT],
        "used_percent": page[_USED_PERCENT],
        "media_errors": int.from_bytes(page[_MEDIA_ERRORS], "little"),
    }
    return Sight(state, "; ".join(f"the drive reports that {one.text}" for one in warnings), readings)
