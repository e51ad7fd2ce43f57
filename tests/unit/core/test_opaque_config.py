"""A claim's opaque configuration: what is in force, and what is refused with its place."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.model.claim import FROM_CLAIM, FROM_CLASS, Opaque, Result
from nodeagent.core.model.options import OPTIONS, POLICIES, check_options
from nodeagent.core.network.interface import Interface, Route
from nodeagent.core.opaque.decode import (
    API_VERSION,
    CONFIG_KINDS,
    FORMS,
    Forms,
    check_all,
    check_fit,
    read_own,
    settings_for,
)
from nodeagent.core.opaque.settings import NO_SETTINGS, OpaqueConfig, from_json, to_json
from nodeagent.errors import InputError
from tests.support.opaque_cases import RIGHT, STRANGE, WRONG

DRIVER = "nodeagent.dev"


def opaque(config: str, *, source: str = FROM_CLAIM, requests: tuple[str, ...] = (), **said: Any) -> Opaque:
    parameters = {"apiVersion": API_VERSION, "kind": config, **said}
    return Opaque(source=source, driver=DRIVER, requests=requests, parameters=parameters)


def settings(kind: str, *configs: Opaque, request: str = "one") -> OpaqueConfig:
    result = Result(request=request, driver=DRIVER, pool=f"node/{kind}", device="device-0")
    return settings_for(result, kind, configs, DRIVER)


def refusal(kind: str, *configs: Opaque, request: str = "one") -> str:
    with pytest.raises(InputError) as error:
        settings(kind, *configs, request=request)
    return str(error.value)


# ---------------------------------------------------------------- what each kind says


def test_nothing_configured_is_nothing_in_force() -> None:
    assert settings("cpu") is NO_SETTINGS


def test_the_core_type_is_an_option_of_the_request() -> None:
    found = settings("cpu", opaque("CpuConfig", options=["full-pcpus-only"], numa="single", coreType="performance"))
    assert found == OpaqueConfig(options=frozenset({"full-pcpus-only", "require-performance-cores"}), numa="single")
    assert check_options(found.options) == found.options


def test_every_policy_and_option_of_placement_can_be_configured() -> None:
    for name in OPTIONS:
        assert settings("cpu", opaque("CpuConfig", options=[name])).options == {name}
    for policy in POLICIES:
        assert settings("cpu", opaque("CpuConfig", numa=policy)).numa == policy


def test_pages_are_mounted_where_the_claim_says() -> None:
    found = settings("hugepages", opaque("HugepageConfig", mountPath="/dev/hugepages/"))
    assert found.mount_path == "/dev/hugepages"


def test_a_gpu_is_shared_in_one_way() -> None:
    assert settings("gpu", opaque("GpuConfig", timeSlicing={"interval": "Long"})).time_slice == "Long"
    assert settings("gpu", opaque("GpuConfig", timeSlicing={})).time_slice == "Default"
    mps = {"activeThreadPercentage": 50, "pinnedDeviceMemoryLimit": "1Gi"}
    found = settings("gpu", opaque("GpuConfig", mps=MappingProxyType(mps)))
    assert found == OpaqueConfig(mps=True, mps_threads_percent=50, mps_pinned_bytes=1 << 30)
    assert settings("gpu", opaque("GpuConfig", timeSlicing=None, mps={})) == OpaqueConfig(mps=True)


def test_rdma_can_be_asked_for_refused_or_left_open() -> None:
    assert [settings("nic", opaque("NicConfig", **said)).rdma for said in ({"rdma": True}, {"rdma": False}, {})] == [
        True,
        False,
        None,
    ]


def test_an_interface_is_written_in_one_way() -> None:
    said = {
        "name": "net1",
        "addresses": ["10.0.0.5/24", "FD00:0::5/64"],
        "routes": [{"destination": "fd01:0::/64", "gateway": "fd00::0001"}, {"destination": "10.2.0.0/16"}],
        "mtu": 9000,
        "hardwareAddress": "02:00:00:00:00:0A",
    }
    found = settings("nic", opaque("NicConfig", interface=MappingProxyType(said)))
    routes = (Route(destination="fd01::/64", gateway="fd00::1"), Route(destination="10.2.0.0/16"))
    assert found.interface == Interface(
        name="net1",
        addresses=("10.0.0.5/24", "fd00::5/64"),
        routes=routes,
        mtu=9000,
        hardware_address="02:00:00:00:00:0a",
    )
    assert from_json(to_json(found)) == found
    assert settings("nic", opaque("NicConfig", interface={})).interface == Interface()


@pytest.mark.parametrize(
    "address",
    [
        "224.0.0.1/24",
        "0.0.0.0/0",
        "fe80::1/64",
        "fec0::1/64",
        "::1/128",
        "::ffff:10.0.0.5/120",
        "10.0.0.5/24%eth0",
        "",
    ],
)
def test_an_address_that_no_interface_can_be_given_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"at \$\.interface\.addresses\[0\], expected an address"):
        settings("nic", opaque("NicConfig", interface={"addresses": [address]}))


@pytest.mark.parametrize("kind", ["block", "nvme", "pci", "char", "usb", "somebody-elses"])
def test_a_kind_without_a_form_of_its_own_takes_variables(kind: str) -> None:
    assert settings(kind, opaque("DeviceConfig", env={"SPEED": "115200"})).env == {"SPEED": "115200"}


@pytest.mark.parametrize("kind", ["block", "nvme"])
def test_a_disk_has_limits_of_io(kind: str) -> None:
    said = {"readBytesPerSecond": "1Mi", "writeBytesPerSecond": 5, "readIOPS": 2, "writeIOPS": 3, "env": {"A": "b"}}
    more = {"weight": 50, "latencyTargetMicroseconds": 75}
    assert settings(kind, opaque("BlockConfig", **said, **more)) == OpaqueConfig(
        io_read_bps=1 << 20,
        io_write_bps=5,
        io_read_iops=2,
        io_write_iops=3,
        io_weight=50,
        io_latency_us=75,
        env=MappingProxyType({"A": "b"}),
    )
    assert settings(kind, opaque("BlockConfig", ioClass="batch")).io_class == "batch"


def test_limits_of_io_are_for_disks_alone() -> None:
    limits = opaque("BlockConfig", requests=("one",), readIOPS=5)
    assert "of kind char, expected DeviceConfig" in refusal("char", limits)
    others = opaque("CpuConfig", requests=("one",))
    assert "of kind block, expected BlockConfig or DeviceConfig" in refusal("block", others)


def test_every_form_is_some_kinds() -> None:
    assert {*CONFIG_KINDS.values(), "DeviceConfig"} == FORMS.keys()


# ---------------------------------------------------------------- which one is in force


def test_the_claim_beats_the_class_in_any_order() -> None:
    of_class = opaque("CpuConfig", source=FROM_CLASS, numa="single")
    of_claim = opaque("CpuConfig", numa="restricted")
    assert settings("cpu", of_class, of_claim) == settings("cpu", of_claim, of_class) == OpaqueConfig(numa="restricted")


def test_the_later_of_one_source_beats_the_earlier() -> None:
    first, last = opaque("CpuConfig", numa="single"), opaque("CpuConfig", numa="restricted")
    assert settings("cpu", first, last).numa == "restricted"


def test_a_configuration_replaces_the_whole_of_the_one_before() -> None:
    of_class = opaque("CpuConfig", source=FROM_CLASS, options=["full-pcpus-only"], numa="single")
    assert settings("cpu", of_class, opaque("CpuConfig", coreType="efficiency")) == OpaqueConfig(
        options=frozenset({"require-efficiency-cores"})
    )
    assert settings("cpu", of_class, opaque("CpuConfig")) == NO_SETTINGS


@pytest.mark.parametrize(
    ("requests", "request_name", "applies"),
    [
        ((), "one", True),
        ((), "one/a", True),
        (("one",), "one", True),
        (("one",), "one/a", True),
        (("one/a",), "one/a", True),
        (("one/a",), "one/b", False),
        (("one/a",), "one", False),
        (("two",), "one", False),
        (("on",), "one/a", False),
        (("a",), "one/a", False),
        (("two", "one"), "one", True),
    ],
)
def test_requests_are_named_whole_or_with_their_alternatives(
    requests: tuple[str, ...], request_name: str, applies: bool
) -> None:
    found = settings("cpu", opaque("CpuConfig", requests=requests, numa="single"), request=request_name)
    assert (found == OpaqueConfig(numa="single")) is applies


def test_a_configuration_without_requests_is_for_its_kind_alone() -> None:
    both = (opaque("CpuConfig", numa="single"), opaque("NicConfig", rdma=True))
    assert settings("cpu", *both) == OpaqueConfig(numa="single")
    assert settings("nic", *both) == OpaqueConfig(rdma=True)
    assert settings("gpu", *both) == NO_SETTINGS


def test_a_claim_that_names_a_request_of_another_kind_is_mistaken() -> None:
    said = refusal("gpu", opaque("CpuConfig"), opaque("NicConfig", requests=("one",)))
    assert said == (
        'cannot use config[1] (FromClaim): NicConfig is for request "one", which got device "device-0" of kind gpu, '
        "expected GpuConfig"
    )


def test_a_claims_configuration_that_fits_none_of_its_devices_is_mistaken() -> None:
    """Also where the scheduler has removed the requests that it names."""
    kinds = {"cpus": "cpu", "near/a": "gpu"}
    nic = opaque("NicConfig")
    with pytest.raises(InputError) as error:
        check_fit([opaque("CpuConfig"), nic], DRIVER, kinds)
    assert str(error.value) == (
        "cannot use config[1] (FromClaim): NicConfig fits no device of the claim, expected CpuConfig, GpuConfig"
    )
    check_fit([opaque("CpuConfig"), opaque("GpuConfig", requests=("near",))], DRIVER, kinds)
    check_fit([opaque("NicConfig", source=FROM_CLASS), opaque("NicConfig", requests=("theirs",))], DRIVER, kinds)


def test_a_class_may_configure_several_kinds() -> None:
    """The scheduler writes the request's name into what comes from a class."""
    of_class = [opaque(one, source=FROM_CLASS, requests=("one",)) for one in FORMS]
    assert settings("gpu", *of_class, opaque("GpuConfig", timeSlicing={})).time_slice == "Default"


