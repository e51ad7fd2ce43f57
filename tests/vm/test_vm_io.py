"""Limits of disk I/O on a real kernel: a pod of a class writes no faster than the class lets it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm import vmpods
from tests.vm.vmguest import Guest

CLASS = '{"name": "slow", "disks": ["vda"], "writeBytesPerSecond": "1Mi"}'
BEFORE, AFTER = '"intrudersSeconds": 3600', f'"intrudersSeconds": 3600, "io": {{"classes": [{CLASS}]}}'
MIB = 4
WRITES = (
    "began=$(cut -d' ' -f1 /proc/uptime); "
    f"dd if=/dev/zero of=/written bs=64k count={MIB * 16} conv=fsync 2>/dev/null; "
    "echo BEGAN=$began; echo ENDED=$(cut -d' ' -f1 /proc/uptime); exec sleep infinity"
)
"""Writes so many MiB to the container's own layer, which lies on the guest's disk, and waits until they are there."""


def configured(guest: Guest, before: str, after: str) -> None:
    """The agent again, with another configuration."""
    searched = before.replace("[", r"\[")
    guest.run(f"sed -i 's|{searched}|{after}|' /etc/nodeagent/config.yaml && systemctl restart nodeagent")
    guest.run("nodeagent status | grep ', ready'", until=True)
    vmpods.until_connected(guest)


@pytest.fixture(scope="module")
def guest(pods_guest: Guest) -> Iterator[Guest]:
    configured(pods_guest, BEFORE, AFTER)
    yield pods_guest
    configured(pods_guest, AFTER, BEFORE)


def written_s(guest: Guest, name: str, **annotations: str) -> tuple[vmpods.Pod, float]:
    """A pod that writes, and how long that took it."""
    named = {f"nodeagent.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}
    pod = vmpods.run(guest, vmpods.admit(guest, name, {}), WRITES, annotations=named)
    said = vmpods.first_lines(guest, pod, last="ENDED")
    return pod, float(said["ENDED"]) - float(said["BEGAN"])


def test_a_pod_of_a_class_writes_no_faster_than_the_class_lets_it(guest: Guest) -> None:
    """Then another process takes the limit out, and it comes back; and it is gone once the class is."""
    free, free_s = written_s(guest, "io-free")
    slow, slow_s = written_s(guest, "io-slow", io_class="slow")
    print(f"vm: {MIB} MiB written in {slow_s:.1f} s at 1 MiB/s, in {free_s:.1f} s without a limit")
    disk = guest.run("cat /sys/class/block/vda/dev").strip()
    line = f"{disk} rbps=max wbps={1 << 20} riops=max wiops=max"
    assert guest.run(f"cat {slow.scope()}/io.max").strip() == line
    assert guest.run(f"cat {free.scope()}/io.max").strip() == ""
    assert slow_s > MIB - 1.5 and slow_s > 2 * free_s
    guest.run(f"echo '{disk} wbps=max' >{slow.scope()}/io.max")
    guest.run(f"grep -qx '{line}' {slow.scope()}/io.max", until=True)
    configured(guest, AFTER, BEFORE)
    guest.run(f'test -z "$(cat {slow.scope()}/io.max)"', until=True)
    configured(guest, BEFORE, AFTER)
    for pod in (free, slow):
        vmpods.remove(guest, pod)
