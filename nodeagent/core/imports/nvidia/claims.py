"""ResourceClaims, ResourceClaimTemplates and DeviceClasses for NVIDIA's DRA driver, rewritten for the agent."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nodeagent.core.imports.findings import Finding, Said, State, shown
from nodeagent.core.imports.nvidia import parameters as opaque

DRIVER, OWN_DRIVER = "gpu.nvidia.com", "nodeagent.dev"
GROUP, CLAIM, TEMPLATE, CLASS = "resource.k8s.io/", "ResourceClaim", "ResourceClaimTemplate", "DeviceClass"
VFIO = "vfio.gpu.nvidia.com"
CLASSES = {
    "gpu.nvidia.com": "gpu.nodeagent.dev",
    "mig.nvidia.com": "gpu-part.nodeagent.dev",
    VFIO: "gpu.nodeagent.dev",
}
"""The chart's classes, and those in deploy/deviceclasses.yaml."""
ATTRIBUTES = {
    "uuid": "uuid",
    "productName": "productName",
    "profile": "migProfile",
    "parentUUID": "parentUUID",
    "numa": "numaNode",
}
CAPACITIES = {"memory": "memory"}
_MINE = f'["{OWN_DRIVER}"]'
_TYPES = {
    kind: f"{'' if kind == 'mig' else '!'}has(device.attributes{_MINE}.parent)" for kind in ("gpu", "mig", "vfio")
}
_QUOTED = r"""\[\s*(?:"gpu\.nvidia\.com"|'gpu\.nvidia\.com')\s*\]"""
_TYPE = re.compile(rf"""device\.attributes{_QUOTED}\.type\s*==\s*["'](gpu|mig|vfio)["']""")
_FIELD = re.compile(rf"device\.(attributes|capacity){_QUOTED}\.([A-Za-z_][A-Za-z0-9_]*)")
_DRIVER = re.compile(r"""device\.driver\s*==\s*["']gpu\.nvidia\.com["']""")
Object = Mapping[str, Any]


def is_for_nvidia(one: Object) -> bool:
    """Return whether an object is a claim, a template or a class, or another object of NVIDIA's driver."""
    version = str(one.get("apiVersion", ""))
    of_claims = version.startswith(GROUP) and one.get("kind") in (CLAIM, TEMPLATE, CLASS)
    return of_claims or version == opaque.API_VERSION


def rewrite(one: Object, where: str) -> tuple[dict[str, Any], list[Finding]]:
    """Return an object for the agent, and what becomes of what is NVIDIA's in it. Other parts stay as they are.

    where: begins the place of each finding. Raise InputError for parameters that NVIDIA's driver refuses.
    """
    made = copy.deepcopy(dict(one))
    if made.get("apiVersion") == opaque.API_VERSION:
        why = "domains of several nodes are made by NVIDIA's controller (docs/gpu.md)"
        return made, [Finding(where + "$.kind", shown(made.get("kind")), Said(State.LOST, why=why))]
    if made["kind"] == CLASS:
        spec = _mapping(made.get("spec"))
        found = [*_selectors(spec, f"{where}$.spec"), *_configs(spec, [], f"{where}$.spec")]
        return made, found
    path = "$.spec" if made["kind"] == CLAIM else "$.spec.spec"
    spec = _mapping(made.get("spec"))
    spec = _mapping(spec.get("spec")) if made["kind"] == TEMPLATE else spec
    devices = _mapping(spec.get("devices"))
    return made, [*_devices(devices, f"{where}{path}.devices")]


def _devices(devices: dict[str, Any], where: str) -> Iterator[Finding]:
    requests = [one for one in _list(devices.get("requests")) if isinstance(one, dict)]
    guests: list[str] = []
    for i, request in enumerate(requests):
        for path, ask in _asks(request):
            at = f"{where}.requests[{i}]{path}"
            if ask["deviceClassName"] == VFIO:
                guests.append(str(request.get("name", "")))
            yield from _class(ask, at)
            yield from _selectors(ask, at)
    for i, rule in enumerate(_list(devices.get("constraints"))):
        for key in ("matchAttribute", "distinctAttribute"):
            if isinstance(rule, dict) and str(rule.get(key, "")).startswith(f"{DRIVER}/"):
                yield _constraint(rule, key, f"{where}.constraints[{i}].{key}")
    configured = {name for one in _list(devices.get("config")) for name in _names(one, requests)}
    yield from _configs(devices, requests, where)
    yield from _guests(devices, [one for one in guests if one not in configured], where)


