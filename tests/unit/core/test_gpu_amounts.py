"""Shares of a GPU with memory and cores: over both APIs the sums never exceed the device, and what fits is granted."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import allocate
from nodeagent.core.deviceplugin.devices import SHARES, DeviceResource
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.pool import Capacity, Features
from nodeagent.core.dra.prepare import Catalog, prepare, unprepare
from nodeagent.core.ledger.ledger import Ledger, release
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.sharing.amounts import CORES, MEMORY, MIB, per_share, totals
from nodeagent.core.sharing.mps import limits_of, mps_sets
from nodeagent.errors import Refused, StateError
from nodeagent.state import grant_json
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pools import DRIVER, NOBODY, NODE, claim, device, pool_of, result, shown, stamp, wrong_with

GIB = 1 << 30
WHOLE = 10 * GIB + 5
"""Some bytes more than whole MiB, which no share can have."""
REPLICAS = 3
RESOURCE = DeviceResource(name="r/gpu", kind="gpu", replicas=REPLICAS)
POOL = DevicePool(kind="gpu", resources=(RESOURCE,))
CATALOG = Catalog(driver=DRIVER, node_name=NODE, kinds={"gpu": POOL})
EACH = {MEMORY: 10 * GIB // MIB // 3 * MIB, CORES: 33}


def machine(memory: object = WHOLE) -> Inventory:
    attributes = {"uuid": "GPU-a"} if memory is None else {"uuid": "GPU-a", "memory_bytes": memory}
    gpu = device("a", "gpu", vendor="10de", paths=("/dev/nvidia0",), attributes=attributes)
    return inventory_of(even_rows(1, 1, 1, 2, 1), devices=(gpu,))


def ids(*numbers: int) -> list[str]:
    return [f"a::{number}" for number in numbers]


def of_claim(ledger: Ledger, name: str, **consumed: int) -> Ledger:
    batch = prepare(machine(), ledger, CATALOG, [claim(name, result("gpu", "a", **consumed))], stamp())
    if batch.errors:
        raise Refused(batch.errors[f"uid-{name}"], want=1, free=0, unit="shares")
    return batch.ledger


# What is published


def test_a_shared_gpu_has_its_memory_and_cores_as_capacity() -> None:
    """A claim that asks for neither consumes as much as an equal share has."""
    (one,) = pool_of(POOL, machine()).devices
    assert one.shared
    assert one.capacity == {
        SHARES: Capacity(value=3),
        MEMORY: Capacity(value=10 * GIB, binary=True, least=MIB, step=MIB, usual=EACH[MEMORY]),
        CORES: Capacity(value=100, usual=33),
    }
    assert one.attributes["memoryBytes"] == WHOLE
    assert wrong_with(POOL, machine()) == []


@pytest.mark.parametrize(("replicas", "memory"), [(1, WHOLE), (101, WHOLE), (3, None), (3, 2 * MIB)])
def test_devices_that_cannot_be_divided_have_no_amounts(replicas: int, memory: object) -> None:
    """One that is had whole; more shares than percents; no memory known, or less than a MiB for each."""
    (gpu,) = machine(memory).devices
    assert totals(gpu, replicas) == per_share(gpu, replicas) == {}
    pool = DevicePool(kind="gpu", resources=(replace(RESOURCE, replicas=replicas),))
    (one,) = pool_of(pool, machine(memory)).devices
    assert CORES not in one.capacity
    assert wrong_with(pool, machine(memory)) == []


def test_what_containers_have_is_taken_from_the_capacity_of_claims() -> None:
    ledger = allocate(machine(), NOBODY, RESOURCE, [ids(0), ids(1)], stamp()).ledger
    (one,) = pool_of(POOL, machine(), ledger).devices
    left = {name: size.value for name, size in one.capacity.items()}
    assert left == {SHARES: 1, MEMORY: 10 * GIB - 2 * EACH[MEMORY], CORES: 34}
    assert wrong_with(POOL, machine(), ledger) == []


def test_a_claim_with_more_than_a_share_leaves_fewer_shares_to_containers() -> None:
    ledger = of_claim(NOBODY, "big", memory=8 * GIB, cores=10)
    healthy = [one.id for one in RESOURCE.advertised(machine(), ledger, {}) if one.healthy]
    assert healthy == []
    ledger = of_claim(NOBODY, "quick", memory=MIB, cores=60)
    assert [one.healthy for one in RESOURCE.advertised(machine(), ledger, {})] == [True, False, False]


def test_servers_without_consumable_capacity_have_equal_shares() -> None:
    forms = shown(pool_of(POOL, machine(), features=Features(consumable=False)))
    assert [*forms] == ["a-share0", "a-share1", "a-share2"]
    batch = prepare(machine(), NOBODY, CATALOG, [claim("c", result("gpu", "a-share1"))], stamp())
    (grant,) = batch.ledger.grants.values()
    assert grant.amounts == (("a", CORES, 33), ("a", MEMORY, EACH[MEMORY]))


# What is granted


def test_a_claim_is_granted_what_it_consumes_and_its_programs_are_limited_to_that() -> None:
    config = {"kind": "GpuConfig", "mps": {}}
    wanted = claim("c", result("gpu", "a", memory=4 * GIB, cores=30), config=config)
    ledger = prepare(machine(), NOBODY, CATALOG, [wanted], stamp()).ledger
    (grant,) = ledger.grants.values()
    assert grant.amounts == (("a", CORES, 30), ("a", MEMORY, 4 * GIB))
    assert (limits_of(grant).threads_percent, limits_of(grant).memory_mib) == (30, 4096)
    (one,) = mps_sets(machine(), ledger).values()
    assert (one.threads_percent, dict(one.memory_mib)) == (30, {0: 4096})


@pytest.mark.parametrize(
    ("mps", "percent", "mib"),
    [
        ({"activeThreadPercentage": 20, "pinnedDeviceMemoryLimit": "1Gi"}, 20, 1024),
        ({"activeThreadPercentage": 90, "pinnedDeviceMemoryLimit": "9Gi"}, 30, 4096),
    ],
)
def test_settings_can_only_lower_the_limits_of_a_share(mps: dict[str, object], percent: int, mib: int) -> None:
    wanted = claim("c", result("gpu", "a", memory=4 * GIB, cores=30), config={"kind": "GpuConfig", "mps": mps})
    (grant,) = prepare(machine(), NOBODY, CATALOG, [wanted], stamp()).ledger.grants.values()
    assert (limits_of(grant).threads_percent, limits_of(grant).memory_mib) == (percent, mib)


def test_a_refusal_names_what_is_left_and_who_has_the_rest() -> None:
    ledger = of_claim(NOBODY, "one", memory=8 * GIB, cores=10)
    with pytest.raises(
        Refused, match="cannot grant 3221225472 bytes of the memory of a: 2147483648 are left, the rest is"
    ):
        of_claim(ledger, "two", memory=3 * GIB, cores=10)
    with pytest.raises(Refused, match=r"cannot grant 91 percent of the cores of a: 90 are left, .* claim ns/one"):
        of_claim(ledger, "two", memory=GIB, cores=91)
    with pytest.raises(Refused, match="of the memory of a: 2147483648 are left"):
        allocate(machine(), ledger, RESOURCE, [ids(0)], stamp())
    with pytest.raises(Refused, match="0 of cores is consumed, expected at least 1"):
        of_claim(NOBODY, "none", cores=0)


def test_a_container_that_loses_some_of_its_ids_loses_what_they_have() -> None:
    ledger = allocate(machine(), NOBODY, RESOURCE, [ids(0, 1)], stamp()).ledger
    listed = {id: replace(one, confirmed=True) for id, one in ledger.grants.items()}
    ledger = allocate(machine(), replace(ledger, grants=MappingProxyType(listed)), RESOURCE, [ids(1)], stamp(2)).ledger
    assert (
        sorted(one.amounts for one in ledger.grants.values()) == [(("a", CORES, 33), ("a", MEMORY, EACH[MEMORY]))] * 2
    )


# What is stored


def test_grants_of_builds_that_recorded_no_amounts_count_with_their_shares() -> None:
    """The stored form has one more key, which an older build ignores, and may lack it."""
    ledger = of_claim(NOBODY, "old", shares=2, memory=9 * GIB, cores=90)
    (grant,) = ledger.grants.values()
    assert grant_json.read(grant_json.write(grant), "x") == grant
    body = grant_json.document(grant)
    assert body.pop("amounts") == [("a", CORES, 90), ("a", MEMORY, 9 * GIB)]
    old = grant_json.from_document(body, "x")
    assert old == replace(grant, amounts=())
    again = replace(ledger, grants=MappingProxyType({old.id: old}))
    assert of_claim(again, "new", memory=EACH[MEMORY], cores=34)
    with pytest.raises(Refused):
        of_claim(again, "new", memory=EACH[MEMORY], cores=35)
    with pytest.raises(StateError):
        grant_json.from_document({**body, "amounts": [["a", "memory", "much"]]}, "x")


# Whatever comes in whatever order


@dataclass
class Plain:
    """What each holder has: (shares, bytes, percent)."""

    has: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def fits(self, *wanted: int) -> bool:
        sums = [sum(one[i] for one in self.has.values()) for i in range(3)]
        return all(a + b <= most for a, b, most in zip(sums, wanted, (REPLICAS, 10 * GIB, 100), strict=True))


class BothApis(RuleBasedStateMachine):
    """Claims with amounts and containers with ids, against sums that anybody can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = NOBODY
        self.plain = Plain()
        self.number = 0

    @rule(
        shares=st.integers(1, REPLICAS),
        memory=st.none() | st.integers(1, 11 * 1024).map(lambda mib: mib * MIB),
        cores=st.none() | st.integers(1, 110),
    )
    def claims(self, shares: int, memory: int | None, cores: int | None) -> None:
        self.number += 1
        consumed = {"shares": shares, "memory": memory, "cores": cores}
        wanted = shares, memory or shares * EACH[MEMORY], cores or shares * EACH[CORES]
        try:
            self.ledger = of_claim(self.ledger, f"c{self.number}", **{k: v for k, v in consumed.items() if v})
        except Refused:
            assert not self.plain.fits(*wanted)
        else:
            assert self.plain.fits(*wanted)
            self.plain.has[f"uid-c{self.number}-0"] = wanted

    @rule(data=st.data())
    def containers(self, data: st.DataObject) -> None:
        taken = {one for grant in self.ledger.grants.values() if grant.holder.api != CLAIM for one in grant.ids}
        free = [one for one in ids(*range(REPLICAS)) if one not in taken]
        if not free:
            return
        asked = data.draw(st.lists(st.sampled_from(free), min_size=1, unique=True))
        wanted = len(asked), len(asked) * EACH[MEMORY], len(asked) * EACH[CORES]
        self.number += 1
        try:
            decision = allocate(machine(), self.ledger, RESOURCE, [asked], stamp(self.number))
        except Refused:
            assert not self.plain.fits(*wanted)
        else:
            assert self.plain.fits(*wanted)
            self.ledger = decision.ledger
            self.plain.has[decision.grants[0].id] = wanted

    @precondition(lambda self: self.plain.has)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        gone: Grant = self.ledger.grants[data.draw(st.sampled_from(sorted(self.plain.has)))]
        del self.plain.has[gone.id]
        if gone.holder.api == CLAIM:
            self.ledger = unprepare(self.ledger, [gone.holder.uid], "over").ledger
        else:
            self.ledger = release(self.ledger, [gone.id])

    @invariant()
    def sums_stay_within_the_device(self) -> None:
        amounts = [one for grant in self.ledger.grants.values() for one in grant.amounts]
        assert sum(size for _, name, size in amounts if name == MEMORY) <= 10 * GIB
        assert sum(size for _, name, size in amounts if name == CORES) <= 100
        assert self.ledger.grants.keys() == self.plain.has.keys()

    @invariant()
    def as_many_ids_are_healthy_as_would_be_granted(self) -> None:
        shown = RESOURCE.advertised(machine(), self.ledger, {})
        held = {one for (_, one) in self.ledger.by_id}
        spare = [one.id for one in shown if one.healthy and one.id not in held]
        assert len(spare) == max(
            k
            for k in range(len(shown) + 1)
            if not k
            or (
                k <= len([one for one in shown if one.id not in held])
                and self.plain.fits(k, k * EACH[MEMORY], k * EACH[CORES])
            )
        )


TestBothApis = BothApis.TestCase
