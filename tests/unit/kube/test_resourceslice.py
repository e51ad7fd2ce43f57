"""Pools as ResourceSlices: how they are written, what rules they keep, the smallest difference to what is stored."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.dra.pool import (
    ALL_FEATURES,
    NO_FEATURES,
    Capacity,
    CounterSet,
    DevicePart,
    Features,
    NodeCost,
    Pool,
    PoolDevice,
    Taint,
)
from nodeagent.kube.resourceslice import render as slices
from nodeagent.kube.resourceslice.render import (
    Object,
    Owner,
    SlicePlan,
    lost_features,
    plan,
    quantity,
    render,
    seen_features,
    strays,
)
from nodeagent.kube.resourceslice.validate import Broken, check
from tests.oracles import api_rules as server

OWNER = Owner(driver="nodeagent.dev", node_name="node-1", node_uid="f00d")
TAINT = Taint(key="nodeagent.dev/unhealthy", value="hot")


def device(name: str, **parts: Any) -> PoolDevice:
    return PoolDevice(name=name, part=DevicePart(), **parts)


def pool(*devices: PoolDevice, kind: str = "gpu", counters: Sequence[CounterSet] = ()) -> Pool:
    return Pool(kind=kind, devices=devices, counters=tuple(counters))


def virtual_functions(count: int, functions: int = 64) -> Pool:
    """PFs with their VFs: a PF's counter is consumed by it whole, or by its VFs one by one."""
    parents = count // functions
    sets = tuple(CounterSet(name=f"pf-{pf}", counters={"functions": functions}) for pf in range(parents))
    devices = [
        device(f"pf-{pf}-vf-{vf}", consumes={f"pf-{pf}": {"functions": 1}}, attributes={"pf": f"pf-{pf}", "vf": vf})
        for pf in range(parents)
        for vf in range(functions)
    ]
    return pool(*devices, kind="nic", counters=sets)


def spec(one: Object) -> Object:
    return one["spec"]  # type: ignore[no-any-return]


def first(written: Pool) -> Object:
    """The first device as it is written."""
    return spec(render(written, OWNER, 1)[0])["devices"][0]  # type: ignore[no-any-return]


# Writing


def test_a_pool_is_written_whole() -> None:
    """Every part of a pool has its place, and the server's own reading of the object takes it."""
    whole = pool(
        device(
            "gpu-0",
            attributes={"model": "A", "numaNode": 0, "mig": True},
            capacity={"memory": Capacity(value=80 << 30, binary=True)},
            consumes={"card": {"slices": 7}},
            taints=(TAINT,),
        ),
        counters=[CounterSet(name="card", counters={"slices": 7})],
    )
    counters, devices = render(whole, OWNER, 3)
    place = {"name": "node-1/gpu", "generation": 3, "resourceSliceCount": 2}
    node = {"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "f00d", "controller": True}
    assert counters["spec"] == {
        "driver": "nodeagent.dev",
        "nodeName": "node-1",
        "pool": place,
        "sharedCounters": [{"name": "card", "counters": {"slices": {"value": "7"}}}],
    }
    assert devices["spec"]["pool"] == place
    assert devices["spec"]["devices"] == [
        {
            "name": "gpu-0",
            "attributes": {"model": {"string": "A"}, "numaNode": {"int": 0}, "mig": {"bool": True}},
            "capacity": {"memory": {"value": "80Gi"}},
            "consumesCounters": [{"counterSet": "card", "counters": {"slices": {"value": "7"}}}],
            "taints": [{"key": "nodeagent.dev/unhealthy", "value": "hot", "effect": "NoSchedule"}],
        }
    ]
    for one in (counters, devices):
        assert (one["apiVersion"], one["kind"]) == ("resource.k8s.io/v1", "ResourceSlice")
        assert one["metadata"]["ownerReferences"] == [node]
        assert not list(server.wrong_with_slice(server.read_slice(one["spec"]), None))
    assert not check([counters, devices])


def test_without_the_nodes_uid_there_is_no_owner() -> None:
    """An owner without a UID would have the garbage collector delete the slice."""
    (one,) = render(pool(device("a")), replace(OWNER, node_uid=""), 1)
    assert "ownerReferences" not in one["metadata"]


def test_a_pool_without_devices_has_no_slices() -> None:
    """Counters that no device consumes are useless."""
    assert render(pool(counters=[CounterSet(name="card", counters={"a": 1})]), OWNER, 1) == ()


@pytest.mark.parametrize(
    ("value", "binary", "written"),
    [
        (8, False, "8"),
        (0, True, "0"),
        (512 << 20, True, "512Mi"),
        (2048 << 20, True, "2Gi"),
        (1536 << 20, True, "1536Mi"),
        (1000, True, "1000"),
        (1025 << 10, True, "1025Ki"),
        (1 << 62, True, "4Ei"),
        (1024, False, "1024"),
    ],
)
def test_a_quantity_is_written_exactly(value: int, binary: bool, written: str) -> None:
    """Bytes with the largest suffix that divides them, everything else in digits; both read back as they were."""
    one = first(pool(device("a", capacity={"amount": Capacity(value=value, binary=binary)})))
    assert one["capacity"]["amount"]["value"] == written
    assert quantity(written) == value


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_every_number_of_bytes_reads_back(value: int) -> None:
    """No rounding, whatever the number."""
    one = first(pool(device("a", capacity={"amount": Capacity(value=value, binary=True)})))
    assert quantity(one["capacity"]["amount"]["value"]) == value


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        (8, {"default": "2", "validRange": {"min": "2", "step": "4"}}),
        (6, {"default": "2", "validRange": {"min": "2", "step": "4"}}),
        (5, {"default": "2", "validValues": ["2"]}),
        (2, {"default": "2", "validValues": ["2"]}),
        (1, None),
        (0, None),
    ],
)
def test_a_shared_capacity_has_a_policy_that_the_server_takes(value: int, policy: Object | None) -> None:
    """A range needs room for one step beyond the least; below that there is one amount, or none."""
    shared = pool(device("a", shared=True, capacity={"cpus": Capacity(value=value, least=2, step=4)}))
    one = first(shared)
    assert one["allowMultipleAllocations"] is True
    assert one["capacity"]["cpus"].get("requestPolicy") == policy
    assert not check(render(shared, OWNER, 1))


