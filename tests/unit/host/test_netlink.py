"""rtnetlink in real network namespaces, with iproute2 as the second opinion."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import HostError
from nodeagent.host.netlink.connection import Netlink, NetlinkError
from nodeagent.host.netlink.interfaces import Interfaces, Link
from nodeagent.host.netlink.messages import attribute, each, number, read_number, read_text, text
from nodeagent.host.netlink.namespaces import OWN, NetNamespace, first_of
from tests.support.namespaces import Namespace, needs_namespaces

PAIRS = st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=12)


@given(PAIRS)
def test_attributes_are_read_as_they_were_written(pairs: list[tuple[int, bytes]]) -> None:
    data = b"".join(attribute(kind, value) for kind, value in pairs)
    assert len(data) % 4 == 0
    assert list(each(data)) == pairs


@given(PAIRS.filter(bool), st.data())
def test_a_message_that_is_cut_off_is_refused_and_never_read_beyond(
    pairs: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    whole = b"".join(attribute(kind, value) for kind, value in pairs)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        found = list(each(cut))
    except HostError as error:
        assert "cannot read a netlink message" in str(error)
    else:
        assert found == pairs[: len(found)]


def test_numbers_and_texts_are_the_kernels() -> None:
    (_, data), (_, name) = each(number(4, 9000) + text(3, "eth0"))
    assert data == struct.pack("=I", 9000) and read_number(data) == 9000
    assert name == b"eth0\0" and read_text(name) == "eth0"
    assert (read_number(None), read_text(None)) == (0, "")


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


@pytest.fixture
def inside(host: Namespace) -> Iterator[Interfaces]:
    with NetNamespace(host.path) as opened, Interfaces(opened) as found:
        yield found


pytestmark = needs_namespaces


def named(inside: Interfaces, name: str) -> Link:
    found = inside.link(name)
    assert found is not None
    return found


def test_interfaces_are_seen_as_iproute2_sees_them(host: Namespace, inside: Interfaces) -> None:
    host.veth("eth7", mac="02:00:00:00:00:07", mtu=1400, up=True)
    host.ip("link", "set", "eth7", "alias", "of an admin")
    for link in inside.links():
        shown = host.link(link.name)
        assert (link.index, link.mtu, link.hardware_address) == (shown["ifindex"], shown["mtu"], shown["address"])
        assert link.up == ("UP" in shown["flags"])
        assert link.alias == shown.get("ifalias", "")
    assert (named(inside, "eth7").kind, named(inside, "lo").kind) == ("veth", "")
    assert inside.link("eth8") is None


def test_every_change_is_what_iproute2_shows(host: Namespace, inside: Interfaces) -> None:
    host.veth("eth7")
    link = named(inside, "eth7")
    inside.rename(link, "net1")
    inside.set_hardware_address(link, "02:00:00:00:00:11")
    inside.set_mtu(link, 1300)
    inside.set_alias(link, "ours")
    inside.set_up(link, up=True)
    shown = host.link("net1")
    assert (shown["address"], shown["mtu"], shown["ifalias"]) == ("02:00:00:00:00:11", 1300, "ours")
    assert "UP" in shown["flags"]
    inside.set_alias(link, "")
    inside.set_up(link, up=False)
    shown = host.link("net1")
    assert "ifalias" not in shown and "UP" not in shown["flags"]


def test_addresses_and_routes_are_added_once(host: Namespace, inside: Interfaces) -> None:
    """What is there already is fine, as after a crash."""
    host.veth("eth7", up=True)
    link = named(inside, "eth7")
    for _ in range(2):
        inside.add_address(link, "10.0.0.5/24")
        inside.add_address(link, "fd00::5/64")
        inside.add_route(link, "10.1.0.0/16", "10.0.0.1")
        inside.add_route(link, "10.2.0.0/16", "")
        inside.add_route(link, "0.0.0.0/0", "10.0.0.1")
        inside.add_route(link, "fd01::/64", "fd00::1")
    assert {*inside.addresses(link)} == host.addresses("eth7") == {"10.0.0.5/24", "fd00::5/64"}
    routes = host.routes("eth7")
    assert {
        ("10.1.0.0/16", "10.0.0.1"),
        ("10.2.0.0/16", ""),
        ("default", "10.0.0.1"),
        ("fd01::/64", "fd00::1"),
    } <= routes
    assert {("10.1.0.0/16", "10.0.0.1"), ("0.0.0.0/0", "10.0.0.1"), ("fd01::/64", "fd00::1")} <= {*inside.routes(link)}
    assert "tentative" not in host.ip("address", "show", "dev", "eth7")


def test_a_route_that_another_interface_has_is_an_error(host: Namespace, inside: Interfaces) -> None:
    host.veth("eth7", up=True)
    host.veth("eth8", up=True)
    host.ip("route", "add", "10.2.0.0/16", "dev", "eth8")
    with pytest.raises(
        NetlinkError, match=r"cannot add a route to 10\.2\.0\.0/16 on interface eth7: File exists"
    ) as it:
        inside.add_route(named(inside, "eth7"), "10.2.0.0/16", "")
    assert it.value.code == errno.EEXIST


def test_the_kernels_own_words_are_in_the_error(host: Namespace, inside: Interfaces) -> None:
    host.veth("eth7", up=True)
    with pytest.raises(NetlinkError, match=r"cannot add a route to .* \(Nexthop has invalid gateway\)"):
        inside.add_route(named(inside, "eth7"), "10.9.0.0/16", "192.0.2.1")
    with pytest.raises(NetlinkError, match="cannot set the MTU of interface eth7 to 10"):
        inside.set_mtu(named(inside, "eth7"), 10)


def test_an_interface_is_moved_and_has_its_new_name(host: Namespace, inside: Interfaces) -> None:
    host.veth("eth7", mac="02:00:00:00:00:07", up=True)
    host.ip("address", "add", "10.0.0.1/24", "dev", "eth7")
    with Namespace() as pod, NetNamespace(pod.path) as target, Interfaces(target) as there:
        inside.move(named(inside, "eth7"), target, "net1")
        assert host.names() == {"eth7-far"}
        assert (pod.names(), pod.addresses("net1")) == ({"net1"}, set())
        assert named(there, "net1").hardware_address == "02:00:00:00:00:07"
        assert not named(there, "net1").up


def test_many_interfaces_and_addresses_are_listed_whole(host: Namespace, inside: Interfaces) -> None:
    """More than fit into one message."""
    for number_of in range(20):
        host.veth(f"e{number_of}")
    link = named(inside, "e0")
    wanted = [f"10.0.{number_of}.1/24" for number_of in range(150)]
    for one in wanted:
        inside.add_address(link, one)
    assert len(inside.links()) == 41
    assert {*inside.addresses(link)} == {*wanted}


def test_what_is_no_network_namespace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, why in (("file", "it is none"), ("missing", "No such file or directory")):
        with pytest.raises(HostError, match=rf"cannot open network namespace \S+/{path}: {why}"):
            NetNamespace(str(tmp_path / path))
    with pytest.raises(HostError, match="it is none"):
        NetNamespace("/proc/self/ns/uts")
    with pytest.raises(HostError, match=f"{tmp_path}/missing: .*; .*{tmp_path}/file"):
        first_of([str(tmp_path / "missing"), str(tmp_path / "file")])
    with pytest.raises(HostError, match="the container runtime names none"):
        first_of([])


def test_namespaces_are_told_apart_and_the_caller_stays_in_its_own(host: Namespace) -> None:
    with NetNamespace(OWN) as own, NetNamespace(host.path) as other, NetNamespace(host.path) as again:
        assert other.is_same(again) and not other.is_same(own)
        other.socket().close()
        with NetNamespace(OWN) as now:
            assert own.is_same(now)


def test_a_kernel_that_says_nothing_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodeagent.host.netlink.connection.ANSWER_S", 0.05)
    quiet, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    monkeypatch.setattr(Netlink, "__init__", lambda self, made: self.__dict__.update(_socket=made, _sequence=0))
    connection = Netlink(quiet)
    quiet.settimeout(0.05)
    with pytest.raises(HostError, match=r"cannot do it: the kernel did not answer within 0\.05 s"):
        connection.change("cannot do it", 16, b"")
    connection.close()
    _.close()