def test_a_request_with_alternatives_may_be_configured_for_each_of_their_kinds() -> None:
    both = (opaque("CpuConfig", requests=("one",), numa="single"), opaque("GpuConfig", requests=("one",), mps={}))
    assert settings("cpu", *both, request="one/a").numa == "single"
    assert settings("gpu", *both, request="one/b").mps


def test_other_drivers_are_left_alone() -> None:
    foreign = Opaque(source="FromMars", driver="gpu.example.com", parameters={"apiVersion": 3, "mps": "?"})
    assert settings("gpu", foreign) == NO_SETTINGS
    check_all([foreign], DRIVER)


def test_a_slip_is_told_even_where_it_applies_to_nothing() -> None:
    with pytest.raises(
        InputError, match=r"config\[1\] \(FromClass\): NicConfig has no key \$\.rdna; did you mean rdma\?"
    ):
        check_all([opaque("CpuConfig"), opaque("NicConfig", source=FROM_CLASS, requests=("two",), rdna=True)], DRIVER)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("parameters", "said"), STRANGE)
def test_what_is_not_ours_to_read_is_named(parameters: Mapping[str, Any], said: str) -> None:
    config = Opaque(source=FROM_CLAIM, driver=DRIVER, parameters=parameters)
    assert refusal("cpu", config).startswith(f"cannot use config[0] (FromClaim): {said}")


