"""Pods that hold CPUs, made through the runtime interface of a real runtime: who runs where, whatever happens."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.vm import vmpods
from tests.vm.vmguest import Guest, GuestError
from tests.vm.vmpods import Pod, cpus
from tests.vm.vmruntime import CHOSEN

ALL, RESERVED, GRANTABLE = "0-15", "0-1", "2-15"
REPAIR_S = 5.0
"""From a wrong write to the right value, where one core of the host is all 16 of the guest."""


@pytest.fixture(scope="module")
def guest(pods_guest: Guest) -> Guest:
    vmpods.until_shared(pods_guest, GRANTABLE)
    return pods_guest


@pytest.fixture(scope="module")
def held(guest: Guest) -> Iterator[Pod]:
    """A pod with two CPUs of its own and a container alongside that has none."""
    pod = vmpods.make(guest, "held", 2, ("alongside",))
    yield pod
    vmpods.remove(guest, pod)


@pytest.fixture(scope="module")
def shared(guest: Guest, held: Pod) -> Iterator[Pod]:
    """A pod without CPUs of its own that came after one with some."""
    pod = vmpods.make(guest, "shared")
    yield pod
    vmpods.remove(guest, pod)


def all_is_as_it_should_be(guest: Guest, held: Pod, shared: Pod) -> None:
    """By what is in effect in the kernel."""
    others = cpus(GRANTABLE) - cpus(held.cpus)
    assert vmpods.effective(guest, held.scope()) == held.cpus
    assert cpus(vmpods.effective(guest, held.scope("alongside"))) == others
    assert cpus(vmpods.effective(guest, shared.scope())) == others


def until_grown_back(guest: Guest, held: Pod, shared: Pod) -> None:
    """... as soon as no other pod holds any CPU."""
    try:
        vmpods.until_effective(guest, shared.scope(), vmpods.listed(cpus(GRANTABLE) - cpus(held.cpus)))
    except GuestError as error:
        pytest.fail(f"{error}\nthe agent holds and says: {guest.run('nodeagent grants -o json; nodeagent status')}")
    all_is_as_it_should_be(guest, held, shared)


def restart_with(guest: Guest, change: str) -> None:
    """The agent again, with another configuration."""
    guest.run(f"sed -i '{change}' /etc/nodeagent/config.yaml && systemctl restart nodeagent")
    guest.run("nodeagent status | grep ', ready'", until=True)


# From the first instruction


def test_the_runtime_offers_nri_and_cdi(guest: Guest) -> None:
    guest.run("test -S /var/run/nri/nri.sock")
    shown = guest.run(CHOSEN.shown_by)
    assert '"/var/run/cdi"' in shown
    assert CHOSEN.unit != "containerd" or "enable_cdi = true" in shown


def test_a_pod_is_on_its_cpus_and_node_from_its_first_instruction(guest: Guest, held: Pod) -> None:
    said = vmpods.first_lines(guest, held)
    (grant,) = json.loads(guest.run("nodeagent grants -o json"))
    assert said["Cpus_allowed_list"] == said["CPUS"] == grant["cpus"] == held.cpus
    assert said["Mems_allowed_list"] == str(min(cpus(held.cpus)) // 4)


def test_what_runs_beside_it_in_its_pod_is_kept_off(guest: Guest, held: Pod) -> None:
    said = vmpods.first_lines(guest, held, "alongside")
    assert cpus(said["Cpus_allowed_list"]) == cpus(GRANTABLE) - cpus(held.cpus)


def test_a_pod_without_cpus_of_its_own_is_on_the_shared_pool_from_its_first_line(
    guest: Guest, held: Pod, shared: Pod
) -> None:
    said = vmpods.first_lines(guest, shared)
    assert cpus(said["Cpus_allowed_list"]) == cpus(GRANTABLE) - cpus(held.cpus)
    assert said["Cpus_allowed_list"] == vmpods.pinning(guest)["shared_cpus"]


def test_the_pool_shrinks_for_those_who_run_and_grows_back(guest: Guest, held: Pod, shared: Pod) -> None:
    more = vmpods.make(guest, "more", 3)
    assert cpus(vmpods.effective(guest, shared.scope())) == cpus(GRANTABLE) - cpus(held.cpus) - cpus(more.cpus)
    vmpods.remove(guest, more)
    until_grown_back(guest, held, shared)


def test_a_pod_that_was_begun_before_the_pool_shrank_never_gets_the_old_pool(
    guest: Guest, held: Pod, shared: Pod
) -> None:
    """systemd writes the slice's cpuset again when its sandbox starts: not what it knew when it loaded the slice."""
    begun = vmpods.admit(guest, "begun", {})
    vmpods.begin(guest, begun)
    exclusive = vmpods.make(guest, "exclusive", 3)
    with vmpods.checked(guest, exclusive) as seen:
        pod = vmpods.run(guest, begun)
    print(f"vm: a pod begun before: {seen['reads']} reads, {seen['overlaps']} overlaps")
    assert seen["reads"] > 50 and seen["wrong"] == 0
    assert seen["overlaps"] == 0, json.dumps(seen["shown"], indent=1)
    vmpods.remove(guest, pod)
    vmpods.remove(guest, exclusive)
    until_grown_back(guest, held, shared)


