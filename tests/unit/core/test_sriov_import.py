"""The SR-IOV plugin's configuration as one of the agent: the same functions, nothing dropped in silence."""

from __future__ import annotations

import itertools
import json
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from nodeagent.config.load import parse
from nodeagent.core.imports.findings import INCOMPLETE, State, Translation
from nodeagent.core.imports.sriov import translate
from nodeagent.core.model.device import Device
from nodeagent.errors import InputError
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.resources.offer import Offer, offers
from tests.oracles.sriov_plugin import selects

PFS = {"0000:3b:00.0": "ens1f0", "0000:5e:00.0": "ens2np0", "0000:86:00.0": ""}


def functions() -> list[Device]:
    """Three ports, one without a name, with four functions each of which some are under vfio-pci, and a port without
    functions; one port carries the node's traffic; a scalable function."""
    found = []
    for number, (pf, name) in enumerate(PFS.items()):
        rdma: dict[str, str] = {"rdma": f"mlx5_{number}"} if number == 1 else {}
        link = {"link_type": "infiniband" if number == 1 else "ether", "acpi_index": str(100 + number)}
        said: dict[str, Any] = {"sriov": "pf", "sriov_numvfs": 4, **rdma, **link}
        vendor = ("8086", "15b3", "14e4")[number]
        found.append(
            Device(kind="nic", id=pf, pci_address=pf, vendor=vendor, device="1592", driver="ice", attributes=said)
        )
        for index in range(4):
            id = f"{pf[:8]}01.{index}"
            driver = ("iavf", "vfio-pci")[index % 2]
            mine: dict[str, Any] = {"sriov": "vf", "vf_index": index, **(link if driver == "iavf" else {}), **rdma}
            mine |= {"pf_name": name} if name else {}
            attributes = MappingProxyType(mine)
            facts = {"vendor": vendor, "device": "1889", "driver": driver, "parent": pf, "attributes": attributes}
            found.append(Device(kind="nic", id=id, pci_address=id, **facts))
    idle, busy, part = "0000:af:00.0", "0000:af:00.1", "0000:3b:00.0/mlx5_core.sf.4"
    bare = {"vendor": "8086", "device": "1592", "driver": "ice"}
    found.append(Device(kind="nic", id=idle, pci_address=idle, attributes={"sriov": "pf", "sriov_numvfs": 0}, **bare))
    found.append(Device(kind="nic", id=busy, pci_address=busy, attributes={"default_route": True}, **bare))
    scalable = {"auxiliary": "mlx5_core.sf.4", "pf_name": "ens1f0"}
    found.append(
        Device(kind="nic", id=part, pci_address=part[:12], parent=part[:12], attributes=scalable, vendor="8086")
    )
    return found


FUNCTIONS = functions()


def of(*resources: dict[str, Any], **more: Any) -> Translation:
    return translate({"resourceList": list(resources), **more}, "intel.com")


def served(found: Translation) -> list[Offer]:
    """What the agent makes of it, which has to take it."""
    return list(offers(parse(json.dumps(found.config), source="made"), builtin_kinds()))


def ids(offer: Offer) -> list[str]:
    return [one.id for one in FUNCTIONS if offer.resource.serves(one)]  # type: ignore[attr-defined]


def states(found: Translation) -> dict[str, State]:
    return {one.place: one.said.state for one in found.findings}