def test_bytes_of_a_policy_are_written_as_bytes() -> None:
    """Hugepages: the page size is least and step."""
    pages = Capacity(value=4 << 30, binary=True, least=2 << 20, step=2 << 20)
    one = first(pool(device("a", shared=True, capacity={"size": pages})))
    step = {"default": "2Mi", "validRange": {"min": "2Mi", "step": "2Mi"}}
    assert one["capacity"]["size"] == {"value": "4Gi", "requestPolicy": step}


def test_a_device_that_is_not_shared_has_no_policy() -> None:
    """The server forbids it."""
    assert first(pool(device("a", capacity={"cpus": Capacity(value=8)})))["capacity"] == {"cpus": {"value": "8"}}


# Chunks and names


@pytest.mark.parametrize(("devices", "chunks"), [(1, [1]), (64, [64]), (65, [64, 1]), (1024, [64] * 16)])
def test_devices_are_cut_into_slices_of_64(devices: int, chunks: list[int]) -> None:
    """In their order; 1,024 single CPUs make 16 slices."""
    written = render(pool(*(device(f"cpu-{n}") for n in range(devices))), OWNER, 1)
    assert [len(spec(one)["devices"]) for one in written] == chunks
    assert [it["name"] for one in written for it in spec(one)["devices"]] == [f"cpu-{n}" for n in range(devices)]
    assert {spec(one)["pool"]["resourceSliceCount"] for one in written} == {len(chunks)}


def test_slices_sorted_by_name_are_in_the_pools_order() -> None:
    """The scheduler sorts a pool's slices by name."""
    names = [one["metadata"]["name"] for one in render(pool(*(device(f"d-{n}") for n in range(1000))), OWNER, 1)]
    assert names == sorted(names)


def test_a_taint_changes_one_slice_and_no_generation() -> None:
    """So a device's health costs one write, however large the pool is."""
    devices = [device(f"cpu-{n}") for n in range(1024)]
    stored = render(pool(*devices), OWNER, 5)
    devices[500] = replace(devices[500], taints=(TAINT,))
    todo = plan(stored, pool(*devices), OWNER)
    assert (len(todo.create), len(todo.replace), len(todo.delete)) == (0, 1, 0)
    assert todo.replace[0]["spec"]["pool"]["generation"] == 5
    assert not check([*stored[:7], todo.replace[0], *stored[8:]])


def test_4096_functions_with_counters_keep_every_rule() -> None:
    """64 counter sets in slices of their own, 8 in each; and all of it is built, checked and compared in short time."""
    began_s = time.monotonic()
    wanted = virtual_functions(4096)
    written = render(wanted, OWNER, 1)
    assert not check(written)
    assert not plan(written, wanted, OWNER)
    assert [len(spec(one)["sharedCounters"]) for one in written[:8]] == [8] * 8
    assert [len(spec(one)["devices"]) for one in written[8:]] == [64] * 64
    assert not [why for one in written for why in server.wrong_with_slice(server.read_slice(one["spec"]), None)]
    assert time.monotonic() - began_s < 10


NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z0-9]{1,20}){0,10}", fullmatch=True)


@given(st.lists(st.tuples(NAMES, NAMES, NAMES), min_size=2, max_size=2, unique=True))
def test_names_are_dns_names_and_never_meet(triples: list[tuple[str, str, str]]) -> None:
    """For any two of node, driver and kind; the same three give the same name again."""
    owners = [(Owner(driver=driver, node_name=node), kind) for node, driver, kind in triples]
    names = [render(pool(device("a"), kind=kind), owner, 1)[0]["metadata"]["name"] for owner, kind in owners]
    again = [render(pool(device("b"), kind=kind), owner, 9)[0]["metadata"]["name"] for owner, kind in owners]
    assert names == again
    assert names[0] != names[1]
    label = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
    assert all(len(name) <= 253 and re.fullmatch(rf"{label}(\.{label})*", name) for name in names)