def test_systemd_has_the_pool_for_pods_of_every_class_and_all_cpus_for_the_classes(guest: Guest, held: Pod) -> None:
    """Kubelet's slices of classes hold pods with CPUs of their own, too."""
    pool = str(vmpods.pinning(guest)["shared_cpus"])
    for qos in ("burstable", "besteffort"):
        pod, above = f"kubepods-{qos}-podx.slice", f"kubepods-{qos}.slice"
        guest.run(f"systemd-run -q --scope --slice={pod} --unit=vm-{qos} sleep 60 >/dev/null 2>&1 &")
        guest.run(f'test "$(systemctl show {pod} -P AllowedCPUs | tr " " ,)" = "{pool}"', until=True)
        assert guest.run(f"systemctl show {above} -P AllowedCPUs").strip() == ""
        assert guest.run(f"cat /sys/fs/cgroup/kubepods.slice/{above}/cpuset.cpus.effective").strip() == ALL
        guest.run(f"systemctl stop vm-{qos}.scope")


def test_status_says_what_is_granted_and_what_is_in_effect(guest: Guest, held: Pod) -> None:
    one = vmpods.pinned(guest, held)
    assert (one["granted_cpus"], one["effective_cpus"]) == (held.cpus, held.cpus)
    assert (one["pod"], one["container"], one["error"]) == ("held", "main", "")
    assert vmpods.pinning(guest)["errors"] == {}


# What others do


@pytest.mark.parametrize("whose", ["container", "pod"])
def test_a_wrong_cpuset_is_repaired_at_once_and_counted(guest: Guest, held: Pod, shared: Pod, whose: str) -> None:
    before = vmpods.pinning(guest)["drifts"]
    file = f"{held.scope() if whose == 'container' else shared.slice}/cpuset.cpus"
    took_s = [float(guest.run(f"{vmpods.PYTHON} /share/inside/drift.py {file} {ALL}")) for _ in range(5)]
    print(f"vm: wrong cpuset of a {whose} repaired: median {sorted(took_s)[2]:.3f} s, worst {max(took_s):.3f} s")
    assert max(took_s) < REPAIR_S
    guest.run(f"""nodeagent status -o json | grep -qE '"drifts": *{before + 5}\\b'""", until=True)
    all_is_as_it_should_be(guest, held, shared)


def test_daemon_reload_changes_nothing(guest: Guest, held: Pod, shared: Pod) -> None:
    before = vmpods.pinning(guest)["drifts"]
    guest.run("systemctl daemon-reload")
    all_is_as_it_should_be(guest, held, shared)
    print(f"vm: daemon-reload: {vmpods.pinning(guest)['drifts'] - before} drifts")


