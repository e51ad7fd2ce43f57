"""Takes RDMA devices along with interfaces into the network namespaces of pods, and back. Blocks.

Only in the exclusive mode of `rdma system`: in the shared one every namespace has every device. What is moved is in the
record of its interface, since before the first change. When a pod's namespace ends, the kernel returns its RDMA devices
to the initial namespace by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import structlog

from nodeagent.errors import HostError
from nodeagent.host.netlink.namespaces import NetNamespace
from nodeagent.host.netlink.rdma import Connect, RdmaDevice, RdmaDevices, connected, rdma_nodes
from nodeagent.host.sysfs.sysfs import SysFs

RETURN_S, RETURN_POLL_S = 2.0, 0.05
"""How long the kernel may take to return a device after the end of its pod's namespace: it does so in the
background."""
COMMON = "/dev/infiniband/rdma_cm"
"""The node that is the same for all devices."""
log = structlog.get_logger()


class RdmaMover:
    """One caller at a time."""

    def __init__(self, sysfs: SysFs, connect: Connect = connected) -> None:
        self._sysfs = sysfs
        self._connect = connect

    def to_move(self, names: Sequence[str], host: NetNamespace) -> tuple[RdmaDevice, ...]:
        """Return which of the host's RDMA devices have to be moved for a pod to use them. Raise HostError if one is not
        there, or the mode cannot be read."""
        if not names or not (devices := self._in(host)).are_exclusive():
            return ()
        there = {one.name: one for one in devices.devices()}
        if missing := [one for one in names if one not in there]:
            raise HostError(f"cannot move RDMA device {', '.join(missing)}: the host has none of that name")
        return tuple(there[one] for one in names)

    def hand_over(
        self, wanted: Sequence[RdmaDevice], host: NetNamespace, pod: NetNamespace, nodes: Collection[str]
    ) -> None:
        """Have devices in a pod, and read back.

        nodes: the device nodes that the pod's containers are given for them. Raise HostError if a device has others:
        the kernel may number them differently after each move, and the files of the claim follow.
        """
        if not wanted:
            return
        outside, inside = self._in(host), self._in(pod)
        for one in wanted:
            if _find(one, inside) is None:
                if (there := _find(one, outside)) is None:
                    raise HostError(f"cannot move RDMA device {one.name}: it is neither on the host nor in the pod")
                outside.move(there, pod)
        for one in wanted:
            if (arrived := _find(one, inside)) is None:
                raise HostError(f"cannot move RDMA device {one.name} to {pod.path}: it did not arrive")
            self._check_nodes(arrived, nodes)

    def _check_nodes(self, device: RdmaDevice, nodes: Collection[str]) -> None:
        given = {one for one in nodes if one != COMMON}
        if strange := [one for one in rdma_nodes(self._sysfs, device.name) if one not in given]:
            raise HostError(
                f"cannot hand over RDMA device {device.name}: its nodes became {', '.join(strange)} when it was moved; "
                "the next try has them"
            )

    def fetch(self, wanted: Sequence[RdmaDevice], host: NetNamespace, pod: NetNamespace) -> None:
        """Move devices back to the host as far as they are in a pod."""
        if not wanted or pod.is_same(host):
            return
        inside = self._in(pod)
        if not inside.are_exclusive():
            return
        for one in wanted:
            if (there := _find(one, inside)) is not None:
                inside.move(there, host)

    def await_return(self, wanted: Sequence[RdmaDevice], host: NetNamespace, is_there: Callable[[], bool]) -> None:
        """Wait until devices are on the host. Raise HostError if one is elsewhere; one that no namespace has any longer
        is logged. is_there: returns whether the adapter can have RDMA devices."""
        until_s = time.monotonic() + RETURN_S
        while away := [one for one in wanted if _find(one, self._in(host)) is None]:
            if not is_there() or time.monotonic() > until_s:
                if elsewhere := [one.name for one in away if rdma_nodes(self._sysfs, one.name)]:
                    names = ", ".join(elsewhere)
                    raise HostError(f"cannot give back RDMA device {names}: it is neither on the host nor in the pod")
                log.warning("rdma-device-gone", devices=[one.name for one in away])
                return
            time.sleep(RETURN_POLL_S)

    def _in(self, namespace: NetNamespace) -> RdmaDevices:
        return RdmaDevices(namespace, self._connect)


def _find(wanted: RdmaDevice, where: RdmaDevices) -> RdmaDevice | None:
    return next((one for one in where.devices() if wanted.is_it(one)), None)