def test_parts_that_only_meet_in_the_middle_have_different_names() -> None:
    """node a-b of driver c is not node a of driver b-c; nor are two names that are equal where they are cut."""
    long = "n" * 240
    owners = [Owner(driver="c", node_name="a-b"), Owner(driver="b-c", node_name="a")]
    owners += [Owner(driver="c", node_name=f"{long}1"), Owner(driver="c", node_name=f"{long}2")]
    names = {render(pool(device("a")), owner, 1)[0]["metadata"]["name"] for owner in owners}
    assert len(names) == 4
    assert max(map(len, names)) <= 253


# Rules


def edited(change: Callable[[Object], object], base: Pool | None = None) -> list[Broken]:
    """What is said of one slice after a change of its JSON form."""
    (one,) = copy.deepcopy(render(base or pool(device("a"), kind="gpu"), OWNER, 1))
    change(one)
    return check([one])


def of_device(**parts: Any) -> list[Broken]:
    return edited(lambda one: one["spec"]["devices"][0].update(parts))


def policy(value: str, **parts: Any) -> list[Broken]:
    return of_device(allowMultipleAllocations=True, capacity={"c": {"value": value, "requestPolicy": parts}})


def counter_sets(count: int, counters: int = 1, name: str = "set", value: str = "1") -> list[Object]:
    return [
        {"name": f"{name}-{n}", "counters": {f"c-{c}": {"value": value} for c in range(counters)}} for n in range(count)
    ]


def consuming(*consumed: Object) -> list[Broken]:
    counters = {"spec": {**spec(render(pool(device("x")), OWNER, 1)[0]), "sharedCounters": counter_sets(3)}}
    del counters["spec"]["devices"]
    (one,) = copy.deepcopy(render(pool(device("a")), OWNER, 1))
    one["spec"]["devices"][0]["consumesCounters"] = list(consumed)
    both = [{"metadata": {"name": "counters"}, **counters}, one]
    for part in both:
        part["spec"]["pool"] = {**part["spec"]["pool"], "resourceSliceCount": 2}
    return check(both)


def only_counters(sets: list[Object]) -> list[Broken]:
    def change(one: Object) -> None:
        del one["spec"]["devices"]
        one["spec"]["sharedCounters"] = sets

    return edited(change)


def with_devices(count: int, **parts: Any) -> list[Broken]:
    devices = [{"name": f"d-{n}", **(parts if n == 0 else {})} for n in range(count)]
    return edited(lambda one: one["spec"].update(devices=devices))


