"""Interrupts of held devices on a real kernel: those of a network adapter follow their holder's CPUs and go back, also
after the agent was killed; those that the kernel manages itself stay, and the agent says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm import vmpods
from tests.vm.vmguest import Guest
from tests.vm.vmpods import CPU, Pod

CONFIG = "/etc/nodeagent/config.yaml"
DROP_IN = "/etc/systemd/system/nodeagent.service.d/nodeagent-interrupts.conf"
ONCE = "/run/systemd/system/nodeagent.service.d/once.conf"
LOOK_S = 2.0
"""Between two looks at interrupts."""
NIC, NVME = "nodeagent.dev/nic", "nodeagent.dev/nvme"
MANAGED = "the kernel or the device's driver manages this interrupt"


def restarted(guest: Guest) -> None:
    guest.run("systemctl daemon-reload && systemctl restart nodeagent")
    guest.run("nodeagent status | grep ', ready'", until=True)
    vmpods.until_connected(guest)


@pytest.fixture(scope="module")
def guest(pods_guest: Guest) -> Iterator[Guest]:
    """The node with a network adapter to grant, and an agent that may write to /proc/irq and has interrupts follow."""
    base = json.loads((pods_guest.share / "config.yaml").read_text())
    base["pinning"] |= {"deviceInterrupts": "follow", "intrudersSeconds": LOOK_S}
    base["resources"].append({"name": "nic", "kind": "nic", "match": {"driver": "e1000e"}})
    (pods_guest.share / "interrupts.yaml").write_text(json.dumps(base))
    pods_guest.run(f"install -D -m 644 /share/systemd/nodeagent-interrupts.conf {DROP_IN}")
    pods_guest.run(f"cp {CONFIG} /run/before.yaml && install -m 644 /share/interrupts.yaml {CONFIG}")
    restarted(pods_guest)
    yield pods_guest
    pods_guest.run(f"rm {DROP_IN} && install -m 644 /run/before.yaml {CONFIG}")
    restarted(pods_guest)


@pytest.fixture(scope="module")
def adapter(guest: Guest) -> str:
    """The PCI address of the e1000e; its driver asks for interrupts once its interface is up."""
    address = guest.run("basename $(ls -d /sys/bus/pci/drivers/e1000e/0000:*)").strip()
    guest.run(f"ip link set $(ls /sys/bus/pci/devices/{address}/net) up")
    guest.run(f"ls /sys/bus/pci/devices/{address}/msi_irqs/*", until=True)
    return address


def affinities(guest: Guest, address: str) -> dict[int, str]:
    """Where each interrupt of a function may be delivered."""
    shown = "echo $one $(cat /proc/irq/$one/smp_affinity_list)"
    words = f"for one in $(ls /sys/bus/pci/devices/{address}/msi_irqs); do {shown}; done"
    return {int(line.split()[0]): line.split()[1] for line in guest.run(words).splitlines()}


def until_affinities(guest: Guest, wanted: dict[int, str]) -> None:
    tests = (f'test "$(cat /proc/irq/{irq}/smp_affinity_list)" = "{cpus}"' for irq, cpus in wanted.items())
    guest.run(" && ".join(tests), until=True)


def holding(guest: Guest, name: str, resource: str) -> Pod:
    """A pod with CPUs and a device, once no other pod has that."""
    guest.run("""test "$(nodeagent grants -o json)" = '[]'""", until=True)
    return vmpods.run(guest, vmpods.admit(guest, name, {CPU: 2, resource: 1}))


def said(guest: Guest, address: str) -> dict[str, Any]:
    """What the status says of the interrupts of a held device; empty if nothing."""
    devices = vmpods.pinning(guest)["intruders"]["devices"]
    return next((one for one in devices if one["device"] == address), {})


def test_interrupts_follow_the_holder_of_their_device_and_go_back(guest: Guest, adapter: str) -> None:
    before = affinities(guest, adapter)
    pod = holding(guest, "irq-follow", NIC)
    until_affinities(guest, dict.fromkeys(before, pod.cpus))
    guest.run("grep -q '\"wanted\"' /var/lib/nodeagent/interrupts.json")
    irq = next(iter(before))
    other = f"/proc/irq/{irq}/smp_affinity_list"
    guest.run(f"echo 0-15 >{other}")
    until_affinities(guest, {irq: pod.cpus})
    vmpods.remove(guest, pod)
    until_affinities(guest, {**before, irq: "0-15"})  # where the other program wanted it
    guest.run(f"echo {before[irq]} >{other}")


def test_interrupts_go_back_though_the_agent_was_killed_while_their_holder_ended(guest: Guest, adapter: str) -> None:
    before = affinities(guest, adapter)
    pod = holding(guest, "irq-killed", NIC)
    until_affinities(guest, dict.fromkeys(before, pod.cpus))
    # Without another start in between, which the double of kubelet would find gone while it registers.
    guest.run(f"install -D /dev/stdin {ONCE} <<<$'[Service]\\nRestart=no' && systemctl daemon-reload")
    guest.run("systemctl kill -s KILL nodeagent")
    guest.run("! systemctl is-active -q nodeagent", until=True)
    vmpods.remove(guest, pod)
    assert affinities(guest, adapter) == dict.fromkeys(before, pod.cpus)
    guest.run(f"rm {ONCE} && systemctl daemon-reload && systemctl start nodeagent --no-block")
    until_affinities(guest, before)
    guest.run("nodeagent status | grep ', ready'", until=True)
    vmpods.until_connected(guest)


def test_interrupts_that_the_kernel_manages_stay_and_the_status_says_so(guest: Guest) -> None:
    """A drive's first interrupt, of its administration, is anybody's; those of its queues have a CPU each."""
    drive = guest.run("basename $(readlink -f /sys/class/nvme/nvme0/device)").strip()
    before = affinities(guest, drive)
    pod = holding(guest, "irq-managed", NVME)
    guest.run("""nodeagent status -o json | grep -q '"interrupts": *"follow"'""", until=True)
    found, after = said(guest, drive), affinities(guest, drive)
    managed = {irq: cpus for irq, cpus in after.items() if cpus != pod.cpus}
    print(f"vm: interrupts of a drive: {len(managed)} of {len(after)} managed: {found['why']}", flush=True)
    assert 0 < len(managed) < len(after) and managed.items() <= before.items()
    assert found["irqs"] == sorted(after) and managed.keys() <= {*found["misplaced"]}
    assert MANAGED in found["why"]
    vmpods.remove(guest, pod)
    until_affinities(guest, before)
