"""The JSON schema: it refuses what the agent would refuse wherever a schema can say so, and nothing that is good."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from nodeagent.config.json_schema import json_schema, page_sizes
from nodeagent.config.load import parse
from nodeagent.config.schema import DEFAULT_RESOURCES, Config, schema
from nodeagent.config.validate import MEANT_FOR, NEEDED, ONLY_DEVICES, wrong
from nodeagent.errors import ConfigError
from nodeagent.host.devices.all_kinds import builtin_kinds
from tests.oracles.json_schema import JsonSchema

SCHEMA = JsonSchema(json_schema())
BEYOND = (
    "stands twice",
    ".maxPages, expected at least",
    "is served through DRA",
    "a socket's whole path",
    "cannot be used for DRA",
    "$.metrics.listen",
)
"""What is said of rules that no schema can express."""
OVERHEAD = {"perPod": "100m"}
TARGET = {"name": "a", "nqn": "nqn.2024-01.com.example:a", "traddr": "192.0.2.1"}
KINDS = (
    "cpu",
    "hugepages",
    "memory",
    "char",
    "usb",
    "nvmeof",
    "dsa-queue",
    "gpu",
    "nic",
    "accel",
    "fpga",
    "pci",
    "qat",
    "Odd_Kind",
)
VALUES: dict[str, list[Any]] = {
    "serve": ["device-plugin", "dra", "both"],
    "match": [{}, {"vendor": "*"}, {"vendor": ["8086", "15b3"]}, {"vendor": 1}],
    "matchAny": [[], [{"vendor": "*"}, {"driver": ["a", "b"]}], {"vendor": "*"}],
    "paths": [[], ["/dev/ttyS*"], ["/dev/../etc/*"], ["/dev/a..b"]],
    "usb": [[], [{"vendor": "1d6b"}]],
    "targets": [[], [TARGET], [{**TARGET, "dhchapCtrlSecretFile": "/k"}], [{**TARGET, "traddr": "san.example.com"}]],
    "replicas": [1, 2],
    "pageSize": ["", "2Mi", "2048Ki", "3Mi", "8Ki", "32Gi", "2M"],
    "pagesPerBlock": [1, 4],
    "options": [[], ["full-pcpus-only"]],
    "numa": ["best-effort", "single"],
    "grouping": ["numa-node", "socket"],
    "deviceNodes": [True, False],
    "driverCapabilities": [[], ["graphics"]],
    "mig": [
        {},
        {"mode": "static", "gpus": []},
        {"mode": "dynamic"},
        {"gpus": ["*"]},
        {"mode": "dynamic", "gpus": ["*"]},
    ],
    "cdi": [None, {"kind": "a.com/b"}],
    "env": [{}, {"A": "b"}],
    "vhostNet": [False, True],
    "additionalInfo": [{}, {"*": {"a": "b"}}, {"0000:3b:00.1": {"a": ""}}, {"3b:00.1": {}}],
    "overhead": [{}, {"cpu": OVERHEAD}, {"cpu": {}}, {"cpu": {"perPod": "", "perContainer": "1"}}],
}
NAMES = ["a", "b", "a.example.com/c", "kubernetes.io/c", "a.kubernetes.io/c", "requests.example.com/c", "kubernetes.io"]
DOMAINS = ["nodeagent.dev", "a.kubernetes.io", "requests.a.b", "a." + "b" * 60, ".".join(["b" * 60] * 5)]
TLS = {key: some.sampled_from(["", "/etc/file"]) for key in ("certFile", "keyFile", "clientCaFile")}


def resources() -> some.SearchStrategy[dict[str, Any]]:
    fixed = {"name": some.sampled_from(NAMES), "kind": some.sampled_from(KINDS)}
    return some.fixed_dictionaries(
        fixed, optional={key: some.sampled_from(values) for key, values in VALUES.items()}
    ).filter(lambda one: len(one) < 7)


def pools() -> some.SearchStrategy[dict[str, Any]]:
    fixed = {"pageSize": some.sampled_from(VALUES["pageSize"][1:]), "node": some.integers(0, 1)}
    return some.fixed_dictionaries(fixed, optional={key: some.integers(0, 3) for key in ("pages", "maxPages")})


def partitions() -> some.SearchStrategy[dict[str, Any]]:
    fixed = {"gpus": some.sampled_from([[], ["*"], ["0000:05:*", "a"], [""]])}
    modes = {"compute": some.sampled_from([None, "CPX", "XPX"]), "memory": some.sampled_from([None, "NPS4", "NPS3"])}
    return some.fixed_dictionaries(fixed, optional=modes)


CONFIGURATIONS = some.fixed_dictionaries(
    {},
    optional={
        "domain": some.sampled_from(DOMAINS),
        "resources": some.lists(resources(), max_size=2),
        "hugepages": some.lists(pools(), max_size=2),
        "amd": some.fixed_dictionaries({}, optional={"partitions": some.lists(partitions(), max_size=2)}),
        "metrics": some.fixed_dictionaries({}, optional={"tls": some.fixed_dictionaries({}, optional=TLS)}),
    },
)


def reasons(document: dict[str, Any]) -> list[str]:
    """Why the agent refuses a document; none where it takes it."""
    try:
        return [*wrong(msgspec.convert(document, Config))]
    except msgspec.ValidationError as error:
        return [str(error)]


@given(CONFIGURATIONS)
@example({"resources": [{"name": "pages", "kind": "hugepages", "pageSize": "3Mi"}]})
@example({"resources": [{"name": "m", "kind": "memory", "serve": "dra"}]})
@example({"resources": [{"name": "n", "kind": "nvmeof", "serve": "dra", "targets": [TARGET]}]})
@example({"resources": [{"name": "n", "kind": "nvmeof", "targets": [TARGET]}]})
@example({"resources": [{"name": "n", "kind": "dsa-queue", "serve": "dra"}]})
@example({"resources": [{"name": "n", "kind": "dsa-queue", "serve": "both"}]})
@example({"resources": [{"name": "n", "kind": "dsa-queue", "serve": "dra", "replicas": 2}]})
@example({"accelerators": {"dsa": [{"accelerators": ["dsa0"], "queues": [{"size": 8, "mode": "shared"}]}]}})
@example({"accelerators": {"dsa": [{"accelerators": ["dsa0"], "queues": [{"size": 8, "mode": "dedicated"}]}]}})
@example({"accelerators": {"dsa": [{"accelerators": [], "queues": [{"size": 8}]}]}})
@example({"resources": [{"name": "n", "kind": "nvmeof", "serve": "dra", "targets": [TARGET], "replicas": 2}]})
@example({"metrics": {"tls": {"clientCaFile": "/a"}}})
@example({"amd": {"partitions": [{"gpus": ["*"], "compute": None}]}})
@example({"amd": {"partitions": [{"gpus": ["*"], "memory": "NPS1"}]}})
def test_the_schema_and_the_agent_refuse_the_same(document: dict[str, Any]) -> None:
    said = [one for one in reasons(document) if not any(more in one for more in BEYOND)]
    assert SCHEMA.valid(document) == (not said), said


def test_each_rule_of_a_kind_is_among_what_is_tried() -> None:
    assert {*MEANT_FOR, *ONLY_DEVICES, *(key for key, _ in NEEDED.values())} <= VALUES.keys()
    assert {kind for kinds in MEANT_FOR.values() for kind in kinds} <= {*KINDS}


@pytest.mark.parametrize("kind", [one.name for one in builtin_kinds()])
def test_a_plain_resource_of_every_kind_is_good(kind: str) -> None:
    needed = {
        "char": {"paths": ["/dev/x"]},
        "usb": {"usb": [{"vendor": "1d6b"}]},
        "nvmeof": {"serve": "dra", "targets": [TARGET]},
        "dsa-queue": {"serve": "dra"},
    }.get(kind, {})
    assert SCHEMA.valid({"resources": [{"name": kind, "kind": kind, **needed}]})


def test_the_defaults_are_good_also_when_they_are_written_out() -> None:
    assert SCHEMA.valid({})
    written = msgspec.to_builtins(Config())
    assert SCHEMA.valid({**written, "resources": msgspec.to_builtins(list(DEFAULT_RESOURCES))})


def test_page_sizes_are_those_that_the_agent_takes() -> None:
    for text in page_sizes():
        parse(json.dumps({"hugepages": [{"pageSize": text, "node": 0}]}), source="here")
    for text in ("8Ki", "32Gi", "24Ki", "3Gi"):
        assert text not in page_sizes()
        with pytest.raises(ConfigError, match="expected a size that pages have"):
            parse(json.dumps({"hugepages": [{"pageSize": text, "node": 0}]}), source="here")


def test_the_conditions_leave_the_shape_as_it_is() -> None:
    assert json_schema()["$defs"].keys() == schema()["$defs"].keys()
    for name, form in schema()["$defs"].items():
        assert json_schema()["$defs"][name]["properties"].keys() == form["properties"].keys()
