"""Properties of virtual functions on the wire: against bytes written out from the kernel's header, on a double of the
kernel, and on netdevsim where the kernel has it."""

from __future__ import annotations

import contextlib
import errno
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.network.vf_checks import Property, VfPlace, said_of, value_of
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.errors import HostError
from nodeagent.host.netlink.connection import NetlinkError
from nodeagent.host.netlink.messages import attribute, attributes
from nodeagent.host.netlink.vf_messages import decoded, encoded, with_functions
from nodeagent.host.netlink.vf_properties import PhysicalFunction, host_exchange, opened
from tests.doubles.vf_kernel import Pf, VfKernel

PF = "0000:3b:00.0"
LINK = struct.Struct("=BBHiII")
"""ifinfomsg (include/uapi/linux/rtnetlink.h)."""
WANTED = VfProperties(
    mac="02:00:00:00:00:0a",
    vlan=100,
    vlan_qos=3,
    vlan_protocol="802.1ad",
    min_tx_rate_mbps=100,
    max_tx_rate_mbps=1000,
    spoof_check=False,
    trust=True,
    link_state="enable",
)
BYTES = {
    Property.MAC: "3000 1600 2c00 0100 2800 0100 03000000 02000000000a" + "00" * 26,
    Property.VLAN: "2000 1600 1c00 0100 1800 0c00 1400 0100 03000000 64000000 03000000 88a8 0000",
    Property.TX_RATE: "1800 1600 1400 0100 1000 0600 03000000 64000000 e8030000",
    Property.SPOOF_CHECK: "1400 1600 1000 0100 0c00 0400 03000000 00000000",
    Property.LINK_STATE: "1400 1600 1000 0100 0c00 0500 03000000 01000000",
    Property.TRUST: "1400 1600 1000 0100 0c00 0900 03000000 01000000",
}
"""What `WANTED` is for function 3 on a little-endian machine: lengths, IFLA_VFINFO_LIST (22), IFLA_VF_INFO (1), the
property, and its struct of include/uapi/linux/if_link.h."""

STATES = st.builds(
    VfProperties,
    mac=st.binary(min_size=6, max_size=6).map(lambda data: bytes([data[0] & 0xFE, *data[1:]]).hex(":")),
    vlan=st.integers(0, 4095),
    vlan_qos=st.integers(0, 7),
    vlan_protocol=st.sampled_from(["802.1Q", "802.1ad"]),
    min_tx_rate_mbps=st.integers(0, 100),
    max_tx_rate_mbps=st.integers(100, 25_000),
    spoof_check=st.booleans(),
    trust=st.booleans(),
    link_state=st.sampled_from(["auto", "enable", "disable"]),
)


@pytest.mark.parametrize("which", Property)
def test_each_property_is_what_the_header_says(which: Property) -> None:
    # as on little-endian machines, which all that are supported are
    assert encoded(3, WANTED, which) == bytes.fromhex(BYTES[which])


def test_functions_are_asked_for_without_their_counters() -> None:
    assert with_functions() == bytes.fromhex("0800 1d00 09000000")


@given(STATES, st.integers(0, 3))
def test_what_is_set_is_what_is_read(wanted: VfProperties, index: int) -> None:
    kernel = VfKernel()
    kernel.add("ens1f0", PF, 4)
    pf = PhysicalFunction(kernel.open(), VfPlace(pf=PF, interface="ens1f0", index=index))
    for which in said_of(wanted):
        pf.set(wanted, which)
    found = pf.read()
    assert found is not None
    assert {one: value_of(found, one) for one in Property} == {one: value_of(wanted, one) for one in Property}
    assert {one for _, one, _ in kernel.changes} == {index}, "no other function is touched"


@given(st.binary(max_size=200))
def test_a_message_that_is_none_is_refused_in_words(data: bytes) -> None:
    with contextlib.suppress(HostError):
        decoded({22: data})
    with contextlib.suppress(HostError):
        decoded({22: attribute(1, data)})


def kernel_of(count: int = 4) -> tuple[VfKernel, Pf]:
    kernel = VfKernel()
    return kernel, kernel.add("ens1f0", PF, count)


def function(kernel: VfKernel, index: int = 3, **place: str) -> PhysicalFunction:
    return PhysicalFunction(kernel.open(), VfPlace(**{"pf": PF, "interface": "ens1f0", **place}, index=index))  # type: ignore[arg-type]


def test_the_256_functions_of_one_adapter_fit_into_an_answer() -> None:
    kernel, pf = kernel_of(256)
    assert function(kernel, 255).read() is not None
    with pytest.raises(NetlinkError, match="Message too long"):  # with their counters they do not
        kernel.get("cannot read", 18, LINK.pack(0, 0, 0, pf.index, 0, 0) + bytes.fromhex("08001d0001000000"))


def test_what_the_driver_does_not_report_is_unknown_and_never_off() -> None:
    kernel, pf = kernel_of()
    pf.vfs[3].trust = pf.vfs[3].spoofchk = -1
    found = function(kernel).read()
    assert found is not None and (found.trust, found.spoof_check) == (None, None)
    pf.silent = frozenset({3})
    assert function(kernel).read() is None
    assert function(kernel, 9).read() is None