ONE = {"counterSet": "set-0", "counters": {"c-0": {"value": "1"}}}
TWO, THREE = {**ONE, "counterSet": "set-1"}, {**ONE, "counterSet": "set-2"}
BROKEN: list[tuple[str, Callable[[], list[Broken]], str]] = [
    ("object name", lambda: edited(lambda one: one["metadata"].update(name="Big")), "metadata.name: 'Big'"),
    ("driver case", lambda: edited(lambda one: one["spec"].update(driver="Nodeagent.dev")), "driver: 'Nodeagent.dev'"),
    ("driver length", lambda: edited(lambda one: one["spec"].update(driver="d" * 64)), "at most 63"),
    ("no node", lambda: edited(lambda one: one["spec"].pop("nodeName")), "exactly one of nodeName"),
    ("two scopes", lambda: edited(lambda one: one["spec"].update(allNodes=True)), "nodeName and allNodes: exactly one"),
    ("node name", lambda: edited(lambda one: one["spec"].update(nodeName="a_b")), "nodeName: 'a_b'"),
    ("pool name", lambda: edited(lambda one: one["spec"]["pool"].update(name="a//b")), "pool.name: 'a//b'"),
    ("pool name length", lambda: edited(lambda one: one["spec"]["pool"].update(name="a" * 254)), "253"),
    ("pool of a kind", lambda: check(render(pool(device("a"), kind="my_kind"), OWNER, 1)), "node-1/my_kind"),
    ("count", lambda: edited(lambda one: one["spec"]["pool"].update(resourceSliceCount=0)), "Count: 0: the pool has 1"),
    ("generation", lambda: edited(lambda one: one["spec"]["pool"].update(generation=-1)), "generation: -1"),
    (
        "devices and counters",
        lambda: edited(lambda one: one["spec"].update(sharedCounters=counter_sets(1))),
        "one of them",
    ),
    ("129 devices", lambda: with_devices(129), "devices: 129 entries, the limit is 128"),
    (
        "65 with taints",
        lambda: with_devices(65, taints=[{"key": "a", "effect": "None"}]),
        "65 entries, the limit is 64",
    ),
    ("65 with lists", lambda: with_devices(65, attributes={"a": {"ints": [1]}}), "65 entries, the limit is 64"),
    ("65 with counters", lambda: with_devices(65, consumesCounters=[ONE]), "65 entries, the limit is 64"),
    ("9 counter sets", lambda: only_counters(counter_sets(9)), "sharedCounters: 9 entries, the limit is 8"),
    ("33 counters", lambda: only_counters(counter_sets(1, 33)), "counters: 33 entries, the limit is 32"),
    ("no counters", lambda: only_counters(counter_sets(1, 0)), "there is none"),
    ("set name", lambda: only_counters(counter_sets(1, name="a_b")), "'a_b-0': it must be a DNS label"),
    ("set twice", lambda: only_counters(counter_sets(1) * 2), "'set-0': it stands there 2 times"),
    ("counter value", lambda: only_counters(counter_sets(1, value="x")), "'x': it is no quantity"),
    ("three consumptions", lambda: consuming(ONE, TWO, THREE), "consumesCounters: 3 entries, the limit is 2"),
    ("same set twice", lambda: consuming(ONE, ONE), "'set-0': it stands there 2 times"),
    ("unknown set", lambda: consuming({**ONE, "counterSet": "none"}), "'none': the pool has no such counter set"),
    ("unknown counter", lambda: consuming({**ONE, "counters": {"z": {"value": "1"}}}), "'z': the set has no such"),
    ("consumes nothing", lambda: consuming({**ONE, "counters": {}}), "there is none"),
    ("device name", lambda: of_device(name="a.b"), "name: 'a.b': it must be a DNS label"),
    ("device name length", lambda: of_device(name="a" * 64), "it must be a DNS label"),
    (
        "33 attributes",
        lambda: of_device(attributes={f"a{n}": {"int": n} for n in range(33)}),
        "the limit is 32 together",
    ),
    (
        "32 and a capacity",
        lambda: of_device(attributes={f"a{n}": {"int": n} for n in range(32)}, capacity={"c": {"value": "1"}}),
        "32 attributes and 1 capacities",
    ),
    ("49 values", lambda: of_device(attributes={"a": {"ints": list(range(49))}}), "49 values in all, the limit is 48"),
    ("identifier length", lambda: of_device(attributes={"a" * 33: {"int": 1}}), "at most 32 letters"),
    ("identifier", lambda: of_device(attributes={"a-b": {"int": 1}}), "attributes: 'a-b'"),
    ("domain length", lambda: of_device(attributes={f"{'d' * 64}/a": {"int": 1}}), "attributes: 'ddd"),
    ("no domain", lambda: of_device(attributes={"/a": {"int": 1}}), "attributes: '/a'"),
    ("two slashes", lambda: of_device(attributes={"a/b/c": {"int": 1}}), "attributes: 'a/b/c'"),
    ("capacity name", lambda: of_device(capacity={"1a": {"value": "1"}}), "capacity: '1a'"),
    ("two values", lambda: of_device(attributes={"a": {"int": 1, "bool": True}}), "exactly one value"),
    ("no value", lambda: of_device(attributes={"a": {}}), "exactly one value"),
    ("form", lambda: of_device(attributes={"a": {"float": 1.5}}), "there is no such form"),
    ("empty list", lambda: of_device(attributes={"a": {"strings": []}}), "the list is empty"),
    ("text length", lambda: of_device(attributes={"a": {"string": "ä" * 33}}), "66 bytes, the limit is 64"),
    ("text in a list", lambda: of_device(attributes={"a": {"strings": ["x" * 65]}}), "65 bytes, the limit is 64"),
    ("no text", lambda: of_device(attributes={"a": {"string": "\udcff"}}), "it is not text"),
    ("version", lambda: of_device(attributes={"a": {"version": "1.2"}}), "'1.2': it must be a version"),
    ("version zeros", lambda: of_device(attributes={"a": {"version": "1.02.3"}}), "it must be a version"),
    ("large number", lambda: of_device(attributes={"a": {"int": 2**63}}), "does not fit into 64 bits"),
    ("capacity value", lambda: of_device(capacity={"c": {"value": "1 Gi"}}), "'1 Gi': it is no quantity"),
    ("negative", lambda: of_device(capacity={"c": {"value": "-1"}}), "capacity[c].value: -1"),
    ("beyond 64 bits", lambda: of_device(capacity={"c": {"value": "8Ei"}}), "capacity[c].value: 8Ei"),
    (
        "policy, not shared",
        lambda: of_device(capacity={"c": {"value": "1", "requestPolicy": {"default": "1"}}}),
        "allowMultipleAllocations",
    ),
    (
        "two policies",
        lambda: policy("9", default="1", validValues=["1"], validRange={"min": "1"}),
        "only one may be given",
    ),
    ("no default", lambda: policy("9", validRange={"min": "1"}), "requestPolicy.default: it must be given"),
    ("default outside", lambda: policy("9", default="3", validValues=["1", "2"]), "the default 3 is not among them"),
    ("falling values", lambda: policy("9", default="1", validValues=["2", "1"]), "they must rise"),
    ("equal values", lambda: policy("9", default="1", validValues=["1", "1"]), "they must rise"),
    ("11 values", lambda: policy("99", default="1", validValues=[f"{n}" for n in range(1, 12)]), "the limit is 10"),
    ("value above", lambda: policy("9", default="1", validValues=["1", "10"]), "above the capacity"),
    ("no min", lambda: policy("9", default="1", validRange={"step": "1"}), "min: it must be given"),
    ("min above default", lambda: policy("9", default="1", validRange={"min": "2"}), "must rise"),
    ("max above value", lambda: policy("9", default="1", validRange={"min": "1", "max": "10"}), "must rise"),
    ("default above max", lambda: policy("9", default="5", validRange={"min": "1", "max": "4"}), "must rise"),
    (
        "step zero",
        lambda: policy("9", default="1", validRange={"min": "1", "step": "0"}),
        "step: 0: it must be above 0",
    ),
    ("step too wide", lambda: policy("9", default="2", validRange={"min": "2", "step": "8"}), "beyond the value 9"),
    ("default off step", lambda: policy("9", default="2", validRange={"min": "1", "step": "2"}), "whole steps"),
    ("max off step", lambda: policy("9", default="1", validRange={"min": "1", "step": "3", "max": "6"}), "whole steps"),
    ("policy no quantity", lambda: policy("9", default="x", validRange={"min": "1"}), "'x': it is no quantity"),
    (
        "17 taints",
        lambda: of_device(taints=[{"key": "a", "effect": "None"}] * 17),
        "taints: 17 entries, the limit is 16",
    ),
    ("taint key", lambda: of_device(taints=[{"key": "-a", "effect": "None"}]), "taints.key: '-a'"),
    ("taint key prefix", lambda: of_device(taints=[{"key": "A_/a", "effect": "None"}]), "taints.key: 'A_/a'"),
    ("taint value", lambda: of_device(taints=[{"key": "a", "value": "a b", "effect": "None"}]), "taints.value: 'a b'"),
    ("effect", lambda: of_device(taints=[{"key": "a", "effect": "Never"}]), "effect: 'Never'"),
    ("no effect", lambda: of_device(taints=[{"key": "a"}]), "effect: ''"),
]