@pytest.mark.parametrize(("config", "said"), RIGHT)
def test_what_is_right_is_accepted(config: str, said: dict[str, Any]) -> None:
    check_all([opaque(config, **said)], DRIVER)


@pytest.mark.parametrize(("config", "said", "problem"), WRONG)
def test_a_wrong_value_is_named_with_its_path(config: str, said: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as error:
        check_all([opaque(config, **said)], DRIVER)
    assert str(error.value).startswith(f"cannot use config[0] (FromClaim): {config}")
    assert problem in str(error.value)


def test_an_unknown_source_is_named() -> None:
    assert "'FromMars' at source" in refusal("cpu", opaque("CpuConfig", source="FromMars"))


# ---------------------------------------------------------------- kept

KEPT = st.builds(
    OpaqueConfig,
    options=st.frozensets(st.sampled_from(sorted(OPTIONS))),
    numa=st.sampled_from(["", *POLICIES]),
    mount_path=st.sampled_from(["", "/dev/hugepages"]),
    time_slice=st.sampled_from(["", "Default", "Long"]),
    mps=st.booleans(),
    mps_threads_percent=st.none() | st.integers(1, 100),
    mps_pinned_bytes=st.none() | st.integers(1, 1 << 40),
    rdma=st.none() | st.booleans(),
    env=st.dictionaries(st.text(), st.text()).map(MappingProxyType),
)


@given(KEPT)
def test_what_was_kept_is_read_again(kept: OpaqueConfig) -> None:
    text = to_json(kept)
    assert from_json(text) == kept
    assert to_json(from_json(text)) == text


def test_no_settings_take_no_room() -> None:
    assert to_json(NO_SETTINGS) == ""
    assert from_json("") == NO_SETTINGS


@pytest.mark.parametrize("text", ["{", "[]", '{"numa": 3}', '{"nume": "single"}', '{"env": {"A": 1}}', "\udc80"])
def test_what_was_not_kept_by_us_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="cannot read settings"):
        from_json(text)


