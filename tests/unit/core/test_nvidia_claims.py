"""Claims, templates and classes for NVIDIA's DRA driver, rewritten for the agent."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.advice.cel import parse as parse_cel
from nodeagent.core.imports.findings import Finding, State, leaves, shown
from nodeagent.core.imports.nvidia import claims, parameters
from nodeagent.core.model.claim import FROM_CLAIM, Opaque
from nodeagent.core.opaque.decode import check_all
from nodeagent.errors import InputError
from tests.support.paths import DATA

KEYS: dict[str, Any] = json.loads((DATA / "nvidia" / "keys.json").read_text())
DRIVER = "nodeagent.dev"


def example(name: str) -> tuple[dict[str, Any], list[Finding]]:
    every = yaml.safe_load_all((DATA / "nvidia" / "claims.yaml").read_text())
    (one,) = [one for one in every if one["metadata"]["name"] == name]
    return claims.rewrite(one, "")


def checked(given: dict[str, Any], devices: int | None = 1) -> dict[str, Any]:
    """The agent's parameters, after its own check."""
    made, found = parameters.translate(given, devices, "")
    if made:
        check_all([Opaque(source=FROM_CLAIM, driver=DRIVER, parameters=made)], DRIVER)
    assert [(one.place, one.value) for one in found] == [(one.path, shown(one.value)) for one in leaves(given)]
    assert all(one.said.to or one.said.why for one in found)
    return made


def of(kind: str, **keys: Any) -> dict[str, Any]:
    return {"apiVersion": parameters.API_VERSION, "kind": kind, **keys}


def mps(**config: Any) -> dict[str, Any]:
    return of("GpuConfig", sharing={"strategy": "MPS", "mpsConfig": config})


def test_a_template_asks_the_agent_for_the_same() -> None:
    made, found = example("half")
    devices = made["spec"]["spec"]["devices"]
    assert devices["requests"][0]["exactly"] == {
        "deviceClassName": "gpu.nodeagent.dev",
        "selectors": [{"cel": {"expression": "device.attributes[\"nodeagent.dev\"].productName.contains('H100')"}}],
    }
    assert devices["config"][0]["opaque"] == {
        "driver": DRIVER,
        "parameters": {
            "apiVersion": "nodeagent.dev/v1alpha1",
            "kind": "GpuConfig",
            "mps": {"activeThreadPercentage": 50, "pinnedDeviceMemoryLimit": "40Gi"},
        },
    }
    assert {one.said.state for one in found} == {State.TRANSLATED}


def test_a_claim_of_an_older_version_keeps_its_constraint() -> None:
    made, found = example("pair")
    (a, b) = made["spec"]["devices"]["requests"]
    assert a["deviceClassName"] == b["deviceClassName"] == "gpu-part.nodeagent.dev"
    expression = 'device.attributes["nodeagent.dev"].migProfile == "3g.40gb"'
    assert a["selectors"] == [{"cel": {"expression": expression}}]
    parse_cel(expression)
    assert made["spec"]["devices"]["constraints"] == [
        {"requests": ["a", "b"], "matchAttribute": "nodeagent.dev/parentUUID"}
    ]
    assert {one.said.state for one in found} == {State.TRANSLATED}


def test_a_class_for_virtual_machines_becomes_a_configuration() -> None:
    made, _ = example("guest")
    devices = made["spec"]["devices"]
    assert devices["requests"][0]["exactly"]["deviceClassName"] == "gpu.nodeagent.dev"
    (config,) = devices["config"]
    assert (config["requests"], config["opaque"]["parameters"]["driver"]) == (["gpu"], "vfio-pci")
    check_all([Opaque(source=FROM_CLAIM, driver=DRIVER, parameters=config["opaque"]["parameters"])], DRIVER)


def test_a_claim_whose_configuration_is_null_is_for_a_virtual_machine_all_the_same() -> None:
    ask = {"name": "gpu", "exactly": {"deviceClassName": "vfio.gpu.nvidia.com"}}
    claim = {"kind": "ResourceClaim", "spec": {"devices": {"requests": [ask], "config": None}}}
    made, _ = claims.rewrite({"apiVersion": "resource.k8s.io/v1", **claim}, "")
    (config,) = made["spec"]["devices"]["config"]
    assert config["opaque"]["parameters"]["driver"] == "vfio-pci"


OF_MIG = "device.attributes['gpu.nvidia.com'].type == 'mig'"


def test_a_class_is_rewritten_and_what_the_agent_does_not_publish_is_named() -> None:
    one = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceClass",
        "metadata": {"name": "mine"},
        "spec": {
            "selectors": [
                {"cel": {"expression": "device.driver == 'gpu.nvidia.com' && " + OF_MIG}},
                {"cel": {"expression": "device.attributes['gpu.nvidia.com'].architecture == 'Hopper'"}},
                {"cel": {"expression": 'device.attributes["other.example"].x == 1'}},
            ],
            "config": [{"opaque": {"driver": "gpu.nvidia.com", "parameters": of("GpuConfig")}}],
        },
    }
    made, found = claims.rewrite(one, "")
    first, second, third = (it["cel"]["expression"] for it in made["spec"]["selectors"])
    assert first == 'device.driver == "nodeagent.dev" && has(device.attributes["nodeagent.dev"].parent)'
    parse_cel(first)
    assert second == one["spec"]["selectors"][1]["cel"]["expression"]  # type: ignore[index]
    assert third == 'device.attributes["other.example"].x == 1'
    (lost,) = [it for it in found if it.said.state == State.LOST]
    assert (lost.place, "architecture" in lost.said.why) == ("$.spec.selectors[1].cel.expression", True)
    assert made["spec"]["config"][0]["opaque"]["parameters"] == {
        "apiVersion": "nodeagent.dev/v1alpha1",
        "kind": "GpuConfig",
    }


