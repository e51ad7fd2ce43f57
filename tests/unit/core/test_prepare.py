"""Decisions about claims: all or nothing, the same again, near to what belongs together, and never anything twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import allocate
from nodeagent.core.deviceplugin.devices import DeviceResource, shares_of
from nodeagent.core.deviceplugin.view import CpuResource, HugepageResource, ResourceKind
from nodeagent.core.dra.cpu_pool import CPUS, INDIVIDUAL, L3, NUMA_NODE, SOCKET, CpuPool, PoolKind
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.memory_pools import MemoryPool, PagePool
from nodeagent.core.dra.pool import DevicePart, Features, PoolDevice
from nodeagent.core.dra.prepare import Batch, Catalog, grants_of, prepare, unprepare
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.ledger.free import grantable
from nodeagent.core.ledger.ledger import GRANTED, RELEASED, Ledger, grant, release
from nodeagent.core.model.claim import Claim, Result
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import SINGLE, Pages
from nodeagent.core.model.topology import EFFICIENCY, PERFORMANCE
from nodeagent.errors import Refused
from tests.builders.inventories import GIB, even_distances, even_rows, inventory_of
from tests.builders.pools import DRIVER, FORMS, NOBODY, NODE, claim, device, pool_of, result, stamp

MIB = 1 << 20
CPU_PLUGIN = CpuResource(name="r/cpu")
PAGE_PLUGIN = HugepageResource(name="r/pages", page_bytes=2 * MIB)
NICS = DeviceResource(name="r/nic", kind="nic")
CHARS = DeviceResource(name="r/char", kind="char", replicas=3)
EMPTY_BATCH = Batch(ledger=NOBODY)


def machine() -> Inventory:
    """2 sockets of 2 NUMA nodes of 2 L3 groups of 2 CPUs; 4 pages a node; adapters on the nodes 1 and 3."""
    return inventory_of(
        even_rows(2, 2, 2, 2, 1),
        distances=even_distances(2, 2),
        pages={(node, 2 * MIB): 4 for node in range(4)},
        memory=dict.fromkeys(range(4), GIB),
        devices=(
            device("/dev/c", "char", paths=("/dev/c",)),
            device("a", numa_node=1, local_cpus=CpuSet([4, 5, 6, 7])),
            device("b", numa_node=3, local_cpus=CpuSet([12, 13, 14, 15])),
            device("vf0", numa_node=3, parent="b"),
            device("vf1", numa_node=3, parent="b"),
        ),
    )


def catalog(cpu: CpuPool = CpuPool(group=SOCKET)) -> Catalog:  # noqa: B008 - a frozen value
    kinds: dict[str, PoolKind] = {
        "cpu": cpu,
        "hugepages": PagePool(sizes=(2 * MIB,)),
        "memory": MemoryPool(),
        "nic": DevicePool(kind="nic", resources=(NICS,)),
        "char": DevicePool(kind="char", resources=(CHARS,)),
    }
    return Catalog(driver=DRIVER, node_name=NODE, kinds=kinds)


def cpus(name: str, count: int, request: str = "cpus", share: str = "") -> Result:
    return result("cpu", name, request, share=share, cpus=count)


def pages(node: int, count: int, share: str = "") -> Result:
    return result("hugepages", f"numa{node}-2mi", "pages", share=share, size=count * 2 * MIB)


def ask(*claims: Claim, ledger: Ledger = NOBODY, of: Catalog | None = None, at: float = 1000.0) -> Batch:
    return prepare(machine(), ledger, of or catalog(), claims, stamp(at))


def given(batch: Batch, name: str) -> CpuSet:
    """CPUs of the first grant of a claim."""
    assert not batch.errors
    return batch.grants[f"uid-{name}"][0].cpus


def why_not(one: Claim, ledger: Ledger = NOBODY, of: Catalog | None = None) -> str:
    batch = ask(one, ledger=ledger, of=of)
    assert (batch.ledger, batch.changes, batch.grants) == (ledger, (), {})
    (error,) = batch.errors.values()
    assert error.startswith("cannot prepare claim ns/")
    return error


def by_plugin(resource: ResourceKind, *ids: str, ledger: Ledger = NOBODY) -> Ledger:
    return allocate(machine(), ledger, resource, [ids], stamp(0)).ledger


# All or nothing


def test_each_result_is_a_grant_with_what_it_stands_for() -> None:
    """In the order of the allocation, held by the claim, with what the scheduler said."""
    one = claim(
        "c",
        cpus("socket0", 2),
        pages(1, 3),
        result("memory", "numa0", size=4096),
        result("nic", "a"),
        result("char", "dev-c", shares=2),
        replace(result("nic", "other"), driver="other.example"),
    )
    batch = ask(one)
    got = batch.grants["uid-c"]
    assert [it.id for it in got] == [f"uid-c-{n}" for n in range(5)]
    assert len(got[0].cpus) == 2
    assert got[1].hugepages == (Pages(node=1, page_bytes=2 * MIB, pages=3),)
    assert (got[2].memory, got[3].devices, got[4].shares) == (((0, 4096),), ("a",), ("/dev/c",))
    assert [it.result for it in got] == list(one.results[:5])
    assert {(str(it.holder), it.holder.uid, it.confirmed, it.boot_id) for it in got} == {
        ("claim ns/c", "uid-c", True, "b")
    }
    assert [it.holder.resource for it in got] == [
        f"{kind}.{DRIVER}" for kind in ("cpu", "hugepages", "memory", "nic", "char")
    ]
    assert [(it.action, it.grant) for it in batch.changes] == [(GRANTED, it) for it in got]
    assert dict(batch.ledger.grants) == {it.id: it for it in got}


def test_a_claim_gets_all_or_nothing_and_one_that_is_refused_harms_no_other() -> None:
    """The second wants one page too many; what it would have got besides goes to the third."""
    batch = ask(
        claim("first", cpus("socket0", 4), pages(0, 2)),
        claim("second", cpus("socket0", 4), pages(0, 3)),
        claim("third", cpus("socket0", 4), pages(0, 2)),
        claim("fourth", result("nic", "nobody")),
    )
    assert sorted(batch.grants) == ["uid-first", "uid-third"]
    assert sorted(batch.errors) == ["uid-fourth", "uid-second"]
    assert batch.ledger.cpus_held == CpuSet(range(8))
    assert {it.grant.holder.claim for it in batch.changes} == {"first", "third"}


def test_the_same_claim_again_changes_nothing() -> None:
    """Nor twice in one call, nor if what it holds is not served or not there any longer."""
    one = claim("c", cpus("socket0", 4), result("nic", "a"))
    batch = ask(one, one)
    again = ask(one, ledger=batch.ledger, at=2000)
    assert (again.grants, again.changes, again.errors) == (batch.grants, (), {})
    assert again.ledger is batch.ledger
    bare = Catalog(driver=DRIVER, node_name=NODE)
    assert prepare(inventory_of([]), batch.ledger, bare, [one], stamp()).grants == batch.grants


def test_what_was_allocated_anew_under_the_same_uid_replaces_what_was_held() -> None:
    """In one batch: what is released first is there for what is granted then."""
    before = ask(claim("c", cpus("socket0", 8), result("nic", "a"), pages(0, 4)))
    after = ask(claim("c", cpus("socket0", 6), pages(0, 3)), ledger=before.ledger)
    assert [it.action for it in after.changes] == [RELEASED] * 3 + [GRANTED] * 2
    assert [len(it.cpus) for it in grants_of(after.ledger, "uid-c")] == [6, 0]
    assert len(after.ledger.grants) == 2
    refused = ask(claim("c", cpus("socket0", 9)), ledger=before.ledger)
    assert (refused.ledger, refused.changes) == (before.ledger, ())


def test_unprepare_releases_all_of_a_claim_and_nothing_of_another() -> None:
    """One that holds nothing is no error, nor is one that is named twice."""
    both = ask(claim("c", cpus("socket0", 2), result("nic", "a")), claim("d", cpus("socket0", 2))).ledger
    gone = unprepare(both, ["uid-c", "nobody", "uid-c"], "done")
    assert [(it.action, it.grant.id) for it in gone.changes] == [(RELEASED, "uid-c-0"), (RELEASED, "uid-c-1")]
    assert list(gone.ledger.grants) == ["uid-d-0"]
    assert unprepare(gone.ledger, ["uid-c"], "done").changes == ()


def test_a_claim_of_many_devices_keeps_their_order() -> None:
    """The tenth after the second."""
    one = claim(
        "c",
        *(pages(n % 4, 1, share=f"s{n}") for n in range(16)),
        *(result("char", "dev-c", share=f"t{n}") for n in range(3)),
    )
    ledger = ask(one).ledger
    assert [it.result for it in grants_of(ledger, "uid-c")] == list(one.results)


# Where CPUs lie


@pytest.mark.parametrize(
    ("group", "name", "within"),
    [(SOCKET, "socket1", range(8, 16)), (NUMA_NODE, "numa2", range(8, 12)), (L3, "l3-5", (10, 11))],
)
def test_cpus_lie_in_the_group_that_the_scheduler_chose(group: str, name: str, within: range) -> None:
    """Also where what is near lies elsewhere."""
    got = given(ask(claim("c", cpus(name, 2), result("nic", "a")), of=catalog(CpuPool(group=group))), "c")
    assert len(got) == 2
    assert set(got) <= set(within)


@pytest.mark.parametrize(
    ("alongside", "nodes"),
    [([result("nic", "a")], {1}), ([pages(1, 1)], {1}), ([result("memory", "numa1", size=4096)], {1}), ([], {0})],
)
@pytest.mark.parametrize("apart", [False, True])
def test_cpus_lie_near_the_devices_pages_and_memory_of_the_same_pod(
    alongside: list[Result], nodes: set[int], apart: bool
) -> None:
    """Of the same claim, or of another of the same call that comes later, or that is granted already."""
    if apart and alongside:
        other = claim("other", *alongside)
        assert given(ask(claim("c", cpus("socket0", 2)), other), "c") == CpuSet([4, 5])
        assert given(ask(other, claim("c", cpus("socket0", 2)), ledger=ask(other).ledger), "other") == CpuSet()
        batch = ask(claim("c", cpus("socket0", 2)), other, ledger=ask(other).ledger)
        assert given(batch, "c") == CpuSet([4, 5])
        return
    got = given(ask(claim("c", cpus("socket0", 2), *alongside)), "c")
    assert {cpu // 4 for cpu in got} == nodes


def test_cpus_of_one_pod_lie_near_each_other() -> None:
    """Of one claim the larger set decides, of several the first; those of a claim that is granted already too."""
    few, many, ledger = cpus("socket0", 1), cpus("numa1", 2), by_plugin(CPU_PLUGIN, "cpu0")
    assert [it.cpus for it in ask(claim("c", few, many), ledger=ledger).grants["uid-c"]] == [
        CpuSet([6]),
        CpuSet([4, 5]),
    ]
    one, other = claim("many", many), claim("few", few)
    assert given(ask(one, other, ledger=ledger), "few") == CpuSet([6])
    before = ask(one, ledger=ledger).ledger
    assert given(ask(other, one, ledger=before), "few") == CpuSet([6])
    assert given(ask(other, ledger=before), "few") == CpuSet([1])


def test_what_leaves_no_choice_is_granted_first() -> None:
    """7 of 8 CPUs and the one that was named: whichever stands first."""
    for results in ([cpus("socket0", 7), cpus("cpu3", 1)], [cpus("cpu3", 1), cpus("socket0", 7)]):
        assert ask(claim("c", *results)).ledger.cpus_held == CpuSet(range(8))


def test_an_administrator_sees_a_device_without_holding_it() -> None:
    """Alongside its holder, shared or not, of CPUs too; and nothing is drawn near to it."""
    ledger = ask(claim("holder", result("nic", "a"), cpus("socket0", 8))).ledger
    admin = claim(
        "c", result("nic", "a", admin=True), result("cpu", "socket0", admin=True), result("char", "dev-c", admin=True)
    )
    batch = ask(admin, claim("d", result("nic", "a", admin=True)), ledger=ledger)
    assert not batch.errors
    for one in (*batch.grants["uid-c"], *batch.grants["uid-d"]):
        assert not (one.cpus or one.devices or one.shares or one.hugepages or one.memory)
    assert ask(claim("e", result("nic", "b")), ledger=batch.ledger).errors == {}
    drawn = ask(claim("f", result("nic", "a", admin=True), cpus("socket0", 1)))
    assert drawn.grants["uid-f"][1].cpus == CpuSet([0])


# Options


def whole(config: Mapping[str, Any] | None, count: int, pool: CpuPool, ledger: Ledger = NOBODY) -> CpuSet | str:
    """What a machine of 2 performance cores of 2 threads (0 to 3) and 2 efficiency cores (4, 5) gives."""
    rows = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (2, 0, 0, 0, 1), (3, 0, 0, 0, 1), (4, 0, 0, 0, 2), (5, 0, 0, 0, 3)]
    inventory = inventory_of(rows, core_kinds={n: PERFORMANCE if n < 4 else EFFICIENCY for n in range(6)})
    one = claim("c", cpus("numa0", count), config=config)
    batch = prepare(inventory, ledger, catalog(pool), [one], stamp())
    return batch.errors["uid-c"] if batch.errors else batch.grants["uid-c"][0].cpus


def test_a_claim_says_how_its_cpus_are_chosen_and_else_the_node_does() -> None:
    """Whole cores stay whole, whatever the claim says besides."""
    efficient = {"kind": "CpuConfig", "coreType": "efficiency"}
    plain, cores = CpuPool(), CpuPool(options=frozenset({"full-pcpus-only"}))
    assert whole(None, 2, CpuPool(options=frozenset({"require-efficiency-cores"}))) == CpuSet([4, 5])
    assert whole(efficient, 2, plain) == whole(efficient, 2, cores) == CpuSet([4, 5])
    assert whole(
        {"kind": "CpuConfig", "options": ["require-performance-cores"]},
        2,
        CpuPool(options=frozenset({"require-efficiency-cores"})),
    ) == CpuSet([0, 1])
    assert "full-pcpus-only" in whole({"kind": "CpuConfig", "options": ["distribute-cpus-across-cores"]}, 2, cores)
    assert "efficiency" in whole(efficient, 3, plain)


def test_a_numa_policy_of_the_claim_or_the_node_is_kept() -> None:
    """4 CPUs of a socket of two nodes with 3 free each: not on a single one."""
    ledger = by_plugin(CPU_PLUGIN, "cpu0", "cpu4")
    strict = CpuPool(group=SOCKET, numa=SINGLE)
    assert "NUMA" in why_not(claim("c", cpus("socket0", 4)), ledger, catalog(strict))
    assert "NUMA" in why_not(claim("c", cpus("socket0", 4), config={"kind": "CpuConfig", "numa": "single"}), ledger)
    loose = claim("c", cpus("socket0", 4), config={"kind": "CpuConfig", "numa": "best-effort"})
    assert len(given(ask(loose, ledger=ledger, of=catalog(strict)), "c")) == 4


# What is refused, and how


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (cpus("socket0", 0), "request cpus, device node-a/cpu/socket0: 0 CPUs are consumed of a device with 8"),
        (cpus("socket0", 9), "9 CPUs are consumed of a device with 8"),
        (cpus("socket0", -1), "-1 CPUs are consumed"),
        (result("cpu", "socket0"), "0 CPUs are consumed of a device with 8"),
        (cpus("cpu3", 2), "2 CPUs are consumed of a device with 1"),
        (result("hugepages", "numa0-2mi"), "0 bytes are consumed, expected a positive multiple of 2097152"),
        (result("hugepages", "numa0-2mi", size=3 * MIB), "3145728 bytes are consumed, expected a positive multiple"),
        (result("hugepages", "numa0-2mi-block0", size=4 * MIB), "4194304 bytes are consumed of a device that is had"),
        (result("memory", "numa0", size=1), "1 bytes are consumed, expected a positive multiple of 4096"),
        (result("char", "dev-c", shares=4), "4 shares are consumed of a device with 3"),
        (result("char", "dev-c", shares=0), "0 shares are consumed"),
        (result("nic", "nobody"), "pool node-a/nic has no device 'nobody' (or no longer has it)"),
        (result("gpu", "x"), "there is no pool 'node-a/gpu' on this node (there are: node-a/cpu, node-a/hugepages"),
        (replace(result("nic", "a"), pool="node-b/nic"), "there is no pool 'node-b/nic' on this node"),
        (replace(result("nic", "a"), pool="nic"), "there is no pool 'nic' on this node"),
        (replace(result("nic", "a"), driver="gpu.example"), f"no device of driver {DRIVER}, only of gpu.example"),
        (pages(0, 5), "5 hugepages of 2097152 bytes on NUMA node 0: 4 can be granted"),
        (result("memory", "numa0", size=2 * GIB), f"{2 * GIB} bytes of memory on NUMA node 0: {GIB} can be granted"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused_with_its_place_and_value(one: Result, why: str) -> None:
    """And nothing is granted of the whole claim."""
    assert why in why_not(claim("c", result("nic", "b"), one) if one.driver == DRIVER else claim("c", one))


def test_a_claim_that_is_not_allocated_or_is_configured_wrongly_is_refused() -> None:
    """Before anything is decided."""
    assert "it is not allocated" in why_not(replace(claim("c", result("nic", "a")), allocated=False))
    assert "no driver" in why_not(claim("c"))
    assert "CpuConfig" in why_not(claim("c", cpus("socket0", 1), config={"kind": "CpuConfig", "colour": "red"}))


@pytest.mark.parametrize(
    ("resource", "ids", "one", "why"),
    [
        (NICS, ["a"], result("nic", "a"), "cannot grant a: held by"),
        (NICS, ["vf0"], result("nic", "b"), "cannot grant b: vf0 is of the same device and held by"),
        (NICS, ["b"], result("nic", "vf1"), "cannot grant vf1: b is of the same device and held by"),
        (CHARS, ["/dev/c::0", "/dev/c::2"], result("char", "dev-c", shares=2), "cannot grant 2 of 3 shares of /dev/c"),
        (CPU_PLUGIN, ["cpu3"], cpus("cpu3", 1), "cannot grant CPUs 3: 3 held by"),
        (CPU_PLUGIN, ["cpu3"], cpus("socket0", 8), "cannot place 8 CPUs: 7 of 16 are free (1 held); held there by"),
        (PAGE_PLUGIN, ["node0-2Mi-0"], pages(0, 4), "cannot grant 4 hugepages of 2097152 bytes on NUMA node 0: 3 can"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("listed", [False, True])
def test_what_a_container_holds_is_refused_by_its_name(
    resource: ResourceKind, ids: list[str], one: Result, why: str, listed: bool
) -> None:
    """Kubelet was faster. Which request and device it is about is said too; once the container is gone it is free."""
    ledger = by_plugin(resource, *ids)
    (held,) = ledger.grants.values()
    if listed:
        named = replace(held, holder=replace(held.holder, namespace="ns", pod="p", container="web"))
        ledger = grant(release(ledger, [held.id]), named)
    said = why_not(claim("c", one), ledger)
    assert f"request {one.request}, device {one.pool}/{one.device}: {why}" in said
    assert f" {'ns/p/web' if listed else f'a container not yet listed ({resource.name})'}" in said
    assert not ask(claim("c", one), ledger=release(ledger, [held.id])).errors


def test_a_refusal_names_the_first_holders_and_how_many_more_there_are() -> None:
    """5 claims hold CPUs of the socket."""
    ledger = ask(*(claim(f"c{n}", cpus("socket0", 1, share=f"s{n}")) for n in range(5))).ledger
    assert "held there by claim ns/c0, claim ns/c1, claim ns/c2 and 2 more" in why_not(
        claim("d", cpus("socket0", 4)), ledger
    )


def test_what_a_claim_holds_a_container_is_refused_by_the_claims_name() -> None:
    """The scheduler was faster; shares are counted over both."""
    ledger = ask(claim("c", result("nic", "a"), result("char", "dev-c", shares=2), cpus("cpu3", 1))).ledger
    for resource, ids in ((NICS, ["a"]), (CHARS, ["/dev/c::0", "/dev/c::1"]), (CPU_PLUGIN, ["cpu3"])):
        with pytest.raises(Refused, match="claim ns/c"):
            allocate(machine(), ledger, resource, [ids], stamp())
    assert allocate(machine(), ledger, CHARS, [["/dev/c::2"]], stamp()).grants


# Whatever comes in whatever order


class OneLedger(RuleBasedStateMachine):
    """The scheduler, kubelet and this program over random claims and containers. The scheduler knows what is published
    and what claims consume; nothing else. What it can allocate so is never refused, unless a container was faster."""

    def __init__(self) -> None:
        super().__init__()
        self.inventory = machine()
        self.ledger = Ledger(reserved=CpuSet([0]))
        self.claims: dict[str, Claim] = {}
        self.containers: list[str] = []
        self.catalog = catalog()
        self.features = Features()
        self.count = 0

    @precondition(lambda self: not self.claims)
    @rule(
        group=st.sampled_from([NUMA_NODE, SOCKET, L3, INDIVIDUAL]), whole=st.booleans(), features=st.sampled_from(FORMS)
    )
    def configure(self, group: str, whole: bool, features: Features) -> None:
        """Another form of the same pools; claims of the old one are gone."""
        options = frozenset({"full-pcpus-only"}) if whole else frozenset()
        self.catalog, self.features = catalog(CpuPool(group=group, options=options)), features

    @rule(
        data=st.data(),
        wants=st.lists(st.sampled_from(["cpu", "hugepages", "memory", "nic", "char"]), min_size=1, max_size=3),
    )
    def allocate_claim(self, data: st.DataObject, wants: list[str]) -> None:
        """As the scheduler does it: by what is published and by what other claims have."""
        results: list[Result] = []
        for kind in wants:
            choices = self._choices(kind, results)
            if not choices:
                return
            one, most = data.draw(st.sampled_from(choices))
            amount = {}
            for name, capacity in one.capacity.items() if one.shared else ():
                steps = data.draw(st.integers(0, min(3, (most - capacity.least) // capacity.step)))
                amount = {name: capacity.least + steps * capacity.step}
            share = f"s{self.count}-{len(results)}" if one.shared else ""
            results.append(result(kind, one.name, share=share, **amount))
        self.count += 1
        self.claims[f"uid-{self.count}"] = claim(f"{self.count}", *results)

    def _choices(self, kind: str, also: list[Result]) -> list[tuple[PoolDevice, int]]:
        """Devices that can be allocated, and how much of each."""
        pool = pool_of(self.catalog.kinds[kind], self.inventory, self.ledger, features=self.features)
        taken = [one for each in self.claims.values() for one in each.results] + also
        used: Counter[str] = Counter()
        for has in taken:
            used[has.device] += (sum(has.consumed.values()) or 1) if has.pool == f"{NODE}/{kind}" else 0
        counters = {one.name: dict(one.counters) for one in pool.counters}
        for one in pool.devices:
            for name, them in one.consumes.items() if used[one.name] else ():
                counters[name] = {it: counters[name][it] - them[it] for it in them}
        return [(one, most) for one in pool.devices if (most := self._room(one, used[one.name], counters)) > 0]

    def _room(self, one: PoolDevice, used: int, counters: Mapping[str, Mapping[str, int]]) -> int:
        if one.taints or any(counters[name][it] < n for name, them in one.consumes.items() for it, n in them.items()):
            return 0
        if not one.shared:
            return int(not used)
        ((_, capacity),) = one.capacity.items()
        return capacity.value - used if capacity.value - used >= capacity.least else 0

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def prepare_claims(self, data: st.DataObject) -> None:
        """Some, in any order, also again. What has been allocated is still there: no container came in between."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.claims)), min_size=1, max_size=4))
        self._prepare([self.claims[name] for name in names])

    def _prepare(self, some: list[Claim]) -> None:
        before = {name: grants_of(self.ledger, name) for name in self.claims}
        batch = prepare(self.inventory, self.ledger, self.catalog, some, stamp(self.count * 100.0))
        assert not batch.errors
        self.ledger = batch.ledger
        for one in some:
            got = batch.grants[one.ref.uid]
            assert got == grants_of(self.ledger, one.ref.uid)
            assert not before[one.ref.uid] or got == before[one.ref.uid]
            for each, asked in zip(got, one.results, strict=True):
                self._is_what_was_asked(each.cpus, asked)

    def _is_what_was_asked(self, got: CpuSet, asked: Result) -> None:
        kind = asked.pool.rpartition("/")[2]
        part = self.catalog.kinds[kind].part(self.inventory, asked.device) or DevicePart()
        assert set(got) <= set(part.cpus)
        assert len(got) == (asked.consumed.get(CPUS, 1) if kind == "cpu" else 0)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def unprepare_claim(self, data: st.DataObject) -> None:
        """And it is no more."""
        name = data.draw(st.sampled_from(sorted(self.claims)))
        self.ledger = unprepare(self.ledger, [name], "done").ledger
        del self.claims[name]
        assert not grants_of(self.ledger, name)

    @rule(
        data=st.data(),
        resource=st.sampled_from([CPU_PLUGIN, PAGE_PLUGIN, NICS, CHARS]),
        late=st.booleans(),
    )
    def start_container(self, data: st.DataObject, resource: ResourceKind, late: bool) -> None:
        """Kubelet gives what is shown healthy and what it knows to be free. What claims have been allocated by then is
        prepared before, for this is not about who is faster."""
        self._prepare(list(self.claims.values()))
        ours = {one for (name, one) in self.ledger.by_id if name == resource.name}
        listed = resource.advertised(self.inventory, self.ledger, {})
        free = [one.id for one in listed if one.healthy and one.id not in ours]
        if not free:
            return
        ids = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=1 if resource is NICS else 3, unique=True))
        made = allocate(self.inventory, self.ledger, resource, [ids], stamp(self.count * 100.0 + 50))
        self.count += 1
        self.ledger = release(made.ledger, [made.grants[0].id])
        named = replace(made.grants[0], id=f"dp{self.count}", confirmed=True)
        self.ledger = grant(self.ledger, named)
        self.containers.append(named.id)

    @precondition(lambda self: self.containers)
    @rule(data=st.data())
    def stop_container(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.containers))
        self.containers.remove(name)
        self.ledger = release(self.ledger, [name])

    @invariant()
    def nothing_is_held_twice(self) -> None:
        grants = list(self.ledger.grants.values())
        cpus = Counter(cpu for one in grants for cpu in one.cpus)
        assert not cpus or (max(cpus.values()) == 1 and 0 not in cpus)
        whole = [it for one in grants for it in one.devices]
        for i, one in enumerate(whole):
            assert excluded_with(self.inventory, Ledger(), [one]).isdisjoint({*whole[:i], *whole[i + 1 :]})
        shared = sum(shares_of(one, it) for one in grants for it in one.shares)
        assert shared <= CHARS.replicas
        assert not {*whole} & {it for one in grants for it in one.shares}
        for node in self.inventory.numa_nodes:
            (pool,) = node.hugepages
            assert self.ledger.pages_held.get((node.id, 2 * MIB), 0) <= pool.total_pages
            assert self.ledger.memory_held.get(node.id, 0) <= GIB

    @invariant()
    def claims_change_no_pool(self) -> None:
        """Each pool is what it would be without any claim; blocks and shares had whole may change places."""
        if not self.features.consumable:
            return
        alone = release(self.ledger, [one.id for one in self.ledger.grants.values() if one.holder.api == CLAIM])
        for kind in self.catalog.kinds.values():
            with_claims, without = (
                pool_of(kind, self.inventory, it, features=self.features) for it in (self.ledger, alone)
            )
            assert with_claims == without

    @invariant()
    def nothing_is_lost(self) -> None:
        """Without its grants the ledger is what it was at first."""
        empty = release(self.ledger, list(self.ledger.grants))
        assert (empty.cpus_held, empty.devices_held, empty.by_id) == (CpuSet(), frozenset(), {})
        free = {pool.node: grantable(pool, empty) for node in self.inventory.numa_nodes for pool in node.hugepages}
        assert set(free.values()) == {4}
        assert {one.holder.uid for one in self.ledger.grants.values() if one.holder.api == CLAIM} <= self.claims.keys()


TestOneLedger = OneLedger.TestCase
TestOneLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