def test_a_restart_of_the_runtime_leaves_all_as_it_was_and_the_next_pod_is_pinned(
    guest: Guest, held: Pod, shared: Pod
) -> None:
    guest.run(f"systemctl restart {CHOSEN.unit}")
    all_is_as_it_should_be(guest, held, shared)
    vmpods.until_connected(guest)
    pod = vmpods.make(guest, "after-restart", 2)
    assert vmpods.first_lines(guest, pod)["Cpus_allowed_list"] == pod.cpus
    vmpods.remove(guest, pod)
    until_grown_back(guest, held, shared)


def test_what_went_wrong_while_the_agent_was_dead_is_repaired_when_it_is_back(
    guest: Guest, held: Pod, shared: Pod
) -> None:
    pid = guest.run("systemctl show nodeagent -P MainPID").strip()
    guest.run("systemctl kill -s KILL nodeagent")
    guest.run(f"echo {ALL} >{held.scope()}/cpuset.cpus; echo {ALL} >{shared.slice}/cpuset.cpus")
    guest.run(
        f'test "$(systemctl show nodeagent -P MainPID)" != {pid} && nodeagent status | grep ", ready"', until=True
    )
    vmpods.until_effective(guest, held.scope(), held.cpus)
    vmpods.until_effective(guest, shared.slice, vmpods.pinning(guest)["shared_cpus"])
    all_is_as_it_should_be(guest, held, shared)
    assert vmpods.pinned(guest, held)["granted_cpus"] == held.cpus


# CPUs that go and come


def test_a_pod_lives_on_its_other_cpus_when_one_goes_and_on_the_pool_when_all_go(
    guest: Guest, held: Pod, shared: Pod
) -> None:
    first, second = sorted(cpus(held.cpus))
    pool = vmpods.effective(guest, shared.scope())
    guest.run(f"echo 0 >/sys/devices/system/cpu/cpu{second}/online")
    vmpods.until_effective(guest, held.scope(), str(first))
    guest.run(f"""nodeagent status -o json | grep -q '"lost_cpus": *"{second}"'""", until=True)
    guest.run(f"echo 0 >/sys/devices/system/cpu/cpu{first}/online")
    vmpods.until_effective(guest, held.scope(), pool)
    for cpu in (first, second):
        guest.run(f"echo 1 >/sys/devices/system/cpu/cpu{cpu}/online")
    vmpods.until_effective(guest, held.scope(), held.cpus)
    guest.run("""nodeagent status -o json | grep -q '"lost_cpus": *""'""", until=True)
    all_is_as_it_should_be(guest, held, shared)


def test_a_pod_whose_cpus_are_all_gone_does_not_start_unless_a_warning_is_enough(
    guest: Guest, held: Pod, shared: Pod
) -> None:
    admitted = vmpods.admit(guest, "lost", {vmpods.CPU: 1})
    online = f"/sys/devices/system/cpu/cpu{admitted.cpus}/online"
    guest.run(f"echo 0 >{online}")
    try:
        guest.kubelet("until", resource=vmpods.CPU, lacks=[f"cpu{admitted.cpus}"])
        # A runtime that waited too long for an answer calls no plugin until the agent has connected again.
        vmpods.until_connected(guest)
        with pytest.raises(GuestError, match=f"its CPUs {admitted.cpus} are offline"):
            vmpods.run(guest, admitted)
        guest.run('sed -i \'s/"pinning": {/"pinning": {"onFailure": "warn", /\' /etc/nodeagent/config.yaml')
        guest.run("systemctl reload nodeagent")
        vmpods.until_connected(guest)
        pod = vmpods.run(guest, admitted)
        guest.run("journalctl --no-pager -u nodeagent | grep started-unconfined")
    finally:
        guest.run(f"echo 1 >{online}")
    vmpods.until_effective(guest, pod.scope(), pod.cpus)
    vmpods.remove(guest, pod)
    guest.run('sed -i \'s/"onFailure": "warn", //\' /etc/nodeagent/config.yaml && systemctl reload nodeagent')
    vmpods.until_connected(guest)
    until_grown_back(guest, held, shared)