# ---------------------------------------------------------------- a third party's own


class Fan(msgspec.Struct, frozen=True):
    rpm: Annotated[int, msgspec.Meta(le=9000)] = 100


class CardConfig(msgspec.Struct, frozen=True, rename="camel"):
    power_watts: int
    fans: list[Fan] = []
    name: str = ""

    def __post_init__(self) -> None:
        if self.name == "odd":
            raise KeyError("an odd name")


CARDS = Forms({"card": CardConfig})


def own(*configs: Opaque) -> OpaqueConfig:
    result = Result(request="one", driver=DRIVER, pool="node/card", device="device-0")
    return settings_for(result, "card", configs, DRIVER, CARDS)


def test_a_third_partys_configuration_is_kept_in_plain_types_and_read_as_its_own() -> None:
    found = own(opaque("CardConfig", powerWatts=300, fans=[{"rpm": 5}]))
    assert found.own == {"powerWatts": 300, "fans": [{"rpm": 5}], "name": ""}
    again = from_json(to_json(found))
    assert again == found
    assert read_own(again, CardConfig) == CardConfig(300, [Fan(5)])


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"powerWatts": "300"}, "CardConfig: Expected `int`, got `str` - at `$.powerWatts`, found '300'"),
        ({}, "CardConfig: Object missing required field `powerWatts`"),
        ({"powerWats": 1}, "CardConfig has no key $.powerWats; did you mean powerWatts?"),
        ({"powerWatts": 1, "fans": [{}, {"rmp": 3}]}, "CardConfig has no key $.fans[1].rmp; did you mean rpm?"),
        ({"powerWatts": 1, "fans": [{"rpm": 9001}]}, "Expected `int` <= 9000 - at `$.fans[0].rpm`, found 9001"),
        ({"powerWatts": 1, "name": "odd"}, "CardConfig: KeyError: 'an odd name'"),
    ],
)
def test_what_a_third_partys_configuration_cannot_be_is_named(said: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError) as error:
        check_all([opaque("CardConfig", **said)], DRIVER, CARDS)
    assert str(error.value).startswith("cannot use config[0] (FromClaim): ")
    assert why in str(error.value)


def test_a_kind_whose_configuration_has_no_defaults_needs_one_from_the_claim() -> None:
    with pytest.raises(InputError, match=r"cannot read the CardConfig of the claim: .*`powerWatts`"):
        own()
    with pytest.raises(InputError, match=r"DeviceConfig is for request .* of kind card, expected CardConfig"):
        own(opaque("DeviceConfig", requests=("one",)))
    with pytest.raises(InputError, match=r"'CardConfig' at \$.kind"):
        check_all([opaque("CardConfig", powerWatts=1)], DRIVER)
