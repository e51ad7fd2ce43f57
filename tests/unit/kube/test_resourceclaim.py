"""ResourceClaims as the API server sends them: a field that is missing or of a wrong type is named by an InputError."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.model.claim import FROM_CLASS, ClaimRef, Opaque, Result
from nodeagent.errors import InputError
from nodeagent.kube.resourceclaim import POD_CLAIM_NAME, device_status, one_status, read

DRIVER = "nodeagent.dev"
DOCUMENT: dict[str, Any] = {
    "apiVersion": "resource.k8s.io/v1",
    "kind": "ResourceClaim",
    "metadata": {"name": "c", "namespace": "ns", "uid": "u-1", "managedFields": [{"manager": "x"}]},
    "spec": {"devices": {"requests": [{"name": "cpus", "exactly": {"deviceClassName": "cpu"}}]}},
    "status": {
        "allocation": {
            "allocationTimestamp": "2026-11-21T00:00:00Z",
            "nodeSelector": {"nodeSelectorTerms": []},
            "devices": {
                "results": [
                    {
                        "request": "cpus/large",
                        "driver": DRIVER,
                        "pool": "node-a/cpu",
                        "device": "numa0",
                        "adminAccess": False,
                        "shareID": "s-1",
                        "consumedCapacity": {f"{DRIVER}/cpus": "2", "memory.example.com/size": "4Mi"},
                        "tolerations": [{"operator": "Exists"}],
                        "bindingConditions": [],
                    },
                    {"request": "gpu", "driver": "gpu.example.com", "pool": "p", "device": "d", "adminAccess": True},
                ],
                "config": [
                    {
                        "source": FROM_CLASS,
                        "requests": ["cpus"],
                        "opaque": {"driver": DRIVER, "parameters": {"kind": "CpuConfig", "deep": {"x": [1, None]}}},
                    },
                    {"source": "FromClaim"},
                ],
            },
        },
        "reservedFor": [
            {"resource": "pods", "name": "p", "uid": "pod-1"},
            {"apiGroup": "example.com", "resource": "things", "name": "t", "uid": "thing-1"},
        ],
    },
}
RESULT = "$.status.allocation.devices.results[0]"


def changed(path: str, value: Any = None, *, drop: bool = False) -> dict[str, Any]:
    """The document with another value at a path of keys and indices, or without it."""
    found = copy.deepcopy(DOCUMENT)
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place: Any = found
    for part in way:
        place = place[part]
    if drop:
        del place[last]
    else:
        place[last] = value
    return found


def test_a_claim_comes_with_all_that_is_needed_and_what_is_new_is_passed_over() -> None:
    """A newer server has more fields. Capacities lose the driver's own domain alone."""
    claim = read(DOCUMENT, DRIVER)
    assert claim.ref == ClaimRef(namespace="ns", name="c", uid="u-1")
    assert claim.allocated
    consumed = {"cpus": 2, "memory.example.com/size": 4 << 20}
    assert claim.results == (
        Result(
            request="cpus/large", driver=DRIVER, pool="node-a/cpu", device="numa0", share_id="s-1", consumed=consumed
        ),
        Result(request="gpu", driver="gpu.example.com", pool="p", device="d", admin=True),
    )
    parameters = {"kind": "CpuConfig", "deep": {"x": [1, None]}}
    assert claim.configs == (Opaque(source=FROM_CLASS, driver=DRIVER, requests=("cpus",), parameters=parameters),)
    assert claim.reserved_for == ("pod-1", "thing-1")
    assert (claim.groups, claim.pods) == (("thing-1",), ("p",))
    assert claim.pods == ("p",)


@pytest.mark.parametrize(
    "document",
    [
        changed("status", drop=True),
        changed("status", None),
        changed("status", {}),
        changed("status/allocation", None),
        changed("status/allocation", drop=True),
    ],
)
def test_a_claim_without_an_allocation_is_not_allocated(document: dict[str, Any]) -> None:
    """The reader says so; the caller that decides refuses it."""
    claim = read(document, DRIVER)
    assert not claim.allocated and not claim.results and not claim.configs