def _asks(request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a request asks for, with the path below it: resource.k8s.io/v1 and v1beta2, and v1beta1."""
    alternatives = ((f".firstAvailable[{i}]", one) for i, one in enumerate(_list(request.get("firstAvailable"))))
    for path, ask in (("", request), (".exactly", request.get("exactly")), *alternatives):
        if isinstance(ask, dict) and isinstance(ask.get("deviceClassName"), str):
            yield path, ask


def _class(ask: dict[str, Any], where: str) -> Iterator[Finding]:
    name = ask["deviceClassName"]
    if name in CLASSES:
        ask["deviceClassName"] = CLASSES[name]
        yield Finding(f"{where}.deviceClassName", name, Said(State.TRANSLATED, CLASSES[name]))
    elif name.endswith(".nvidia.com"):
        why = "the agent has no such class; IMEX channels are devices of kind imex (docs/gpu.md)"
        yield Finding(f"{where}.deviceClassName", name, Said(State.LOST, why=why))


def _selectors(ask: dict[str, Any], where: str) -> Iterator[Finding]:
    for i, one in enumerate(_list(ask.get("selectors"))):
        cel = _mapping(one.get("cel")) if isinstance(one, dict) else {}
        text = cel.get("expression")
        if not isinstance(text, str) or "nvidia.com" not in text:
            continue
        cel["expression"], missing = expression(text)
        said = Said(State.TRANSLATED, cel["expression"])
        if missing:
            said = Said(State.LOST, why=f"the agent publishes no {', '.join(missing)}: write a new expression")
        yield Finding(f"{where}.selectors[{i}].cel.expression", shown(text), said)


def expression(text: str) -> tuple[str, list[str]]:
    """Return a CEL expression about the agent's devices, and what it names that the agent does not publish; if it names
    any, the expression is returned as it is."""
    missing: list[str] = []

    def field(found: re.Match[str]) -> str:
        known = ATTRIBUTES if found[1] == "attributes" else CAPACITIES
        if found[2] not in known:
            missing.append(found[2])
        return f"device.{found[1]}{_MINE}.{known.get(found[2], found[2])}"

    made = _TYPE.sub(lambda found: _TYPES[found[1]], text)
    made = _FIELD.sub(field, _DRIVER.sub(f'device.driver == "{OWN_DRIVER}"', made))
    if "nvidia.com" in made:
        missing.append("nvidia.com")
    return (text, list(dict.fromkeys(missing))) if missing else (made, [])


def _constraint(rule: dict[str, Any], key: str, where: str) -> Finding:
    before = rule[key]
    name = ATTRIBUTES.get(before.partition("/")[2])
    if name is None:
        return Finding(where, before, Said(State.LOST, why="the agent publishes no such attribute"))
    rule[key] = f"{OWN_DRIVER}/{name}"
    return Finding(where, before, Said(State.TRANSLATED, rule[key]))


def _configs(holder: dict[str, Any], requests: Sequence[dict[str, Any]], where: str) -> Iterator[Finding]:
    """Rewrite the configurations of a claim or a class."""
    for i, one in enumerate(_list(holder.get("config"))):
        found = _mapping(one.get("opaque")) if isinstance(one, dict) else {}
        driver, at = str(found.get("driver", "")), f"{where}.config[{i}].opaque"
        if not driver.endswith("nvidia.com"):
            continue
        given = _mapping(found.get("parameters"))
        made, said = opaque.translate(given, _count(_names(one, requests), requests), f"{at}.parameters")
        if made:
            found["driver"], found["parameters"] = OWN_DRIVER, made
            yield Finding(f"{at}.driver", driver, Said(State.TRANSLATED, OWN_DRIVER))
        else:
            yield Finding(f"{at}.driver", driver, Said(State.LOST, why="its parameters are for NVIDIA's driver alone"))
        yield from said


def _guests(devices: dict[str, Any], guests: Iterable[str], where: str) -> Iterator[Finding]:
    """Configure the requests for a virtual machine's devices that say so by their class alone."""
    names = list(dict.fromkeys(guests))
    if not names:
        return
    made = {"apiVersion": opaque.OWN_API_VERSION, "kind": opaque.OWN_KIND, "driver": opaque.VFIO_DRIVER}
    if devices.get("config") is None:
        devices["config"] = []
    config = devices["config"]
    if isinstance(config, list):
        config.append({"requests": names, "opaque": {"driver": OWN_DRIVER, "parameters": made}})
        to = f"config[{len(config) - 1}]: driver: {opaque.VFIO_DRIVER}"
        yield Finding(f"{where}.config", "", Said(State.TRANSLATED, to, f"{VFIO} is for virtual machines"))


def _names(config: Any, requests: Sequence[dict[str, Any]]) -> list[str]:
    """Return the requests that a configuration is for: all if it names none."""
    named = [str(one) for one in _list(config.get("requests"))] if isinstance(config, dict) else []
    return [one.partition("/")[0] for one in named] or [str(one.get("name", "")) for one in requests]


def _count(names: Sequence[str], requests: Sequence[dict[str, Any]]) -> int | None:
    """Return how many devices some requests are for, or None if that is not known."""
    total = 0
    for request in requests:
        if str(request.get("name", "")) not in names:
            continue
        asks = [ask for _, ask in _asks(request)]
        if len(asks) != 1 or asks[0].get("allocationMode", "ExactCount") != "ExactCount":
            return None
        count = asks[0].get("count", 1)
        total += count if isinstance(count, int) else 1
    return total or None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