_OWNERS = some.lists(
    some.tuples(
        some.sampled_from([*filter(None, PFS.values()), "nowhere"]),
        some.sampled_from(["", "#0", "#1-2", "#0,2-3", "#3"]),
    ).map("".join),
    max_size=3,
)
_ROOTS = some.lists(
    some.tuples(some.sampled_from([*PFS]), some.sampled_from(["", "#0", "#1-3"])).map("".join), max_size=2
)
SELECTORS = some.fixed_dictionaries(
    {},
    optional={
        "vendors": some.lists(some.sampled_from(["8086", "15b3", "14e4"]), max_size=2),
        "devices": some.lists(some.sampled_from(["1592", "1889", "154c"]), max_size=2),
        "drivers": some.lists(some.sampled_from(["iavf", "vfio-pci", "ice"]), max_size=2),
        "pciAddresses": some.lists(some.sampled_from([one.id for one in FUNCTIONS[:6]]), max_size=2),
        "acpiIndexes": some.lists(some.sampled_from(["100", "101"]), max_size=1),
        "pfNames": _OWNERS,
        "rootDevices": _ROOTS,
        "linkTypes": some.lists(some.sampled_from(["ether", "infiniband"]), max_size=1),
        "isRdma": some.booleans(),
    },
)


@given(some.lists(SELECTORS, min_size=1, max_size=3))
def test_the_same_functions_are_served(selectors: list[dict[str, Any]]) -> None:
    found = of({"resourceName": "x", "selectors": selectors})
    wanted = [one.id for one in FUNCTIONS if selects(selectors, one)]
    made = served(found)
    assert [one.name for one in made] in (["intel.com/x"], [])
    assert (ids(made[0]) if made else []) == wanted
    assert not [one for one in found.findings if one.said.state in INCOMPLETE]


@given(SELECTORS)
def test_every_key_of_a_selector_has_a_line(selector: dict[str, Any]) -> None:
    places = {one.place.rpartition(".")[2] for one in of({"resourceName": "x", "selectors": selector}).findings}
    assert {key for key in selector if selector[key] or key not in ("pfNames", "rootDevices")} <= places


def test_names_and_further_information_stay() -> None:
    info = {"*": {"token": "a"}, "0000:3b:01.0": {"token": "b"}}
    one = {"resourceName": "dpdk", "resourcePrefix": "openshift.io", "selectors": [{"vendors": ["8086"]}]}
    found = of({**one, "additionalInfo": info})
    (resource,) = found.config["resources"]
    assert (resource["name"], resource["additionalInfo"]) == ("openshift.io/dpdk", info)
    assert found.config["network"] == {"deviceInfoDir": "/var/run/k8s.cni.cncf.io/devinfo/dp"}
    assert len(served(found)) == 1


def test_vhost_net_is_for_the_whole_resource() -> None:
    alone = of({"resourceName": "x", "selectors": {"vendors": ["8086"], "needVhostNet": True}})
    assert alone.config["resources"][0]["vhostNet"] is True
    assert states(alone)["$.resourceList[0].selectors.needVhostNet"] is State.TRANSLATED
    some_of = of(
        {"resourceName": "x", "selectors": [{"vendors": ["8086"], "needVhostNet": True}, {"vendors": ["15b3"]}]}
    )
    assert states(some_of)["$.resourceList[0].selectors[0].needVhostNet"] is State.PARTLY


@pytest.mark.parametrize("key", ["ddpProfiles", "pKeys", "vdpaType"])
def test_what_cannot_be_expressed_is_never_served_more_widely(key: str) -> None:
    """The selector is left out, and the resource with its last selector."""
    value: Any = "vhost" if key == "vdpaType" else ["x"]
    both = of({"resourceName": "x", "selectors": [{"vendors": ["15b3"], key: value}, {"vendors": ["8086"]}]})
    assert both.config["resources"][0]["match"]["vendor"] == "8086"
    alone = of({"resourceName": "x", "selectors": [{"vendors": ["15b3"], key: value}]})
    assert alone.config["resources"] == []
    place = "$.resourceList[0].selectors"
    assert states(alone)[place] is states(alone)[f"{place}[0].{key}"] is State.LOST