@pytest.mark.parametrize("path", ["results", "config"])
@pytest.mark.parametrize("empty", [None, []])
def test_an_empty_list_may_be_null(path: str, empty: object) -> None:
    """As Go writes it."""
    claim = read(changed(f"status/allocation/devices/{path}", empty), DRIVER)
    assert claim.allocated
    assert (claim.results if path == "results" else claim.configs) == ()


@pytest.mark.parametrize("part", ["adminAccess", "shareID", "consumedCapacity"])
@pytest.mark.parametrize("drop", [True, False])
def test_what_is_optional_may_be_left_out_or_null(part: str, drop: bool) -> None:
    """Nothing is assumed then."""
    found = read(changed(f"status/allocation/devices/results/0/{part}", drop=drop), DRIVER).results[0]
    assert {"adminAccess": found.admin, "shareID": found.share_id, "consumedCapacity": dict(found.consumed)}[part] in (
        False,
        "",
        {},
    )


NEEDED = [
    "metadata",
    "metadata/name",
    "metadata/namespace",
    "metadata/uid",
    *(f"status/allocation/devices/results/0/{name}" for name in ("request", "driver", "pool", "device")),
    "status/allocation/devices/config/0/source",
    "status/allocation/devices/config/0/opaque/driver",
    "status/reservedFor/0/uid",
]


@pytest.mark.parametrize("path", NEEDED)
def test_what_is_needed_and_missing_is_named(path: str) -> None:
    """With its place in the document."""
    name = path.rpartition("/")[2]
    with pytest.raises(InputError, match=rf"^it cannot be read: Object missing required field `{name}`"):
        read(changed(path, drop=True), DRIVER)


@pytest.mark.parametrize("wrong", [7, 1.5, True, [7], {"x": 7}, "text", None])
@pytest.mark.parametrize(
    "path",
    [
        *NEEDED,
        "status",
        "status/allocation",
        "status/allocation/devices",
        "status/allocation/devices/results",
        "status/allocation/devices/results/0",
        "status/allocation/devices/results/0/adminAccess",
        "status/allocation/devices/results/0/shareID",
        "status/allocation/devices/results/0/consumedCapacity",
        "status/allocation/devices/config",
        "status/allocation/devices/config/0/requests",
        "status/allocation/devices/config/0/opaque",
        "status/allocation/devices/config/0/opaque/parameters",
        "status/reservedFor",
        "status/reservedFor/0",
    ],
)
def test_a_value_of_a_wrong_type_is_read_right_or_refused_with_its_place(path: str, wrong: object) -> None:
    """Nothing is guessed: no number becomes a text."""
    document = changed(path, wrong)
    try:
        read(document, DRIVER)
    except InputError as error:
        words = str(error)
        assert words.startswith("it cannot be read: ") and ("$" in words or "missing required field" in words)
    else:
        assert wrong is None or isinstance(wrong, dict | str | bool)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), (2, 2), (2.0, 2), ("2000m", 2), ("2e3", 2000), ("4Mi", 4 << 20), ("1Ti", 1 << 40), ("0", 0)],
)
def test_quantities_are_whole_numbers_however_they_are_written(text: object, value: int) -> None:
    """A server may send a number as it is."""
    path = "status/allocation/devices/results/0/consumedCapacity"
    assert read(changed(path, {"cpus": text}), DRIVER).results[0].consumed == {"cpus": value}


@pytest.mark.parametrize("text", ["", "1.5", "-1", "many", "1e99", "9" * 30, "1500m", 1.5, -1, "0x10", "1 ", "١"])
def test_a_capacity_that_is_no_whole_number_is_refused_with_its_place(text: object) -> None:
    path = "status/allocation/devices/results/0/consumedCapacity"
    with pytest.raises(InputError) as error:
        read(changed(path, {f"{DRIVER}/cpus": text}), DRIVER)
    assert str(error.value).startswith(f"{RESULT}.consumedCapacity.{DRIVER}/cpus: cannot read quantity")


def test_what_other_drivers_consume_is_not_ours_to_judge() -> None:
    """Their units are their own."""
    document = changed("status/allocation/devices/results/1/consumedCapacity", {"x": "half"})
    assert read(document, DRIVER).results[1].consumed == {}