@pytest.mark.parametrize(
    ("which", "lacks", "words"),
    [
        (Property.MAC, "mac", "MAC address 02:00:00:00:00:0a"),
        (Property.VLAN, "vlan", r"VLAN 100 with priority 3 \(802.1ad\)"),
        (Property.TX_RATE, "rate", "transmit rate 100 to 1000 Mbit/s"),
        (Property.SPOOF_CHECK, "spoofchk", "spoof checking off"),
        (Property.LINK_STATE, "link_state", "link state enable"),
        (Property.TRUST, "trust", "trust on"),
    ],
)
def test_a_property_that_the_driver_cannot_set_is_named(which: Property, lacks: str, words: str) -> None:
    kernel, pf = kernel_of()
    pf.can -= {lacks}
    with pytest.raises(NetlinkError, match=f"^cannot set {words} of VF 3 of ens1f0: Operation not supported$"):
        function(kernel).set(WANTED, which)
    assert kernel.changes == []


@pytest.mark.parametrize(
    ("wanted", "which", "why"),
    [
        (VfProperties(vlan=4096), Property.VLAN, "Invalid argument"),
        (VfProperties(vlan=1, vlan_qos=8), Property.VLAN, "Invalid argument"),
        (VfProperties(mac="01:00:5e:00:00:01"), Property.MAC, "Invalid argument"),
        (VfProperties(min_tx_rate_mbps=200, max_tx_rate_mbps=100), Property.TX_RATE, "Invalid argument"),
        (VfProperties(max_tx_rate_mbps=30_000), Property.TX_RATE, "Invalid argument"),
    ],
)
def test_what_the_kernel_refuses_is_an_error_with_its_words(wanted: VfProperties, which: Property, why: str) -> None:
    kernel, _ = kernel_of()
    with pytest.raises(NetlinkError, match=why):
        function(kernel).set(wanted, which)


def test_a_function_or_interface_that_is_not_there_and_a_missing_right_are_named() -> None:
    kernel, _ = kernel_of()
    kernel.may = False
    with pytest.raises(NetlinkError, match="cannot set trust on of VF 3 of ens1f0: Operation not permitted") as it:
        function(kernel).set(WANTED, Property.TRUST)
    assert it.value.code == errno.EPERM
    with pytest.raises(NetlinkError, match="cannot read VF 3 of ens9: No such device"):
        function(kernel, interface="ens9").read()


def test_an_interface_that_belongs_to_another_adapter_by_now_is_not_touched() -> None:
    kernel, _ = kernel_of()
    for act in (lambda pf: pf.read(), lambda pf: pf.set(WANTED, Property.TRUST)):
        with pytest.raises(HostError, match=rf"it is the interface of {PF} by now, not of 0000:5e:00\.0"):
            act(function(kernel, pf="0000:5e:00.0"))
    assert kernel.changes == []


def test_an_exchange_is_closed_also_after_an_error() -> None:
    kernel, _ = kernel_of()
    with pytest.raises(NetlinkError), opened(kernel.open(), VfPlace(pf=PF, interface="no", index=0)) as pf:
        pf.read()
    assert kernel.opened == 0


# ---------------------------------------------------------------- the kernel itself

BUS = Path("/sys/bus/netdevsim")
NUMBER = 7411


@pytest.fixture
def simulated() -> Iterator[VfPlace]:
    """An interface of netdevsim with 4 virtual functions."""
    subprocess.run(["modprobe", "netdevsim"], capture_output=True, check=False)
    try:
        (BUS / "new_device").write_text(f"{NUMBER} 1")
    except OSError as error:
        pytest.skip(f"this kernel has no netdevsim, or it may not be used here: {error}")
    try:
        device = BUS / f"devices/netdevsim{NUMBER}"
        (device / "sriov_numvfs").write_text("4")
        if shutil.which("udevadm"):
            subprocess.run(["udevadm", "settle", "--timeout=10"], check=False)  # it is renamed
        until = time.monotonic() + 10
        while not (names := [one.name for one in device.glob("net/*")]):
            assert time.monotonic() < until, "netdevsim has made no interface"
        yield VfPlace(pf=f"netdevsim{NUMBER}", interface=names[0], index=3)
    finally:
        (BUS / "del_device").write_text(str(NUMBER))


def test_the_kernel_takes_and_reports_every_property(simulated: VfPlace) -> None:
    with opened(host_exchange(), simulated) as pf:
        before = pf.read()
        assert before is not None and before.vlan == 0
        for which in said_of(WANTED):
            pf.set(WANTED, which)
        assert pf.read() == WANTED
        shown = subprocess.run(["ip", "link", "show", simulated.interface], capture_output=True, text=True, check=True)
        (line,) = [one for one in shown.stdout.splitlines() if one.strip().startswith("vf 3")]
        for words in ("02:00:00:00:00:0a", "vlan 100", "qos 3", "802.1ad", "trust on", "spoof checking off"):
            assert words in line
        for which in said_of(before):
            pf.set(before, which)
        assert pf.read() == before
        for wrong in (VfProperties(vlan=4096), VfProperties(vlan=1, vlan_qos=8)):
            with pytest.raises(NetlinkError, match="Invalid argument"):
                pf.set(wrong, Property.VLAN)


def test_no_function_of_a_real_interface_is_there_where_there_is_none() -> None:
    """A question to this machine's kernel, which every one answers."""
    with opened(host_exchange(), VfPlace(pf="", interface="lo", index=0)) as pf:
        assert pf.read() is None
        with pytest.raises(NetlinkError, match=r"cannot set trust on of VF 0 of lo: Operation not \w+ted"):
            pf.set(WANTED, Property.TRUST)


def test_the_attributes_of_the_double_are_in_the_kernels_order() -> None:
    kernel, pf = kernel_of(1)
    answer = kernel.get("cannot read", 18, LINK.pack(0, 0, 0, pf.index, 0, 0) + with_functions())
    assert answer is not None
    info = attributes(attributes(answer[16:])[22])[1]
    assert [*attributes(info)] == [1, 13, 2, 6, 3, 4, 5, 7, 9, 12]
