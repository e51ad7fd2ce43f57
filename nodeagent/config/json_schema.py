"""The JSON schema of the configuration, with those rules of validate.py that a JSON schema can express.

Editors and the Helm chart check a configuration with it before any agent reads it. The other rules compare several
entries, numbers or lengths in bytes, and are left to `nodeagent config check` and to the agent. Draft 7, with patterns
that Go can read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from nodeagent.config.base import LONGEST_DOMAIN
from nodeagent.config.hugepages import LARGEST_PAGE_BYTES, SMALLEST_PAGE_BYTES
from nodeagent.config.resources import ResourceConfig
from nodeagent.config.schema import schema
from nodeagent.config.validate import IO_LIMITS, MEANT_FOR, NEEDED, ONLY_DEVICES, POOL_NAME, TOPOLOGY_KINDS

Form = dict[str, Any]
_UNITS = {"Ki": 10, "Mi": 20, "Gi": 30}
_FILLED: Form = {"minLength": 1}
_WITHOUT_CGROUPS = {"resctrl": None, "io": None, "uclamp": None}
"""What is not configured where nothing is written to control groups."""


def json_schema() -> Form:
    """Return the schema as of `schema()`, with the conditions."""
    found = schema()
    forms = found["$defs"]
    forms["ResourceConfig"]["allOf"] = [*_of_resources()]
    forms["ResourceConfig"]["properties"]["name"]["not"] = {"pattern": _foreign_domain("/")}
    forms["ResourceConfig"]["properties"]["paths"]["items"]["not"] = {"pattern": r"/\.\.(/|$)"}
    forms["Config"]["properties"]["domain"] |= {
        "maxLength": LONGEST_DOMAIN,
        "not": {"pattern": _foreign_domain("$")},
    }
    forms["HugepagesConfig"]["properties"]["pageSize"]["enum"] = page_sizes()
    forms["OverheadConfig"]["anyOf"] = [_given(key) for key in ("perPod", "perContainer")]
    forms["AmdPartitionConfig"]["anyOf"] = [_chosen(key) for key in ("compute", "memory")]
    forms["DsaQueuesConfig"]["properties"]["mode"]["enum"] = ["dedicated"]
    forms["MigConfig"] |= {"if": _one_of("mode", ["dynamic"]), "else": _silent({"gpus": []})}
    parts = [[level, f"{level}{part}"] for level in ("L3", "L2") for part in ("CODE", "DATA")]
    forms["ResctrlClassConfig"]["properties"]["caches"]["not"] = {"anyOf": [{"required": two} for two in parts]}
    forms["PinningConfig"] |= {"if": _one_of("mode", ["off"]), "then": _silent(_WITHOUT_CGROUPS)}
    forms["IoClassConfig"]["anyOf"] = [_chosen(key) for key in IO_LIMITS]
    forms["UclampClassConfig"]["anyOf"] = [_chosen(key) for key in ("min", "max")]
    forms["NvmeTargetConfig"] |= {
        "if": _given("dhchapSecretFile"),
        "else": _silent({"dhchapCtrlSecretFile": ""}),
    }
    forms["MetricsTlsConfig"] |= {
        "if": _given("certFile"),
        "then": _given("keyFile"),
        "else": _silent({"keyFile": "", "clientCaFile": ""}),
    }
    return found


def page_sizes() -> list[str]:
    """Return every way to write a size that pages of some processor have, such as 2048Ki and 2Mi."""
    every = range(SMALLEST_PAGE_BYTES.bit_length() - 1, LARGEST_PAGE_BYTES.bit_length())
    return [f"{1 << bits - shift}{unit}" for unit, shift in _UNITS.items() for bits in every if bits >= shift]


def _foreign_domain(end: str) -> str:
    """Return what matches a domain that is no domain of the admin's, up to `end`: Kubernetes' own, or too long."""
    too_long = f"|^[^/]{{{LONGEST_DOMAIN + 1},}}/" if end == "/" else ""
    return f"^[^/]*kubernetes\\.io{end}|^requests\\.[^/]*{end}{too_long}"


def _of_resources() -> Iterator[Form]:
    """Yield the rules of one resource."""
    defaults = msgspec.to_builtins(ResourceConfig(name="a", kind="a"))
    for key, kinds in MEANT_FOR.items():
        yield {"if": _one_of("kind", kinds), "else": _silent({key: defaults[key]})}
    yield {"if": _one_of("kind", TOPOLOGY_KINDS), "then": _silent({key: defaults[key] for key in ONLY_DEVICES})}
    for kind, (key, _) in NEEDED.items():
        yield {"if": _one_of("kind", [kind]), "then": {"required": [key], "properties": {key: {"minItems": 1}}}}
    yield {"if": _one_of("kind", ["memory"]), "then": _one_of("serve", ["dra"])}
    shared = {"allOf": [_one_of("serve", ["dra"]), _silent({"replicas": 1, "overhead": {}})]}
    yield {"if": _one_of("kind", ["nvmeof"]), "then": shared}
    made = {"allOf": [_one_of("serve", ["dra"]), _silent({"replicas": 1})]}
    yield {"if": _one_of("kind", ["dsa-queue"]), "then": made}
    dynamic = {"required": ["mig"], "properties": {"mig": _one_of("mode", ["dynamic"])}}
    yield {"if": dynamic, "then": {"allOf": [_one_of("serve", ["dra"]), _silent({"replicas": 1})]}}
    yield {"if": _one_of("kind", ["hugepages"]), "then": _one_of("pageSize", page_sizes())}
    yield {
        "if": _one_of("serve", ["dra", "both"]),
        "then": {"properties": {"kind": {"pattern": f"^{POOL_NAME}$"}}},
        "else": _silent({"overhead": {}}),
    }


def _one_of(key: str, values: Iterable[str]) -> Form:
    return {"required": [key], "properties": {key: {"enum": [*values]}}}


def _given(key: str) -> Form:
    """Return the form of an object with a text that is not empty."""
    return {"required": [key], "properties": {key: _FILLED}}


def _chosen(key: str) -> Form:
    """Return the form of an object that gives a value, and not null."""
    return {"required": [key], "properties": {key: {"not": {"const": None}}}}


def _silent(defaults: Mapping[str, Any]) -> Form:
    """Return the form of an object that gives no other values than these defaults; of a part with keys of its own, in
    each of these."""
    return {"properties": {key: _only(value) for key, value in defaults.items()}}


def _only(default: Any) -> Form:
    return _silent(default) if isinstance(default, dict) and default else {"const": default}