def test_scalable_functions_are_served_by_their_owner() -> None:
    one = {"resourceName": "sf", "deviceType": "auxNetDevice"}
    found = of({**one, "selectors": [{"pfNames": ["ens1f0"], "auxTypes": ["sf"]}]})
    assert ids(served(found)[0]) == ["0000:3b:00.0/mlx5_core.sf.4"]
    for selector in ({"pfNames": ["ens1f0#1-5"], "auxTypes": ["sf"]}, {"auxTypes": ["eth"]}):
        assert of({**one, "selectors": [selector]}).config["resources"] == []
    untyped = of({**one, "selectors": [{"vendors": ["8086"]}]})
    assert states(untyped)["$.resourceList[0].deviceType"] is State.PARTLY


def test_accelerators_are_functions_of_class_12() -> None:
    found = of(
        {"resourceName": "a", "deviceType": "accelerator", "selectors": [{"vendors": ["8086"], "pfNames": ["x"]}]}
    )
    (resource,) = found.config["resources"]
    assert resource == {"name": "intel.com/a", "kind": "accel", "match": {"pci_class": "12*", "vendor": "8086"}}
    assert states(found)["$.resourceList[0].selectors[0].pfNames"] is State.UNKNOWN
    assert len(served(found)) == 1


def test_unknown_keys_and_what_is_not_there_are_named_at_every_level() -> None:
    found = of({"resourceName": "x", "selectors": {"vendor": "1"}, "typo": 1, "excludeTopology": True}, other=2)
    expected = {
        "$.other": State.UNKNOWN,
        "$.resourceList[0].typo": State.UNKNOWN,
        "$.resourceList[0].selectors.vendor": State.UNKNOWN,
        "$.resourceList[0].excludeTopology": State.LOST,
    }
    assert expected.items() <= states(found).items()
    nothing = of({"resourceName": "x"})
    assert nothing.config["resources"] == [] and states(nothing)["$.resourceList[0].selectors"] is State.LOST


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "expected an object with resourceList"),
        ({"resourceList": {}}, "expected an object with resourceList"),
        ({"resourceList": [{"resourceName": "a.b"}]}, r"\$\.resourceList\[0\]: expected a resourceName"),
        ({"resourceList": [{"resourceName": "a", "deviceType": "gpu"}]}, "unknown deviceType 'gpu'"),
        ({"resourceList": [{"resourceName": "a"}, {"resourceName": "a"}]}, "intel.com/a stands twice"),
        ({"resourceList": [{"resourceName": "a", "selectors": [1]}]}, r"selectors\[0\]: expected an object"),
        (
            {"resourceList": [{"resourceName": "a", "selectors": {"vendors": "8086"}}]},
            "vendors: expected a list of texts",
        ),
        ({"resourceList": [{"resourceName": "a", "selectors": {"pfNames": ["a#1-x"]}}]}, "'1-x' is no index or range"),
        ({"resourceList": [{"resourceName": "a", "selectors": {"pfNames": ["a#5-3"]}}]}, "'5-3' is no index or range"),
        ({"resourceList": [{"resourceName": "a", "selectors": {"pfNames": ["a#1-"]}}]}, "'1-' is no index or range"),
        ({"resourceList": [{"resourceName": "a", "selectors": {"pfNames": ["a#0-9999"]}}]}, "up to 1023"),
        ({"resourceList": [{"resourceName": "a", "additionalInfo": 1}]}, "additionalInfo: expected an object"),
    ],
)
def test_what_the_plugin_would_refuse_is_refused_with_its_place(document: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        translate(document, "intel.com")


def test_all_that_is_made_is_taken_by_the_agent() -> None:
    """All combinations of two keys of each type, with everything else."""
    keys: dict[str, Any] = {"vendors": ["8086", "*"], "drivers": ["a[b]"], "isRdma": True, "auxTypes": ["sf", "eth"]}
    for type, (a, b) in itertools.product(
        ("netDevice", "accelerator", "auxNetDevice"), itertools.combinations(keys, 2)
    ):
        served(of({"resourceName": "x", "deviceType": type, "selectors": [{a: keys[a]}, {b: keys[b]}]}))