def test_a_big_document_is_read() -> None:
    """As many results and configurations as the API allows, and a lot that is not needed."""
    one = DOCUMENT["status"]["allocation"]["devices"]["results"][0]
    document = changed("status/allocation/devices/results", [{**one, "device": f"d{n}"} for n in range(1000)])
    document["metadata"]["annotations"] = {f"k{n}": "v" * 1000 for n in range(1000)}
    claim = read(json.loads(json.dumps(document)), DRIVER)
    assert [one.device for one in claim.results] == [f"d{n}" for n in range(1000)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PATHS = [
    "metadata",
    "status",
    "status/allocation",
    "status/allocation/devices",
    *(f"status/allocation/devices/{part}" for part in ("results", "config", "results/0", "config/0")),
    "status/allocation/devices/results/0/consumedCapacity",
    "status/allocation/devices/config/0/opaque/parameters",
    "status/reservedFor",
]


@given(st.sampled_from(PATHS), JSON)
def test_whatever_is_sent_is_read_or_an_input_error(path: str, value: object) -> None:
    """At every depth."""
    try:
        claim = read(changed(path, value), DRIVER)
    except InputError:
        return
    assert all(isinstance(amount, int) for one in claim.results for amount in one.consumed.values())


@given(st.dictionaries(st.text(max_size=12), JSON, max_size=5))
def test_garbage_is_an_input_error(document: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^it cannot be read: "):
        read(document, DRIVER)


# ---------------------------------------------------------------- status.devices


def test_a_status_has_what_the_server_demands_and_no_more() -> None:
    """shareID only where there is one; a message no longer than the server takes."""
    plain = Result(request="r", driver=DRIVER, pool="p", device="d")
    shared = Result(request="r", driver=DRIVER, pool="p", device="d", share_id="s")
    at = "2026-11-21T00:00:00Z"
    one, two = (
        one_status(result, ready=ready, reason="R", message="m" * 40_000, at=at, data={"networkData": {}})
        for result, ready in ((plain, True), (shared, False))
    )
    assert one == {
        "driver": DRIVER,
        "pool": "p",
        "device": "d",
        "networkData": {},
        "conditions": [
            {"type": "Ready", "status": "True", "reason": "R", "message": "m" * 32768, "lastTransitionTime": at}
        ],
    }
    assert two["shareID"] == "s" and two["conditions"][0]["status"] == "False"
    body = device_status(ClaimRef(namespace="ns", name="c", uid="u"), [one])
    assert body["metadata"] == {"namespace": "ns", "name": "c", "uid": "u"}
    assert body["status"] == {"devices": [one]}


# Whose it is


def test_the_pods_of_a_claim_are_those_reserved_and_while_it_is_of_a_group_those_known() -> None:
    """The group itself is no pod: nothing of it ever runs."""
    claim = read(DOCUMENT, DRIVER)
    assert claim.pods_with(["pod-2", "pod-1", "thing-1"]) == ("pod-1", "pod-2")
    alone = copy.deepcopy(DOCUMENT)
    del alone["status"]["reservedFor"][1]
    assert read(alone, DRIVER).pods_with(["pod-2"]) == ("pod-1",)


@pytest.mark.parametrize(
    ("annotations", "name"),
    [
        ({POD_CLAIM_NAME: "near"}, "near"),
        ({POD_CLAIM_NAME: "a" * 63}, "a" * 63),
        ({POD_CLAIM_NAME: "a" * 64}, ""),
        ({POD_CLAIM_NAME: "../x"}, ""),
        ({POD_CLAIM_NAME: ""}, ""),
        ({"other": "near"}, ""),
        (None, ""),
    ],
)
def test_the_name_in_the_pod_is_that_of_the_annotation(annotations: dict[str, str] | None, name: str) -> None:
    """Of a claim that was made from a template; what no claim of a pod can be called is no name."""
    document = copy.deepcopy(DOCUMENT)
    document["metadata"]["annotations"] = annotations
    assert read(document, DRIVER).pod_claim == name