@pytest.mark.parametrize(("broken", "said"), [one[1:] for one in BROKEN], ids=[one[0] for one in BROKEN])
def test_a_broken_rule_is_named(broken: Callable[[], list[Broken]], said: str) -> None:
    """One sentence with the pool, the field and the value."""
    sentences = [str(one) for one in broken()]
    assert any(said in one for one in sentences), sentences
    assert all(one.startswith("pool '") for one in sentences)


def test_a_rule_broken_by_a_device_names_the_device() -> None:
    """So that only this one is left out; the others of the pool are not accused."""
    written = render(pool(device("good"), device("bad", attributes={"a": "x" * 65})), OWNER, 1)
    (one,) = check(written)
    assert (one.pool, one.device) == ("node-1/gpu", "bad")
    assert str(one).startswith("pool 'node-1/gpu': device 'bad': attributes[a].string: 'xxx")


def test_a_device_that_stands_twice_is_named_over_slices() -> None:
    """The scheduler calls the whole pool invalid, wherever the two are."""
    written = render(pool(device("twin"), *(device(f"d-{n}") for n in range(70)), device("twin")), OWNER, 1)
    assert [str(one) for one in check(written)] == [
        "pool 'node-1/gpu': device 'twin': name: 'twin': the pool has 2 devices of this name"
    ]


def test_slices_of_two_generations_are_no_pool() -> None:
    """One generation for all."""
    a, b = render(pool(*(device(f"d-{n}") for n in range(65))), OWNER, 1)
    b = {**b, "spec": {**b["spec"], "pool": {**b["spec"]["pool"], "generation": 2}}}
    assert "generation: [1, 2]" in str(check([a, b])[0])


@pytest.mark.parametrize(
    "kept",
    [
        lambda: with_devices(128),
        lambda: with_devices(64, taints=[{"key": "a/b", "value": "c", "effect": "NoExecute"}]),
        lambda: of_device(name="a" * 63),
        lambda: of_device(attributes={f"a{n}": {"int": n} for n in range(32)}),
        lambda: of_device(attributes={"a": {"ints": list(range(48))}}),
        lambda: of_device(attributes={f"{'d' * 63}/{'a' * 32}": {"string": "x" * 64}}),
        lambda: of_device(attributes={"a": {"version": "1.2.3-rc.1+build.5"}, "b": {"int": -(2**63)}}),
        lambda: consuming(ONE, TWO),
        lambda: only_counters(counter_sets(8, 32)),
        lambda: policy("9", default="5", validRange={"min": "1", "step": "2", "max": "9"}),
        lambda: policy("10", default="1", validValues=[f"{n}" for n in range(1, 11)]),
        lambda: policy("10", default="1"),
        lambda: edited(lambda one: one["spec"]["pool"].update(name=f"{'a' * 120}/{'b' * 132}")),
    ],
)
def test_what_lies_at_the_limit_is_kept(kept: Callable[[], list[Broken]]) -> None:
    """Nothing is refused that the server takes."""
    assert kept() == []


