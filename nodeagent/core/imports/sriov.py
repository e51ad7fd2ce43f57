"""The configuration of the SR-IOV network device plugin as one of the agent.

Source: sriov-network-device-plugin, README ("Configurations"), pkg/types (keys), pkg/resources/deviceSelectors.go (what
they select), pkg/netdevice and pkg/auxnetdevice (in which order, and what is left out anyway). What cannot be expressed
is named, and never served more widely than before: a selector with such a key is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from nodeagent.core.imports.findings import Finding, Said, State, Translation, shown
from nodeagent.core.network.variables import ANY_DEVICE
from nodeagent.errors import InputError

DEVICE_INFO_DIR = "/var/run/k8s.cni.cncf.io/devinfo/dp"
NET, ACCELERATOR, AUX = "netDevice", "accelerator", "auxNetDevice"
KINDS = {NET: "nic", ACCELERATOR: "accel", AUX: "nic"}
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_INDEX = re.compile(r"[0-9]{1,9}", re.ASCII)
MOST_INDEX = 1023
_ONLY_SCALABLE = "of auxiliary devices only scalable functions (sf) are devices of their own"
Match = dict[str, str | list[str]]


def translate(document: Any, prefix: str) -> Translation:
    """Return the agent's form of a configuration. prefix: the plugin's --resource-prefix.

    Raise InputError if it is none, or the plugin itself would refuse it.
    """
    every = document.get("resourceList") if isinstance(document, dict) else None
    if not isinstance(every, list):
        raise InputError("cannot read it as a configuration of the SR-IOV plugin: expected an object with resourceList")
    findings = [_unknown(f"$.{key}", value) for key, value in document.items() if key != "resourceList"]
    resources, names = [], set[str]()
    for i, one in enumerate(every):
        made = _Resource(one, f"$.resourceList[{i}]", prefix)
        if made.name in names:
            raise InputError(f"cannot translate {made.where}: {made.name} stands twice")
        names.add(made.name)
        resource = made.translated()
        findings += made.findings
        if resource is not None:
            resources.append(resource)
    config: dict[str, Any] = {"network": {"deviceInfoDir": DEVICE_INFO_DIR}, "resources": resources}
    return Translation(tuple(findings), config)


class _Resource:
    """One entry of resourceList."""

    def __init__(self, said: Any, where: str, prefix: str) -> None:
        self.findings: list[Finding] = []
        self.where = where
        if not isinstance(said, dict) or not _NAME.fullmatch(str(said.get("resourceName", ""))):
            raise InputError(f"cannot translate {where}: expected a resourceName of letters, digits, _ and -")
        self._said = said
        self._type = said.get("deviceType") or NET
        if not isinstance(self._type, str) or self._type not in KINDS:
            raise InputError(
                f"cannot translate {where}: unknown deviceType {self._type!r}, expected {', '.join(KINDS)}"
            )
        self.name = f"{said.get('resourcePrefix') or prefix}/{said['resourceName']}"

    def translated(self) -> dict[str, Any] | None:
        """Return the resource, or None if nothing of it can be served as before."""
        self._say("resourceName", State.TRANSLATED, f"name: {self.name}")
        if self._said.get("resourcePrefix"):
            self._say("resourcePrefix", State.TRANSLATED, f"name: {self.name}")
        if self._said.get("deviceType"):
            self._say_type()
        if self._said.get("excludeTopology"):
            self._say("excludeTopology", State.LOST, why="kubelet always learns the device's NUMA node")
        known = {"resourceName", "resourcePrefix", "deviceType", "excludeTopology", "selectors", "additionalInfo"}
        self.findings += [_unknown(f"{self.where}.{key}", said) for key, said in self._said.items() if key not in known]
        info = self._info(self._said.get("additionalInfo"))
        selectors = self._selectors()
        matches = [match for one in selectors for match in one.matches()]
        self.findings += [finding for one in selectors for finding in one.findings]
        if not matches:
            self._say_nothing(selectors)
            return None
        matched = {"match": matches[0]} if len(matches) == 1 else {"matchAny": matches}
        made: dict[str, Any] = {"name": self.name, "kind": KINDS[self._type], **matched}
        return {**made, **self._vhost(selectors), **({"additionalInfo": info} if info else {})}

    def _say_nothing(self, selectors: list[_Selector]) -> None:
        state, why = State.LOST, "none of its selectors can be expressed"
        if not selectors:
            why = "it has no selectors, and the plugin skips it"
        elif not any(one.lost for one in selectors):
            state, why = State.BUILT_IN, "its selectors select nothing"
        self._say("selectors", state, why=f"the resource is left out: {why}")

    def _say_type(self) -> None:
        if self._type == ACCELERATOR:
            why = "of class 12; functions with an FPGA manager have the kind fpga, GPUs the kind gpu"
            self._say("deviceType", State.PARTLY, "kind: accel", why)
        elif self._type == AUX and not all(one.types for one in self._selectors()):
            self._say("deviceType", State.PARTLY, "kind: nic", _ONLY_SCALABLE)
        else:
            self._say("deviceType", State.TRANSLATED, "kind: nic")

    def _selectors(self) -> list[_Selector]:
        said, where = self._said.get("selectors"), f"{self.where}.selectors"
        every = said if isinstance(said, list) else [] if said is None else [said]
        places = [f"{where}[{i}]" for i in range(len(every))] if isinstance(said, list) else [where]
        return [_Selector(one, self._type, place) for one, place in zip(every, places, strict=False)]

    def _vhost(self, selectors: list[_Selector]) -> dict[str, bool]:
        wanted = [one for one in selectors if one.vhost_net]
        for one in wanted:
            alike = len(wanted) == len(selectors)
            why = "" if alike else "containers of all selectors of the resource get the nodes"
            state = State.TRANSLATED if alike else State.PARTLY
            self.findings.append(Finding(f"{one.where}.needVhostNet", "true", Said(state, "vhostNet", why)))
        return {"vhostNet": True} if wanted else {}

    def _info(self, said: Any) -> dict[str, dict[str, str]]:
        if said is None:
            return {}
        if not isinstance(said, dict):
            raise InputError(f"cannot translate {self.where}.additionalInfo: expected an object")
        found: dict[str, dict[str, str]] = {}
        for key, values in said.items():
            texts = isinstance(values, dict) and all(isinstance(one, str) for one in (*values, *values.values()))
            if texts and isinstance(key, str) and (key == ANY_DEVICE or _ADDRESS.fullmatch(key)):
                found[key] = values
                self._say(f"additionalInfo.{key}", State.TRANSLATED, "additionalInfo", value=values)
            else:
                why = "expected * or a PCI address, with texts"
                self._say(f"additionalInfo.{key}", State.LOST, why=why, value=values)
        return found

    def _say(self, key: str, state: State, to: str = "", why: str = "", value: Any = None) -> None:
        text = shown(self._said.get(key) if value is None else value)
        self.findings.append(Finding(f"{self.where}.{key}", text, Said(state, to, why)))


class _Selector:
    """One object of selectors: its keys all have to hold."""

    def __init__(self, said: Any, type: str, where: str) -> None:
        if not isinstance(said, dict):
            raise InputError(f"cannot translate {where}: expected an object")
        self.where = where
        self.findings: list[Finding] = []
        self._said = said
        self._type = type
        self.lost = False
        self.types = bool(said.get("auxTypes"))
        self.vhost_net = said.get("needVhostNet") is True and type != ACCELERATOR

    def matches(self) -> list[Match]:
        """Return the patterns of which one has to match; none if the selector cannot be expressed."""
        common: Match = {}
        for key in self._said:
            self._take(key, common)
        owners = [self._owners(key, name) for key, name in (("pfNames", "pf_name"), ("rootDevices", "parent"))]
        if self.lost:
            return []
        base = _base(self._type)
        if not any(owners):
            return [{**base, **common}]
        some = [one for a in owners[0] or [{}] for b in owners[1] or [{}] if (one := _joined(a, b)) is not None]
        if not some:
            self._say("rootDevices", State.BUILT_IN, why="it selects nothing: no index is in both this and pfNames")
        base = {"sriov": "vf"} if self._type == NET else base
        return [{**base, **common, **one} for one in some]

    def _take(self, key: str, match: Match) -> None:
        said, form = self._said[key], _KEYS.get(key)
        if key in ("pfNames", "rootDevices", "needVhostNet") and self._type != ACCELERATOR:
            return
        if form is None or self._type not in form.types:
            self._say(key, State.UNKNOWN, why="the plugin has no such key for this deviceType, and ignores it")
        elif said in (None, [], "", False):
            self._say(key, State.BUILT_IN, why="it asks for nothing")
        elif not form.field:
            self._lose(key, form.why)
        elif key == "isRdma":
            match["rdma"] = "?*"
            self._say(key, State.TRANSLATED, "rdma: a name", "")
        elif key == "auxTypes":
            self._take_types(_texts(said, f"{self.where}.{key}"))
        else:
            texts = _texts(said, f"{self.where}.{key}")
            values = [_literal(one.lower() if form.lower else one) for one in texts]
            match[form.field] = values[0] if len(values) == 1 else values
            self._say(key, State.TRANSLATED, form.field)

    def _take_types(self, types: list[str]) -> None:
        if types == ["sf"]:
            self._say("auxTypes", State.TRANSLATED, "auxiliary")
        elif "sf" in types:
            self._say("auxTypes", State.PARTLY, "auxiliary", _ONLY_SCALABLE)
        else:
            self._lose("auxTypes", _ONLY_SCALABLE)

    def _owners(self, key: str, field: str) -> list[Match]:
        """Return the patterns of functions of each physical function that is named."""
        if not self._said.get(key) or self._type == ACCELERATOR:
            return []
        found: dict[str, Match] = {}
        for text in _texts(self._said[key], f"{self.where}.{key}"):
            name, hash, ranges = text.partition("#")
            if name.lower() in found:
                self._say(key, State.BUILT_IN, why=f"{text}: the plugin takes the first entry of a function alone")
                continue
            found[name.lower()] = {field: _literal(name.lower() if field == "parent" else name)}
            if hash and self._type == AUX:
                self._lose(key, f"{text}: numbers of scalable functions cannot be selected")
            elif hash:
                found[name.lower()]["vf_index"] = _indexes(ranges, f"{self.where}.{key}")
        if not self.lost:
            self._say(key, State.TRANSLATED, f"{field}, vf_index" if self._type == NET else field)
        return list(found.values())

    def _lose(self, key: str, why: str) -> None:
        self.lost = True
        self._say(key, State.LOST, why=f"the selector is left out: {why}")

    def _say(self, key: str, state: State, to: str = "", why: str = "") -> None:
        self.findings.append(Finding(f"{self.where}.{key}", shown(self._said[key]), Said(state, to, why)))


class _Key(msgspec.Struct, frozen=True):
    """A key of a selector. field: of a device, or "" if there is none; lower: whether case does not count."""

    field: str
    types: tuple[str, ...] = (NET, ACCELERATOR, AUX)
    lower: bool = False
    why: str = ""


_KEYS: Mapping[str, _Key] = {
    "vendors": _Key("vendor", lower=True),
    "devices": _Key("device", lower=True),
    "drivers": _Key("driver"),
    "pciAddresses": _Key("pci_address", (NET, ACCELERATOR), lower=True),
    "acpiIndexes": _Key("acpi_index", (NET, AUX)),
    "linkTypes": _Key("link_type", (NET, AUX)),
    "isRdma": _Key("rdma", (NET, AUX)),
    "auxTypes": _Key("auxiliary", (AUX,)),
    "ddpProfiles": _Key("", (NET,), why="no attribute has the DDP profile that a function's firmware runs"),
    "pKeys": _Key("", (NET,), why="no attribute has the partition keys of InfiniBand"),
    "vdpaType": _Key("", (NET,), why="vDPA devices are of the kind vdpa, with attributes of their own"),
}


def _base(type: str) -> Match:
    """Return what the plugin selects of a device type without any selector: no physical function that has virtual ones,
    and no other kind of function."""
    if type == AUX:
        return {"id": "*/*", "auxiliary": "*.sf.*"}
    return {"id": "*:??:??.?", "sriov_numvfs": ["", "0"]} if type == NET else {"pci_class": "12*"}


def _joined(a: Match, b: Match) -> Match | None:
    """Return patterns that match what both match, or None if nothing does: of indices that both list, those in both."""
    if "vf_index" not in a or "vf_index" not in b:
        return {**a, **b}
    both = [one for one in a["vf_index"] if one in b["vf_index"]]
    return {**a, **b, "vf_index": both} if both else None


def _indexes(text: str, where: str) -> list[str]:
    found: dict[int, None] = {}
    for part in text.split(","):
        ends = part.split("-")
        numbers = [int(one) for one in ends if _INDEX.fullmatch(one)]
        if not (len(numbers) == len(ends) <= 2 and numbers == sorted(numbers) and numbers[-1] <= MOST_INDEX):
            raise InputError(f"cannot translate {where}: {part!r} is no index or range up to {MOST_INDEX}")
        found |= dict.fromkeys(range(numbers[0], numbers[-1] + 1))
    return [str(one) for one in found]


def _literal(text: str) -> str:
    """Return a shell pattern that matches a text alone."""
    return re.sub(r"([*?\[])", r"[\1]", text)


def _texts(said: Any, where: str) -> list[str]:
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise InputError(f"cannot translate {where}: expected a list of texts")
    return said


def _unknown(place: str, value: Any) -> Finding:
    return Finding(place, shown(value), Said(State.UNKNOWN, why="the plugin has no such key"))