def test_a_pod_is_a_partition_where_that_is_wanted_and_its_cpus_come_back(guest: Guest, held: Pod, shared: Pod) -> None:
    """The kernel itself keeps everybody off, the host's own services too."""
    folder, name = "/etc/systemd/system/nodeagent.service.d", "nodeagent-partitions.conf"
    guest.run(f"install -D -m 644 -t {folder} /share/systemd/{name} && systemctl daemon-reload")
    restart_with(guest, 's/"pinning": {/"pinning": {"partition": "root", /')
    host = "/sys/fs/cgroup/system.slice/cpuset.cpus.effective"
    pod = vmpods.make(guest, "partition", 2)
    for one in (pod, held):
        guest.run(f'test "$(cat {one.scope()}/cpuset.cpus.partition)" = root', until=True)
        assert vmpods.effective(guest, one.scope()) == one.cpus
    assert not cpus(guest.run(f"cat {host}")) & (cpus(pod.cpus) | cpus(held.cpus))
    vmpods.remove(guest, pod)
    guest.run(f'test "$(cat /sys/fs/cgroup/kubepods.slice/cpuset.cpus.exclusive)" = "{held.cpus}"', until=True)
    restart_with(guest, 's/"partition": "root", //')
    guest.run(f'test "$(cat {held.scope()}/cpuset.cpus.partition)" = member', until=True)
    guest.run(f'test "$(cat {host})" = {ALL}', until=True)
    guest.run(f"rm {folder}/{name} && systemctl daemon-reload && systemctl restart nodeagent")
    guest.run("nodeagent status | grep ', ready'", until=True)
    until_grown_back(guest, held, shared)


# Without the runtime's questions


def test_without_nri_a_pod_is_pinned_soon_after_it_appears(guest: Guest, held: Pod, shared: Pod) -> None:
    restart_with(guest, 's/"pinning": {/"pinning": {"mode": "cgroup", /')
    admitted = vmpods.admit(guest, "unannounced", {vmpods.CPU: 2})
    loop = "i=0; while [ $i -lt 400 ]; do grep Cpus_allowed_list /proc/self/status; i=$((i + 1)); done; "
    pod = vmpods.run(guest, admitted, f"{loop} echo CPUS=$NODEAGENT_CPUS; exec sleep infinity")
    vmpods.until_effective(guest, pod.scope(), pod.cpus)
    assert vmpods.pinning(guest)["mode"] == "cgroup" and vmpods.pinned(guest, pod)["pod"] == "unannounced"
    guest.run("grep -q CPUS= /var/log/pods/unannounced/main.log", until=True)
    seen = guest.run("date -d $(head -n 1 /var/log/pods/unannounced/main.log | cut -d' ' -f1) +%s.%N").strip()
    log = guest.run(f"grep -m 1 'list:.{pod.cpus}$' /var/log/pods/unannounced/main.log | cut -d' ' -f1").strip()
    right = guest.run(f"date -d {log} +%s.%N").strip()
    print(f"vm: without NRI a container was pinned {float(right) - float(seen):.3f} s after its first line")
    vmpods.remove(guest, pod)
    until_grown_back(guest, held, shared)


def test_nothing_was_unforeseen(guest: Guest) -> None:
    """The last of this file: what the journal holds against the agent after everything above."""
    assert "Traceback" not in guest.run("journalctl --no-pager -u nodeagent -u vm-kubelet")
    # An agent that is killed while it registers hangs up on kubelet.
    assert [one for one in guest.kubelet("state")["violations"] if "CANCELLED" not in one] == []