GOOD = st.sampled_from([f"{letter}{number}" for letter in "abc" for number in range(4)])
WORDS = st.one_of(*[GOOD] * 30, st.text("aB1-_./ é", max_size=66), st.sampled_from(["a.b/c", "d" * 64, "1.2.3"]))
NUMBERS, EFFECTS = st.integers(0, 12), st.sampled_from(["NoExecute", "NoSchedule", "None"])
CONSUMED = st.dictionaries(st.just("a"), st.dictionaries(WORDS, NUMBERS, max_size=1), max_size=1)
COSTS = st.dictionaries(
    st.sampled_from(["cpu", "memory", "hugepages-2Mi", "ephemeral-storage"]),
    st.builds(NodeCost, capacity=st.just("") | GOOD, amount=NUMBERS, per_pod=st.sampled_from(["", "0", "1Gi", "500m"])),
    max_size=2,
)
ODD_DEVICES = st.builds(
    device,
    WORDS,
    attributes=st.dictionaries(WORDS, WORDS | st.booleans() | st.integers(-(2**63), 2**63), max_size=4),
    capacity=st.dictionaries(
        WORDS, st.builds(Capacity, value=NUMBERS, binary=st.booleans(), least=NUMBERS, step=NUMBERS), max_size=1
    ),
    shared=st.booleans(),
    taints=st.lists(st.builds(Taint, key=WORDS, value=WORDS, effect=EFFECTS), max_size=1),
    consumes=st.one_of(*[st.just({})] * 9, CONSUMED),
    costs=st.one_of(*[st.just({})] * 3, COSTS),
)


@given(st.lists(ODD_DEVICES, min_size=1, max_size=2), WORDS, st.dictionaries(WORDS, NUMBERS, max_size=1))
def test_the_server_refuses_nothing_that_keeps_our_rules(
    devices: list[PoolDevice], kind: str, counters: dict[str, int]
) -> None:
    """Whatever a kind may come up with: what it is is found here, before it is sent."""
    odd = pool(*devices, kind=kind, counters=[CounterSet(name="a", counters=counters)] if counters else [])
    written = render(replace(odd, counted={name for one in devices for name in one.costs}), OWNER, 1)
    refused = [why for one in written for why in server.wrong_with_slice(server.read_slice(one["spec"]), None)]
    assert check(written) or not refused


CPU_KEY = {"capacityKey": "cpus", "capacityMultiplier": "1"}


@pytest.mark.parametrize(
    ("resource", "cost", "good"),
    [
        ("cpu", {"mapping": CPU_KEY}, True),
        ("memory", {"mapping": {"deviceMultiplier": "1Gi"}}, True),
        ("hugepages-1Gi", {"mapping": {"deviceMultiplier": "1"}, "overhead": {"perPod": "0"}}, True),
        ("memory", {"overhead": {"perPod": "1Gi", "perContainer": "1Mi"}}, True),
        ("cpu", {"mapping": {"capacityKey": "cpus"}}, False),
        ("cpu", {"mapping": {"capacityMultiplier": "1"}}, False),
        ("cpu", {"mapping": {**CPU_KEY, "deviceMultiplier": "1"}}, False),
        ("cpu", {"mapping": {}}, False),
        ("cpu", {}, False),
        ("cpu", {"overhead": {}}, False),
        ("cpu", {"mapping": {"deviceMultiplier": "0"}}, False),
        ("cpu", {"mapping": {"capacityKey": "cpus", "capacityMultiplier": "-1"}}, False),
        ("cpu", {"mapping": {**CPU_KEY, "capacityKey": "nodeagent.dev/cpus"}}, False),
        ("memory", {"overhead": {"perPod": "-1"}}, False),
        ("ephemeral-storage", {"mapping": {"deviceMultiplier": "1"}}, False),
        ("nodeagent.dev/cpu", {"mapping": {"deviceMultiplier": "1"}}, False),
    ],
)
def test_what_a_device_takes_of_the_node_is_checked_as_the_server_does(resource: str, cost: Object, good: bool) -> None:
    """The key is spelled as the capacity is, there is one form with its multiplier, and nothing else is counted."""
    (one,) = copy.deepcopy(render(pool(device("a", shared=True)), OWNER, 1))
    one["spec"]["devices"][0] |= {
        "capacity": {"cpus": {"value": "8"}},
        "nodeAllocatableResources": {resource: cost},
    }
    refused = [*server.wrong_with_slice(server.read_slice(spec(one)), None)]
    assert (not check([one]), not refused) == (good, good)


# Comparing


