"""Properties of virtual functions on a real kernel with a real driver: igb, on the adapter that QEMU 8 and later
have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.vmguest import Guest

NEEDS_QEMU = 8
WANTED = {"mac": "02:00:00:00:00:0a", "vlan": 100, "vlan_qos": 3, "spoof_check": False, "trust": True}


class Function:
    """The second virtual function of the guest's adapter."""

    def __init__(self, guest: Guest, pf: str, interface: str) -> None:
        self._guest, self.pf, self.interface = guest, pf, interface

    def ask(self, **wanted: Any) -> dict[str, Any]:
        """Set this, if anything; the errors, and what the function has."""
        said = f"'{json.dumps(wanted)}'" if wanted else ""
        words = f"/opt/nodeagent/bin/python /share/inside/vf.py {self.pf} {self.interface} 1 {said}"
        found: dict[str, Any] = json.loads(self._guest.run(words))
        return found

    def shown(self) -> str:
        """What iproute2 says of it."""
        return self._guest.run(f"ip link show {self.interface} | grep 'vf 1'")


@pytest.fixture
def function(pods_guest: Guest) -> Iterator[Function]:
    if pods_guest.version < NEEDS_QEMU:
        pytest.skip(f"QEMU {pods_guest.version} has no adapter with virtual functions, {NEEDS_QEMU} and later have one")
    pods_guest.run("modprobe igb && ls -d /sys/bus/pci/drivers/igb/0000:*", until=True)
    pf = pods_guest.run("basename $(ls -d /sys/bus/pci/drivers/igb/0000:* | head -1)").strip()
    folder = f"/sys/bus/pci/devices/{pf}"
    pods_guest.run(f"echo 0 >{folder}/sriov_drivers_autoprobe && echo 2 >{folder}/sriov_numvfs")
    yield Function(pods_guest, pf, pods_guest.run(f"ls {folder}/net").strip())
    pods_guest.run(f"echo 0 >{folder}/sriov_numvfs")


def test_a_driver_sets_what_it_can_names_what_it_cannot_and_has_everything_back(function: Function) -> None:
    before = function.ask()["has"]
    after = function.ask(**WANTED)
    assert after["errors"] == {}
    assert {key: after["has"].get(key) for key in WANTED} == WANTED
    for words in ("02:00:00:00:00:0a", "vlan 100", "qos 3", "spoof checking off", "trust on"):
        assert words in function.shown()
    where = f"of VF 1 of {function.interface}"
    refused = function.ask(vlan=5, vlan_protocol="802.1ad", link_state="disable")["errors"]
    assert refused == {
        "vlan": f"cannot set VLAN 5 (802.1ad) {where}: Protocol not supported",
        "linkState": f"cannot set link state disable {where}: Operation not supported",
    }
    back = {key: before[key] for key in ("mac", "vlan", "spoof_check", "trust")}
    assert function.ask(**back)["errors"] == {}
    assert function.ask()["has"] == before