def test_what_is_of_domains_of_several_nodes_stays_as_it_is_and_is_named() -> None:
    config = {"opaque": {"driver": "compute-domain.nvidia.com", "parameters": of("ComputeDomainChannelConfig")}}
    ask = {"name": "c", "exactly": {"deviceClassName": "compute-domain-default-channel.nvidia.com"}}
    spec = {"devices": {"requests": [ask], "config": [config]}}
    one = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": {"name": "c"}, "spec": spec}
    made, found = claims.rewrite(one, "")
    assert made == one
    assert {it.said.state for it in found} == {State.LOST}
    domain = of("ComputeDomain", spec={"numNodes": 2})
    assert claims.rewrite(domain, "")[1][0].said.state == State.LOST


@pytest.mark.parametrize(
    ("given", "devices", "limit"),
    [
        ({"defaultPinnedDeviceMemoryLimit": "10Gi"}, 4, "10Gi"),
        ({"defaultPerDevicePinnedMemoryLimit": {"0": "5Gi"}}, 1, "5Gi"),
        ({"defaultPinnedDeviceMemoryLimit": "5Gi", "defaultPerDevicePinnedMemoryLimit": {"1": "5120Mi"}}, 2, "5Gi"),
        ({"defaultPinnedDeviceMemoryLimit": "5Gi", "defaultPerDevicePinnedMemoryLimit": {"1": "6Gi"}}, 2, "5Gi"),
        ({"defaultPerDevicePinnedMemoryLimit": {"0": "5Gi"}}, 2, None),
        ({"defaultPerDevicePinnedMemoryLimit": {"0": "5Gi"}}, None, None),
        ({}, 1, None),
    ],
)
def test_one_limit_is_for_all_devices_of_a_claim(given: dict[str, Any], devices: int | None, limit: str | None) -> None:
    made, found = parameters.translate(mps(**given), devices, "")
    assert made["mps"].get("pinnedDeviceMemoryLimit") == limit
    per_device = given.get("defaultPerDevicePinnedMemoryLimit", {})
    is_lost = bool(per_device) and limit not in per_device.values() and "5120Mi" not in per_device.values()
    assert any(one.said.state == State.LOST for one in found) == is_lost


@pytest.mark.parametrize(
    "given",
    [
        mps(defaultActiveThreadPercentage=101),
        mps(defaultPinnedDeviceMemoryLimit="1Ki"),
        mps(defaultPinnedDeviceMemoryLimit="much"),
        of("GpuConfig", sharing={"strategy": "Sharing"}),
        of("GpuConfig", sharing={"strategy": "TimeSlicing", "timeSlicingConfig": {"interval": "Longer"}}),
        of("Gpu"),
    ],
)
def test_parameters_that_nvidia_s_driver_refuses_are_an_error(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot read parameters at here"):
        parameters.translate(given, 1, "here")


def test_another_version_is_named() -> None:
    made, (first, *_) = parameters.translate({"apiVersion": "gpu.nvidia.com/v1alpha1", "kind": "GpuConfig"}, 1, "")
    assert (made, first.said.state) == ({}, State.LOST)


@pytest.mark.parametrize("given", KEYS["parameters"], ids=lambda one: str(one["kind"]))
def test_every_key_of_the_parameters_is_known(given: dict[str, Any]) -> None:
    checked(given)
    assert State.UNKNOWN not in {one.said.state for one in parameters.translate(given, 1, "")[1]}


SIZES = st.sampled_from(["1Mi", "10Gi", "5e9", 1 << 30])
MPS = st.fixed_dictionaries(
    {},
    optional={
        "defaultActiveThreadPercentage": st.none() | st.integers(0, 100),
        "defaultPinnedDeviceMemoryLimit": st.none() | SIZES,
        "defaultPerDevicePinnedMemoryLimit": st.dictionaries(st.sampled_from(["0", "1", "GPU-x"]), SIZES),
        "zz": st.just(1),
    },
)
SHARING = st.fixed_dictionaries(
    {"strategy": st.sampled_from(["TimeSlicing", "MPS"])},
    optional={
        "timeSlicingConfig": st.fixed_dictionaries(
            {}, optional={"interval": st.sampled_from([None, "Default", "Short", "Medium", "Long"])}
        ),
        "mpsConfig": MPS,
    },
)


@given(
    st.sampled_from(["GpuConfig", "MigDeviceConfig", "VfioDeviceConfig"]),
    st.fixed_dictionaries(
        {},
        optional={
            "sharing": SHARING,
            "zz": st.just({"deep": []}),
            "iommu": st.fixed_dictionaries(
                {},
                optional={
                    "backendPolicy": st.sampled_from(["LegacyOnly", "PreferIommuFD"]),
                    "enableAPIDevice": st.booleans(),
                },
            ),
        },
    ),
    st.none() | st.integers(1, 3),
)
def test_every_parameter_is_translated_or_named_and_the_agent_takes_what_is_made(
    kind: str, keys: dict[str, Any], devices: int | None
) -> None:
    given = of(kind, **keys)
    checked(given, devices)
    unknown = {one.place for one in parameters.translate(given, devices, "")[1] if one.said.state == State.UNKNOWN}
    foreign = {
        "GpuConfig": ("$.iommu",),
        "MigDeviceConfig": ("$.iommu", "$.sharing.timeSlicingConfig"),
        "VfioDeviceConfig": ("$.sharing",),
    }[kind]
    assert unknown == {one.path for one in leaves(given) if one.path.startswith(foreign) or ".zz" in one.path}