def test_what_the_server_adds_is_no_difference() -> None:
    """Its own metadata, the time of a taint, quantities in another form, a status of none."""
    wanted = pool(
        device(
            "a",
            shared=True,
            taints=(TAINT,),
            capacity={
                "m": Capacity(value=2048 << 20, binary=True, least=1 << 20, step=1 << 20),
                "n": Capacity(value=1000),
            },
        )
    )
    (one,) = copy.deepcopy(render(wanted, OWNER, 4))
    one["metadata"] |= {
        "uid": "u",
        "resourceVersion": "7",
        "generation": 3,
        "creationTimestamp": "t",
        "managedFields": [],
    }
    one["spec"]["devices"][0]["taints"][0]["timeAdded"] = "2026-01-01T00:00:00Z"
    one["spec"]["devices"][0]["capacity"]["m"]["value"] = "2048Mi"
    one["spec"]["devices"][0]["capacity"]["m"]["requestPolicy"]["default"] = "1024Ki"
    one["spec"]["devices"][0]["capacity"]["n"]["value"] = "1k"
    one["spec"]["devices"][0]["attributes"] = {}
    assert not plan([one], wanted, OWNER)


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["devices"][0].update(name="b"),
        lambda one: one["devices"][0]["attributes"]["n"].update(int=2),
        lambda one: one["devices"][0]["attributes"].update(more={"bool": False}),
        lambda one: one["devices"][0]["capacity"]["c"].update(value="2k"),
        lambda one: one["devices"][0].update(allowMultipleAllocations=False),
        lambda one: one["devices"][0]["taints"][0].update(value="1k"),
        lambda one: one["devices"].append({"name": "z"}),
        lambda one: one["pool"].update(resourceSliceCount=2),
        lambda one: one.update(allNodes=True),
    ],
)
def test_whatever_another_client_edits_is_repaired(change: Callable[[Object], object]) -> None:
    """With one replacement that names the version it saw."""
    taint = replace(TAINT, value="1000")
    wanted = pool(device("a", attributes={"n": 1}, capacity={"c": Capacity(value=1000)}, taints=(taint,)))
    (one,) = copy.deepcopy(render(wanted, OWNER, 1))
    one["metadata"] |= {"resourceVersion": "7", "uid": "u", "labels": {"theirs": "1"}, "managedFields": [{}]}
    change(one["spec"])
    todo = plan([one], wanted, OWNER)
    assert (len(todo.create), len(todo.replace), len(todo.delete)) == (0, 1, 0)
    metadata = todo.replace[0]["metadata"]
    assert (metadata["resourceVersion"], metadata["uid"], metadata["labels"]) == ("7", "u", {"theirs": "1"})
    assert "managedFields" not in metadata
    assert todo.replace[0]["spec"] == render(wanted, OWNER, 1)[0]["spec"]


def test_another_node_of_the_same_name_becomes_the_owner() -> None:
    """The garbage collector would delete what the old one owns."""
    wanted = pool(device("a"))
    todo = plan(render(wanted, OWNER, 1), wanted, replace(OWNER, node_uid="new"))
    assert [one["metadata"]["ownerReferences"][0]["uid"] for one in todo.replace] == ["new"]


def test_a_change_over_several_slices_raises_the_generation() -> None:
    """Of every slice; what is too much goes last."""
    before = pool(*(device(f"d-{n}") for n in range(130)))
    after = pool(*(device(f"d-{n}") for n in range(1, 65)))
    todo = plan(render(before, OWNER, 4), after, OWNER)
    assert [spec(one)["pool"]["generation"] for one in todo.replace] == [5]
    assert [one["metadata"]["name"] for one in todo.delete] == [
        one["metadata"]["name"] for one in render(before, OWNER, 4)[1:]
    ]


def test_a_slice_that_somebody_deleted_comes_back_alone() -> None:
    """With the generation of the others, which still stand."""
    wanted = pool(*(device(f"d-{n}") for n in range(130)))
    stored = render(wanted, OWNER, 7)
    todo = plan([stored[0], stored[2]], wanted, OWNER)
    assert todo == SlicePlan(create=(stored[1],))


def test_slices_of_others_are_never_touched() -> None:
    """Another driver's, another node's, another kind's."""
    mine = pool(device("a"))
    others = [
        *render(mine, replace(OWNER, driver="other.dev"), 1),
        *render(mine, replace(OWNER, node_name="node-2"), 1),
        *render(pool(device("a"), kind="nic"), OWNER, 1),
    ]
    assert plan(others, mine, OWNER) == SlicePlan(create=render(mine, OWNER, 1))
    assert strays(others, ["gpu", "nic"], OWNER) == ()


def test_what_is_not_served_any_more_is_a_stray() -> None:
    """A kind that was turned off, and a slice that an older version named in its own way."""
    stored = [*render(pool(device("a")), OWNER, 1), *render(pool(device("a"), kind="nic"), OWNER, 1)]
    assert strays(stored, ["gpu"], OWNER) == (stored[1],)
    old = copy.deepcopy(stored[0])
    old["metadata"]["name"] = "node-1-old-name"
    assert plan([old], pool(device("a")), OWNER).delete == (old,)


def test_a_pool_that_lost_its_last_device_is_deleted() -> None:
    """A slice count of 0 is not allowed."""
    stored = render(pool(device("a")), OWNER, 3)
    assert plan(stored, pool(), OWNER) == SlicePlan(delete=stored)


# What an older server drops


@pytest.mark.parametrize(
    ("sent", "drop", "kept"),
    [
        (pool(device("a", taints=(TAINT,))), lambda one: one["devices"][0].pop("taints"), Features(taints=False)),
        (
            pool(device("a", shared=True)),
            lambda one: one["devices"][0].pop("allowMultipleAllocations"),
            Features(consumable=False),
        ),
        (
            pool(device("a", shared=True, capacity={"c": Capacity(value=8)})),
            lambda one: one["devices"][0]["capacity"]["c"].pop("requestPolicy"),
            Features(consumable=False),
        ),
        (
            pool(device("a", consumes={"s": {"c": 1}})),
            lambda one: one["devices"][0].pop("consumesCounters"),
            Features(counters=False),
        ),
        (
            pool(device("a"), counters=[CounterSet(name="s", counters={"c": 1})]),
            lambda one: one.pop("sharedCounters"),
            Features(counters=False),
        ),
        (
            replace(pool(device("a", costs={"cpu": NodeCost(amount=1)})), counted=frozenset({"cpu"})),
            lambda one: one["devices"][0].pop("nodeAllocatableResources"),
            Features(allocatable=False),
        ),
        (
            replace(pool(device("a")), conditional=True),
            lambda one: one["devices"][0].pop("bindingConditions"),
            Features(conditions=False),
        ),
        (
            pool(device("a", attributes={"n": (0, 1)})),
            lambda one: one["devices"][0]["attributes"]["n"].pop("ints"),
            Features(lists=False),
        ),
        (pool(device("a", attributes={"n": 1})), lambda one: one["devices"][0].pop("attributes"), ALL_FEATURES),
        (pool(device("a")), lambda one: one.update(devices=[]), ALL_FEATURES),
    ],
)
def test_a_dropped_field_tells_which_feature_is_missing(
    sent: Pool, drop: Callable[[Object], object], kept: Features
) -> None:
    """And only that; what was edited otherwise tells nothing."""
    one = render(sent, OWNER, 1)[0]
    answer = copy.deepcopy(one)
    assert lost_features(one, answer) == ALL_FEATURES
    drop(answer["spec"])
    assert lost_features(one, answer) == kept


