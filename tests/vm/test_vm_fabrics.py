"""NVMe over fabrics on a real kernel: its own target (nvmet) over TCP on loopback, its own host, and the agent between
them. No kubelet and no API server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.vmguest import Guest
from tests.vm.vmnode import booted

LIFE_S = 900.0
CONFIGFS = "/sys/kernel/config/nvmet"
NQN, OTHER = "nqn.2024-01.com.example:one", "nqn.2024-01.com.example:two"
HOST_NQN = "nqn.2024-01.com.example:node-a"
PORT, SILENT = 4420, 4421
RECONNECT_S = 60.0


class Targets:
    """The kernel's targets and the program that connects to them."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.run = guest.run

    def serve(self, nqn: str, *, allowed: str = "") -> None:
        """A subsystem with one namespace in a file."""
        folder, file = f"{CONFIGFS}/subsystems/{nqn}", f"/run/{nqn[-3:]}.img"
        self.run(f"mkdir {folder} && truncate -s 64M {file}")
        if allowed:
            self.run(f"mkdir -p {CONFIGFS}/hosts/{allowed}")
            self.run(f"ln -s {CONFIGFS}/hosts/{allowed} {folder}/allowed_hosts/")
        else:
            self.run(f"echo 1 >{folder}/attr_allow_any_host")
        self.run(f"mkdir {folder}/namespaces/1 && echo -n {file} >{folder}/namespaces/1/device_path")
        self.run(f"echo 1 >{folder}/namespaces/1/buffered_io && echo 1 >{folder}/namespaces/1/enable")
        self.show(nqn)

    def show(self, *nqns: str) -> None:
        """Have the port lead to subsystems; with the first one it begins to listen."""
        for nqn in nqns:
            self.run(f"ln -s {CONFIGFS}/subsystems/{nqn} {CONFIGFS}/ports/1/subsystems/")

    def hide(self, *nqns: str) -> None:
        """Break the connections to subsystems; without any the port listens no longer."""
        for nqn in nqns:
            self.run(f"rm {CONFIGFS}/ports/1/subsystems/{nqn}")

    def agent(self, do: str, nqn: str, *rest: object) -> dict[str, Any]:
        """What inside/fabrics.py says."""
        words = " ".join(["/opt/nodeagent/bin/python /share/inside/fabrics.py", do, nqn, *map(str, rest)])
        found: dict[str, Any] = json.loads(self.run(words).splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def targets() -> Iterator[Targets]:
    with booted(life_s=LIFE_S) as guest:
        guest.run("modprobe -a nvmet nvmet-tcp nvme-tcp && ip link set lo up")
        guest.run("mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config")
        guest.run(f"mkdir {CONFIGFS}/ports/1")
        for name, value in (("trtype", "tcp"), ("adrfam", "ipv4"), ("traddr", "127.0.0.1"), ("trsvcid", PORT)):
            guest.run(f"echo {value} >{CONFIGFS}/ports/1/addr_{name}")
        found = Targets(guest)
        found.serve(NQN)
        found.serve(OTHER, allowed="nqn.2024-01.com.example:somebody-else")
        yield found


def test_a_target_is_connected_with_its_disk_and_disconnected(targets: Targets) -> None:
    made = targets.agent("connect", NQN, PORT)
    print(f"vm: connect: {made['seconds']} s", flush=True)
    assert made["error"] == ""
    ((name, state),) = made["connections"].items()
    (disk,) = made["nodes"]
    assert (state, made["records"]) == ("live", {NQN: name})
    assert targets.run(f"cat /sys/class/nvme/{name}/hostnqn").strip() == HOST_NQN
    assert targets.run(f"cat /sys/class/nvme/{name}/ctrl_loss_tmo").strip() == "off"
    assert targets.run(f"cat /sys/class/nvme/{name}/fast_io_fail_tmo").strip() == "2"
    targets.run(
        f"dd if=/dev/urandom of={disk} bs=4096 count=16 oflag=direct && dd if={disk} of=/dev/null bs=4096 iflag=direct"
    )
    assert targets.run(f"cmp -n 65536 {disk} /run/one.img && echo same").strip() == "same"
    assert targets.agent("connect", NQN, PORT)["connections"] == {name: "live"}
    ended = targets.agent("disconnect", NQN)
    print(f"vm: disconnect: {ended['seconds']} s", flush=True)
    assert (ended["error"], ended["records"], ended["connections"]) == ("", {}, {})
    assert targets.run(f"test ! -e {disk} && ls /run/fabrics").strip() in ("", "fabrics.lock")


def test_a_mounted_file_system_holds_it_back_in_any_mount_namespace(targets: Targets) -> None:
    (disk,) = targets.agent("connect", NQN, PORT)["nodes"]
    targets.run(f"busybox mke2fs -b 4096 {disk} && mkdir -p /run/mnt")
    targets.run(f"systemd-run -q --unit=mounter -p PrivateMounts=yes sh -c 'mount {disk} /run/mnt && sleep 600'")
    targets.run(
        'test "$(systemctl show -p MainPID --value mounter)" != 0 && grep -q /run/mnt '
        "/proc/$(systemctl show -p MainPID --value mounter)/mounts",
        until=True,
    )
    held = targets.agent("disconnect", NQN)
    assert f"{disk} is in use, by a mounted file system" in held["error"]
    assert [*held["connections"].values()] == ["live"]
    targets.run("systemctl stop mounter")
    targets.run(f"python3 -c 'import os; os.open(\"{disk}\", os.O_EXCL)'", until=True)
    assert targets.agent("disconnect", NQN)["connections"] == {}


def test_a_target_that_disappears_is_a_lost_path_and_comes_back(targets: Targets) -> None:
    made = targets.agent("connect", NQN, PORT)
    (name,), (disk,) = made["connections"], made["nodes"]
    targets.hide(NQN, OTHER)
    targets.run(f"grep -x connecting /sys/class/nvme/{name}/state", RECONNECT_S, until=True)
    assert targets.agent("show", NQN)["connections"] == {name: "connecting"}
    assert "failed" in targets.run(f"dd if={disk} of=/dev/null bs=4096 count=1 iflag=direct 2>&1 || echo failed")
    targets.show(NQN, OTHER)
    targets.run(f"grep -x live /sys/class/nvme/{name}/state", RECONNECT_S, until=True)
    targets.run(f"dd if={disk} of=/dev/null bs=4096 count=1 iflag=direct")
    targets.hide(NQN, OTHER)
    targets.run(f"grep -x connecting /sys/class/nvme/{name}/state", RECONNECT_S, until=True)
    assert targets.agent("disconnect", NQN)["connections"] == {}
    targets.show(NQN, OTHER)


def test_a_target_that_no_longer_has_the_subsystem_is_disconnected_by_the_kernel(targets: Targets) -> None:
    """It answers, and says not to try again. The record stays with the claim, and the next call connects again."""
    (name,) = targets.agent("connect", NQN, PORT)["connections"]
    targets.hide(NQN)
    targets.run(f"test ! -e /sys/class/nvme/{name}", RECONNECT_S, until=True)
    gone = targets.agent("show", NQN)
    assert (gone["records"], gone["connections"]) == ({NQN: name}, {})
    targets.show(NQN)
    assert targets.agent("connect", NQN, PORT)["error"] == ""
    assert targets.agent("disconnect", NQN)["records"] == {}


def test_a_host_that_the_target_does_not_allow_is_refused(targets: Targets) -> None:
    refused = targets.agent("connect", OTHER, PORT)
    assert refused["error"] == (
        f"cannot connect {OTHER} at tcp://127.0.0.1:{PORT}: the target refuses it: it has no such subsystem, or does "
        "not allow this host"
    )
    assert (refused["records"], refused["connections"]) == ({}, {})


def test_nothing_listens_and_a_server_that_never_answers(targets: Targets) -> None:
    assert "Connection refused" in targets.agent("connect", NQN, SILENT)["error"]
    program = f"import socket,time; s=socket.create_server(('127.0.0.1', {SILENT})); c=s.accept(); time.sleep(600)"
    targets.run(f'systemd-run -q --unit=silent python3 -c "{program}"')
    targets.run(f"ss -ltn | grep -q :{SILENT}", until=True)
    silent = targets.agent("connect", NQN, SILENT)
    print(f"vm: no answer: {silent['seconds']} s", flush=True)
    assert "the target has not answered for 5 s" in silent["error"] and silent["seconds"] < 10
    assert silent["records"] == {NQN: ""}
    targets.run("systemctl stop silent")
    targets.run("! pgrep -f 'inside/[f]abrics.py'", 120.0, until=True)
    assert targets.agent("disconnect", NQN)["records"] == {}


def test_what_an_admin_has_connected_is_left_alone(targets: Targets) -> None:
    targets.run(f"nvme connect -t tcp -a 127.0.0.1 -s {PORT} -n {NQN}")
    refused = targets.agent("connect", NQN, PORT)
    assert "and not by this agent" in refused["error"] and refused["records"] == {}
    assert [*targets.agent("disconnect", NQN)["connections"].values()] == ["live"]
    targets.run(f"nvme disconnect -n {NQN}")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_killed_at_any_step_the_next_call_completes_it_or_takes_it_back(targets: Targets, step: int) -> None:
    """Before the intent is recorded, between the kernel's connection and its record, and before the disks are."""
    targets.run(f"/opt/nodeagent/bin/python /share/inside/fabrics.py connect {NQN} {PORT} {step}; test $? = 137")
    left = targets.agent("show", NQN)
    assert len(left["connections"]) == (step > 1) and len(left["records"]) == (step > 1)
    made = targets.agent("connect", NQN, PORT)
    assert made["error"] == "" and len(made["nodes"]) == 1
    assert targets.agent("disconnect", NQN)["connections"] == {}
    targets.run(f"/opt/nodeagent/bin/python /share/inside/fabrics.py connect {NQN} {PORT} {step}; test $? = 137")
    gone = targets.agent("disconnect", NQN)
    assert (gone["error"], gone["records"], gone["connections"]) == ("", {}, {})
