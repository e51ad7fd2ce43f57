"""Named pools: never on exclusive CPUs, never fewer CPUs than asked for, never outside the group, always the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import allocate
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.deviceplugin.view import CpuResource
from nodeagent.core.dra.cpu_pool import L3, NUMA_NODE, CpuPool, group_around
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.prepare import Catalog, grants_of, prepare, unprepare
from nodeagent.core.ledger.ledger import Ledger, release
from nodeagent.core.model.claim import Claim
from nodeagent.core.model.container import RUNNING, Container
from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.pinning.plan import Pin, Rules, Situation, variable
from nodeagent.core.pinning.pools import PoolName, cpus_brought, exclusive_cpus, pool_of
from nodeagent.errors import Refused
from nodeagent.state import grant_json
from tests.builders.inventories import even_distances, even_rows, inventory_of
from tests.builders.pools import DRIVER, NODE, claim, device, result, stamp

CPU_PLUGIN = CpuResource(name="r/cpu")
RESERVED = CpuSet([0])


def machine(without: frozenset[int] = frozenset()) -> Inventory:
    """2 NUMA nodes of 2 L3 groups of 2 cores of 2 threads: CPU n and n + 8 are siblings, 0-3 and 8-11 on node 0. An
    adapter hangs on CPUs 2, 3, 10 and 11."""
    rows = [row for row in even_rows(2, 1, 2, 2, 2) if row[0] not in without]
    near = device("nic", numa_node=0, local_cpus=CpuSet([2, 3, 10, 11]))
    return inventory_of(rows, distances=even_distances(2, 1), devices=(near,))


def catalog(group: str = NUMA_NODE) -> Catalog:
    nics = DevicePool(kind="nic", resources=(DeviceResource(name="r/nic", kind="nic"),))
    return Catalog(driver=DRIVER, node_name=NODE, kinds={"cpu": CpuPool(group=group), "nic": nics})


def asked(name: str, pool: str, count: int, on: str = "numa0", namespace: str = "ns", **config: Any) -> Claim:
    """An allocated claim; without a pool its CPUs are exclusive."""
    said = {"kind": "CpuConfig", **({"namedPool": pool} if pool else {}), **config}
    amount = {} if on.startswith("cpu") else {"cpus": count}
    made = claim(name, result("cpu", on, share=name, **amount), config=said)
    return replace(made, ref=replace(made.ref, namespace=namespace), reserved_for=(f"pod-{name}",))


class Node:
    """A machine and what is granted on it."""

    def __init__(self, inventory: Inventory | None = None, of: Catalog | None = None) -> None:
        self.inventory = inventory or machine()
        self.catalog = of or catalog()
        self.ledger = Ledger(reserved=RESERVED)
        self.rules = Rules()

    def prepare(self, *claims: Claim) -> dict[str, str]:
        """Return why claims are refused, by UID."""
        batch = prepare(self.inventory, self.ledger, self.catalog, claims, stamp())
        self.ledger = batch.ledger
        return dict(batch.errors)

    def give(self, *claims: Claim) -> None:
        assert not self.prepare(*claims)

    def unprepare(self, name: str) -> None:
        self.ledger = unprepare(self.ledger, [f"uid-{name}"], "done").ledger

    @property
    def situation(self) -> Situation:
        return Situation(inventory=self.inventory, ledger=self.ledger, rules=self.rules)

    def container(self, *names: str) -> Container:
        """A container of a pod that uses some claims."""
        env = {variable(one.id): one.id for name in names for one in grants_of(self.ledger, f"uid-{name}")}
        return Container(id=names[0], pod_id="s", pod_uid=f"pod-{names[0]}", name="main", state=RUNNING, env=env)

    def pin(self, *names: str) -> Pin:
        return self.situation.pin(self.container(*names))

    def runs_on(self, *names: str) -> str:
        return str(self.pin(*names).cpus)

    def held(self, name: str) -> CpuSet:
        return union(one.cpus for one in grants_of(self.ledger, f"uid-{name}"))


def test_members_run_on_what_all_of_them_brought_and_on_what_nobody_holds_in_their_group() -> None:
    node = Node()
    node.give(asked("a", "web", 2), asked("b", "web", 2))
    assert node.runs_on("a") == node.runs_on("b") == "1-3,8-11"
    assert len(node.held("a") | node.held("b")) == 4
    assert not node.pin("a").exclusive and node.pin("a").pools == ("web",)


def test_a_pool_shrinks_when_exclusive_cpus_are_granted_and_grows_when_they_are_released() -> None:
    """Down to what its members asked for, and never to the idle sibling of an exclusive CPU: of CPUs 1 and 9 one is
    exclusive."""
    node = Node()
    node.give(asked("a", "web", 2))
    before = node.pin("a").cpus
    node.give(asked("x", "", 1))
    assert node.held("x") == CpuSet([8]), "the sibling of the reserved CPU 0 is the CPU that breaks no core"
    assert node.pin("a").cpus == CpuSet.parse("1-3,9-11")
    node.give(asked("y", "", 3))
    mine = node.pin("a").cpus
    assert mine is not None and node.held("a") <= mine and mine.isdisjoint(node.held("y") | node.held("x"))
    siblings = CpuSet((cpu + 8) % 16 for cpu in node.held("y"))
    assert (mine - node.held("a")).isdisjoint(siblings)
    for name in ("x", "y"):
        node.unprepare(name)
    assert node.pin("a").cpus == before


def test_what_a_pool_was_promised_is_granted_to_nobody_else() -> None:
    node = Node()
    node.give(asked("a", "web", 4), asked("b", "web", 2))
    assert "held there by claim ns/a, claim ns/b" in node.prepare(asked("x", "", 2))["uid-x"]
    taken = [f"cpu{cpu}" for cpu in node.held("a")]
    with pytest.raises(Refused, match="held by claim ns/a"):
        allocate(node.inventory, node.ledger, CPU_PLUGIN, [taken[:1]], stamp())
    shown = {one.id: one.healthy for one in CPU_PLUGIN.advertised(node.inventory, node.ledger, {})}
    assert not any(shown[one] for one in taken)


def test_pools_of_other_names_and_namespaces_have_nothing_to_do_with_each_other() -> None:
    node = Node()
    node.give(asked("a", "web", 2), asked("b", "batch", 2), asked("c", "web", 2, namespace="other"))
    for one, others in (("a", "bc"), ("b", "ac"), ("c", "ab")):
        cpus = node.pin(one).cpus
        assert cpus is not None and cpus - node.held(one) <= node.situation.shared
        assert cpus.isdisjoint(union(node.held(other) for other in others))
    assert cpus_brought(node.ledger, PoolName("other", "web")) == node.held("c")


def test_nobody_else_runs_on_what_was_brought_into_a_pool() -> None:
    node = Node()
    node.give(asked("a", "web", 2))
    plan = node.situation.plan([node.container("a")], ["pod-a", "pod-web"])
    assert plan.shared.isdisjoint(node.held("a"))
    assert plan.pod("pod-web").cpus == plan.shared
    assert plan.pod("pod-a").cpus == plan.shared | node.held("a")


def test_a_container_beside_a_member_is_confined_to_what_is_left_for_all() -> None:
    node = Node()
    node.give(asked("a", "web", 2))
    beside = Container(id="s", pod_id="s", pod_uid="pod-a", name="sidecar", state=RUNNING)
    plan = node.situation.plan([node.container("a"), beside])
    assert plan.containers["s"].cpus == plan.shared
    assert plan.containers["a"].cpus == node.pin("a").cpus


def test_a_member_with_exclusive_cpus_has_both() -> None:
    node = Node()
    both = asked("a", "web", 2)
    node.give(both, replace(asked("x", "", 2, "numa1"), reserved_for=both.reserved_for))
    pin = node.pin("a", "x")
    assert (pin.exclusive, pin.alone, pin.pools) == (True, node.held("x"), ("web",))
    assert pin.cpus is not None and node.held("x") | node.held("a") <= pin.cpus


def test_each_member_stays_in_its_group_although_the_pool_has_several() -> None:
    node = Node()
    node.give(asked("a", "web", 1, "numa0"), asked("b", "web", 1, "numa1"))
    assert (node.runs_on("a"), node.runs_on("b")) == ("1-3,8-11", "4-7,12-15")
    caches = Node(of=catalog(L3))
    caches.give(asked("a", "web", 1, "l3-1"))
    assert caches.runs_on("a") == "2-3,10-11"


def test_single_cpus_are_shared_within_their_numa_node() -> None:
    node = Node(of=catalog("individual"))
    node.give(asked("a", "web", 1, "cpu2"), asked("b", "web", 1, "cpu9"), asked("x", "", 1, "cpu3"))
    assert node.runs_on("a") == node.runs_on("b") == "1-2,8-10"


def test_a_pool_lies_near_the_devices_of_the_pod_and_otherwise_near_its_own_cpus() -> None:
    node, second_cache = Node(), CpuSet([2, 3, 10, 11])
    node.give(asked("a", "web", 1, "l3-1"), asked("other", "", 1, "l3-0"))
    node.give(asked("b", "web", 2))
    assert node.held("b") <= second_cache, "the cache in which the pool already is"
    node = Node()
    node.give(asked("a", "web", 1, "l3-0"))
    nic = claim("nic", result("nic", "nic"))
    node.give(replace(nic, reserved_for=("pod-b",)), asked("b", "web", 2))
    assert node.held("b") <= second_cache, "the cache near the adapter of the same pod"


def test_reserved_cpus_are_in_a_pool_only_where_others_may_use_them_too() -> None:
    node = Node()
    node.give(asked("a", "web", 2))
    assert 0 not in (node.pin("a").cpus or EMPTY)
    node.rules = Rules(strict_reservation=False)
    assert 0 in (node.pin("a").cpus or EMPTY)
    node.give(asked("x", "", 8, "numa1"), asked("y", "", 5))
    node.rules = Rules()
    assert node.situation.shared == RESERVED and node.pin("a").cpus == node.held("a")


def test_a_member_all_of_whose_cpus_are_offline_runs_on_the_rest_of_its_pool() -> None:
    node = Node()
    node.give(asked("a", "web", 2))
    node.inventory = machine(without=frozenset(node.held("a")))
    pin = node.pin("a")
    assert pin.lost == node.held("a") == pin.held and pin.cpus == group_around(node.inventory, "numa0") - RESERVED
    node.inventory = machine(without=frozenset({*range(4), *range(8, 12)}))
    assert node.pin("a").cpus == node.situation.shared


def test_settings_of_a_later_version_leave_the_cpus_exclusive() -> None:
    node = Node()
    node.give(asked("a", "web", 2))
    (grant,) = grants_of(node.ledger, "uid-a")
    later = replace(grant, settings='{"named_pool":"web","what_is_this":1}')
    assert pool_of(grant) == PoolName("ns", "web") and pool_of(later) is None


class OnePool(RuleBasedStateMachine):
    """Claims with and without pools, containers of the device plugin, CPUs that go offline, and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.node = Node()
        self.claims: dict[str, Claim] = {}
        self.containers: list[str] = []
        self.gone: frozenset[int] = frozenset()
        self.count = 0

    @rule(
        pool=st.sampled_from(["", "", "web", "web", "batch"]),
        namespace=st.sampled_from(["ns", "other"]),
        on=st.sampled_from(["numa0", "numa1", "l3-0", "l3-1", "l3-3", "socket0", "cpu2", "cpu13"]),
        count=st.integers(1, 4),
        options=st.sampled_from([[], ["full-pcpus-only"], ["distribute-cpus-across-cores"]]),
    )
    def prepare(self, pool: str, namespace: str, on: str, count: int, options: list[str]) -> None:
        self.count += 1
        one = asked(f"c{self.count}", pool, count, on, namespace, options=options)
        if not self.node.prepare(one):
            self.claims[one.ref.name] = one

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def unprepare(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.claims)))
        self.node.unprepare(name)
        del self.claims[name]

    @rule(data=st.data())
    def start_container(self, data: st.DataObject) -> None:
        node = self.node
        free = [one.id for one in CPU_PLUGIN.advertised(node.inventory, node.ledger, {}) if one.healthy]
        ours = {id for resource, id in node.ledger.by_id if resource == CPU_PLUGIN.name}
        if ids := sorted(set(free) - ours):
            some = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=3, unique=True))
            self.count += 1
            made = allocate(node.inventory, node.ledger, CPU_PLUGIN, [some], stamp(self.count * 100.0))
            node.ledger = made.ledger
            self.containers.append(made.grants[0].id)

    @precondition(lambda self: self.containers)
    @rule(data=st.data())
    def stop_container(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.containers))
        self.containers.remove(name)
        self.node.ledger = release(self.node.ledger, [name])

    @rule(cpu=st.integers(1, 15))
    def flip_cpu(self, cpu: int) -> None:
        """It goes offline or comes back."""
        self.gone = self.gone ^ {cpu}
        self.node.inventory = machine(self.gone)

    @rule()
    def restart(self) -> None:
        """What was written is all that a new agent knows, in whatever order it reads it."""
        lines = [grant_json.write(one) for one in self.node.ledger.grants.values()]
        read = {(one := grant_json.read(line, "test")).id: one for line in reversed(lines)}
        before = {name: self.node.pin(name) for name in self.claims}
        self.node.ledger = Ledger(grants=read, reserved=RESERVED)
        assert {name: self.node.pin(name) for name in self.claims} == before

    def _members(self) -> dict[str, Grant]:
        found = {name: grants_of(self.node.ledger, f"uid-{name}")[0] for name in self.claims}
        return {name: grant for name, grant in found.items() if pool_of(grant) is not None}

    @invariant()
    def members_are_off_exclusive_cpus_and_their_idle_siblings(self) -> None:
        inventory, ledger = self.node.inventory, self.node.ledger
        alone = exclusive_cpus(ledger)
        siblings = CpuSet(one for cpu in alone & inventory.cpus_online for one in (cpu, (cpu + 8) % 16))
        for name, grant in self._members().items():
            cpus = self.node.pin(name).cpus or EMPTY
            brought = cpus_brought(ledger, pool_of(grant) or PoolName("", ""))
            assert cpus.isdisjoint(alone)
            if self.node.pin(name).pool_cpus & inventory.cpus_usable:
                assert (cpus - brought).isdisjoint(siblings)

    @invariant()
    def members_have_what_they_asked_for_and_stay_in_their_group(self) -> None:
        inventory, members = self.node.inventory, self._members()
        for name, grant in members.items():
            pin = self.node.pin(name)
            cpus, device = pin.cpus or EMPTY, grant.result.device if grant.result else ""
            group = group_around(machine(), device)
            same = [one for one in members.values() if pool_of(one) == pool_of(grant) and one.cpus <= group]
            assert grant.cpus & inventory.cpus_usable <= cpus
            if pin.pool_cpus & inventory.cpus_usable:
                assert cpus <= group
                assert len(cpus) >= sum(len(one.cpus & inventory.cpus_usable) for one in same)

    @invariant()
    def nobody_without_a_claim_is_on_held_cpus(self) -> None:
        held = union(one.cpus for one in self.node.ledger.grants.values())
        assert self.node.situation.shared.isdisjoint(held)
        assert exclusive_cpus(self.node.ledger).isdisjoint(union(one.cpus for one in self._members().values()))
        claims = [one for one in self.node.ledger.grants.values() if one.holder.api == CLAIM]
        assert len(held) == sum(len(one.cpus) for one in self.node.ledger.grants.values())
        assert len(claims) == len(self.claims)


TestOnePool = OnePool.TestCase
TestOnePool.settings = settings(stateful_step_count=25)