def test_a_stored_field_shows_that_its_feature_is_kept() -> None:
    """Either of the fields of a feature does."""
    assert seen_features(render(pool(device("a", attributes={"n": 1})), OWNER, 1)) == NO_FEATURES
    counted = pool(device("a", consumes={"s": {"c": 1}}), counters=[CounterSet(name="s", counters={"c": 1})])
    for sent, name in (
        (pool(device("a", taints=(TAINT,))), "taints"),
        (pool(device("a", shared=True)), "consumable"),
        (counted, "counters"),
        (replace(pool(device("a")), conditional=True), "conditions"),
        (pool(device("a", attributes={"n": ("x", "y")})), "lists"),
    ):
        slices = copy.deepcopy(render(sent, OWNER, 1))
        assert seen_features(slices).names() == (name,)
        assert all(seen_features([one]).names() == (name,) for one in slices)


# Any sequence of pools, writes cut off anywhere, slices deleted in between


def states(stored: Iterable[Object]) -> list[Object] | None:
    """What the scheduler takes for the pool: the slices of the newest generation where they are all there."""
    found = [spec(one) for one in stored]
    newest = max((one["pool"]["generation"] for one in found), default=0)
    live = [one for one in found if one["pool"]["generation"] == newest]
    return live if live and len(live) == live[0]["pool"]["resourceSliceCount"] else None


def names(live: Sequence[Object]) -> list[tuple[str, str]]:
    found = [(one["name"], json.dumps(one, sort_keys=True)) for part in live for one in part.get("devices", ())]
    return sorted(found)


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """Up to three slices of devices, in any order, with two kinds of change; up to two slices of counters."""
    start, size = draw(st.integers(0, 70)), draw(st.sampled_from([0, 1, 2, 63, 64, 65, 130]))
    changed = draw(st.frozensets(st.integers(0, 200), max_size=3))
    sets = draw(st.sampled_from([0, 0, 1, 9]))
    devices = [
        device(f"d-{n}", taints=(TAINT,) if n in changed else (), attributes={"n": n})
        for n in range(start, start + size)
    ]
    return pool(*devices, counters=[CounterSet(name=f"s-{n}", counters={"c": n}) for n in range(sets)])


Step = tuple[Pool, int | None, list[int]]


@given(st.lists(st.tuples(pools(), st.none() | st.integers(0, 4), st.lists(st.integers(0, 5), max_size=2)), max_size=5))
def test_no_moment_shows_a_pool_that_is_neither_the_old_nor_the_new(steps: list[Step]) -> None:
    """Write by write, also where writes are cut off and others delete slices: a complete pool is one that was wanted,
    whole; in the end it is the newest, and then there is nothing left to write."""
    stored: dict[str, Object] = {}
    wanted: list[list[tuple[str, str]]] = []

    def holds() -> None:
        live = states(stored.values())
        assert live is None or names(live) in wanted

    def do(todo: SlicePlan, most: int | None) -> None:
        writes = [*((one, True) for one in (*todo.replace, *todo.create)), *((one, False) for one in todo.delete)]
        for one, keep in writes[:most]:
            name = one["metadata"]["name"]
            stored.pop(name, None)
            if keep:
                stored[name] = one
            holds()

    for want, most, deleted in steps:
        wanted.append(names([spec(one) for one in render(want, OWNER, 1)]))
        do(plan(stored.values(), want, OWNER), most)
        for index in deleted:
            for name in sorted(stored)[index : index + 1]:
                del stored[name]
    for want, _, _ in steps[-1:]:
        do(plan(stored.values(), want, OWNER), None)
        newest = max((spec(one)["pool"]["generation"] for one in stored.values()), default=1)
        assert sorted(stored.values(), key=str) == sorted(render(want, OWNER, newest), key=str)
        assert not plan(stored.values(), want, OWNER)


def test_the_longest_name_leaves_room_for_its_end() -> None:
    """The counters' slices have the longest ends."""
    owner = Owner(driver="d" * 63, node_name="n" * 253)
    written = render(virtual_functions(64), owner, 1)
    assert max(len(one["metadata"]["name"]) for one in written) <= slices.LONGEST_NAME
