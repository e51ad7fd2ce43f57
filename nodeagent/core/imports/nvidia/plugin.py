"""The configuration file of NVIDIA's device plugin, version v1, as resources of the agent.

Source of the format and of its meaning: NVIDIA/k8s-device-plugin, api/config/v1 and internal/rm. The plugin reads names
and patterns of resources, `rename` and `devices` and does not use them (DisableResourceNamingInConfig); they are used
here on demand (`as_written`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from nodeagent.core.imports.findings import (
    NOT_SET,
    Finding,
    Rule,
    Said,
    State,
    Translation,
    findings,
    switch,
)
from nodeagent.core.imports.nvidia.common import DRIVER_ROOT, INSTANCES, VENDOR, WHOLE, driver_root
from nodeagent.core.imports.nvidia.plugin_keys import AS_MANY, FLAGS, MANY, SHARING
from nodeagent.errors import InputError

DOMAIN, SHARED = "nvidia.com", ".shared"
MOST_REPLICAS, LONGEST_NAME = 1024, 63
NO_NAMES = Said(State.BUILT_IN, why="there are none")
IGNORED = "NVIDIA's plugin warns that it does not use it yet; --as-written does"
CLASS_DOMAIN, OPAQUE = "nodeagent.dev", "nodeagent.dev/v1alpha1"


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    """Base of the parts of the format that decide which resources there are. The other keys have no types here."""


class _Entry(_Part, frozen=True):
    name: str
    replicas: Annotated[int, msgspec.Meta(ge=2)]
    rename: str = ""
    devices: Literal["all"] | Annotated[int, msgspec.Meta(ge=1)] | list[str | int] = "all"


class _Shared(_Part, frozen=True):
    resources: Annotated[list[_Entry], msgspec.Meta(min_length=1)]
    rename_by_default: bool = False
    fail_requests_greater_than_one: bool | None = None


class _Sharing(_Part, frozen=True):
    time_slicing: _Shared | None = None
    mps: _Shared | None = None


class _Flags(_Part, frozen=True):
    mig_strategy: Literal["none", "single", "mixed"] | None = None
    nvidia_driver_root: str | None = None


class _Named(_Part, frozen=True):
    pattern: str
    name: str


class _Resources(_Part, frozen=True):
    gpus: list[_Named] | None = None
    mig: list[_Named] | None = None


class _Imex(msgspec.Struct, frozen=True):
    channels: list[int] | None = msgspec.field(name="channelIDs", default=None)


class _File(_Part, frozen=True):
    version: Literal["v1", ""] = "v1"
    flags: _Flags | None = None
    resources: _Resources | None = None
    sharing: _Sharing | None = None
    imex: _Imex | None = None


def is_plugin_config(document: Mapping[str, Any]) -> bool:
    """Return whether a document is such a file."""
    named = document.get("resources")
    of_resources = isinstance(named, Mapping) and isinstance(named.get("gpus", named.get("mig")), list)
    return "kind" not in document and (of_resources or bool(document.keys() & {"version", "flags", "sharing", "imex"}))


def translate(
    document: Mapping[str, Any], *, profiles: Sequence[str] = (), as_written: bool = False, where: str = ""
) -> Translation:
    """Return the agent's form of such a file. Raise InputError for what NVIDIA's plugin does not start with either.

    profiles: of the MIG instances of the node. as_written: use what NVIDIA's plugin reads and ignores. where: begins
    the place of each finding.
    """
    try:
        file = msgspec.convert(document, _File)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise InputError(f"cannot read {where or 'the configuration'}: {error}") from None
    plan = _Plan(file, profiles, as_written)
    return Translation((*findings(document, plan.rules(), plan.decided, where), *plan.further(where)), *plan.written())


class _Plan(msgspec.Struct):
    """One file while it is translated. decided: what is known of single paths."""

    file: _File
    profiles: Sequence[str]
    as_written: bool
    decided: dict[str, Said] = msgspec.field(default_factory=dict)
    served: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    """Resources by name."""
    objects: list[Mapping[str, Any]] = msgspec.field(default_factory=list)

    def __post_init__(self) -> None:
        self._serve()
        self._share()
        self._channels()

    @property
    def strategy(self) -> str:
        return (self.file.flags or _Flags()).mig_strategy or "none"

    # ---------------------------------------------------------------- resources

    def _serve(self) -> None:
        named = self.file.resources or _Resources()
        gpus, migs = named.gpus or [], named.mig or []
        if self.as_written and gpus:
            self._serve_named("gpus", gpus, "product", {**WHOLE})
        else:
            self._ignore_named("gpus", gpus)
            whole = {"vendor": VENDOR, "uuid": "?*"} if self.strategy == "single" else WHOLE
            self._add(f"{DOMAIN}/gpu", whole)
        if self.as_written and migs and self.strategy != "none":
            self._serve_named("mig", migs, "mig_profile", {"vendor": VENDOR})
            return
        self._ignore_named("mig", migs)
        if self.strategy == "mixed":
            for profile in dict.fromkeys(self.profiles):
                self._add(f"{DOMAIN}/mig-{profile.replace('+', '.')}", {**INSTANCES, "mig_profile": _literal(profile)})

    def _add(self, name: str, match: Mapping[str, str]) -> bool:
        if name in self.served or not _is_name(name):
            return False
        self.served[name] = {"name": name, "kind": "gpu", "match": dict(match)}
        return True

    def _serve_named(self, key: str, named: Sequence[_Named], attribute: str, match: Mapping[str, str]) -> None:
        before: list[str] = []
        for i, one in enumerate(named):
            path, name = f"$.resources.{key}[{i}]", full_name(one.name)
            also = [other for other in before if may_both_match(other, one.pattern)]
            before.append(one.pattern)
            if not self._add(name, {**match, attribute: _shell(one.pattern)}):
                why = f"there is a resource {name} already, and one resource has one pattern"
                why = why if name in self.served else f"{name} is no name of a resource"
                self.decided[path] = Said(State.LOST, why=why)
            elif also:
                why = f"what fits {also[0]!r} as well is offered under both names, and granted once"
                self.decided[path] = Said(State.PARTLY, f"resources: {name}", why)
            else:
                self.decided[path] = Said(State.TRANSLATED, f"resources: {name}")
        if not any(set(one) <= {"*"} and one for one in before):
            self.decided[f"$.resources.{key}"] = Said(State.LOST)

    def _ignore_named(self, key: str, named: Sequence[_Named]) -> None:
        if named:
            why = IGNORED
            if key == "mig" and self.as_written:
                why = "with migStrategy none the plugin offers no instances"
            self.decided[f"$.resources.{key}"] = Said(State.IGNORED, why=why)

    # ---------------------------------------------------------------- sharing

    @property
    def _active(self) -> tuple[str, _Shared] | None:
        """The way of sharing that counts: MPS wherever it is given (Sharing.ReplicatedResources)."""
        sharing = self.file.sharing or _Sharing()
        if sharing.mps is not None:
            return "mps", sharing.mps
        return ("timeSlicing", sharing.time_slicing) if sharing.time_slicing is not None else None

    def _share(self) -> None:
        if self._active is None:
            return
        way, shared = self._active
        if way == "mps":
            self.decided["$.sharing.timeSlicing"] = Said(
                State.IGNORED, why="with sharing.mps the plugin uses that alone"
            )
        # Every entry is for the resources before any is renamed.
        named, done = dict(self.served), set[str]()
        for i, entry in enumerate(shared.resources):
            path, name = f"$.sharing.{way}.resources[{i}]", full_name(entry.name)
            if name not in named:
                self.decided[path] = Said(State.IGNORED, why=f"there is no resource {name}: the plugin passes it over")
            elif name in done:
                self.decided[path] = Said(State.LOST, why=f"{name} is divided by an entry before this one")
            else:
                done.add(name)
                self._divide(path, way, shared, entry, named[name])

    def _divide(self, path: str, way: str, shared: _Shared, entry: _Entry, resource: dict[str, Any]) -> None:
        if entry.devices != "all" and self.as_written:
            why = "a resource is divided as a whole: match has no lists, numbers and exceptions of devices"
            self.decided[path] = Said(State.LOST, why=why)
            return
        if entry.devices != "all":
            self.decided[f"{path}.devices"] = Said(State.IGNORED, why=IGNORED)
        name = self._rename(path, shared, entry, resource)
        resource["replicas"] = min(entry.replicas, MOST_REPLICAS)
        to = f"resources: {name}: replicas"
        said = Said(State.TRANSLATED, to)
        if way == "mps":
            resource["serve"] = "both"
            why = (
                f"each container has 1/{resource['replicas']} of memory and compute, which is counted and not enforced;"
            )
            said = Said(State.PARTLY, to, f"{why} MPS limits claims of the class {self._mps_class(name)}")
        elif entry.replicas > MOST_REPLICAS:
            said = Said(State.PARTLY, to, f"at most {MOST_REPLICAS}")
        self.decided[f"{path}.name"] = Said(State.TRANSLATED, f"resources: {name}")
        self.decided[f"{path}.replicas"] = said

    def _rename(self, path: str, shared: _Shared, entry: _Entry, resource: dict[str, Any]) -> str:
        """Give a resource the name that it has while it is shared. Return its name."""
        old: str = resource["name"]
        usually = f"{old}{SHARED}" if shared.rename_by_default else old
        new = full_name(entry.rename) if entry.rename and self.as_written else usually
        by = f"{path}.rename" if entry.rename and self.as_written else f"$.sharing.{self._active[0]}.renameByDefault"  # type: ignore[index]
        if entry.rename and not self.as_written and full_name(entry.rename) != usually:
            self.decided[f"{path}.rename"] = Said(State.IGNORED, why=IGNORED)
        if new == old:
            return old
        if new in self.served or not _is_name(new):
            why = f"there is a resource {new} already" if new in self.served else f"{new} is no name of a resource"
            self.decided[by] = Said(State.LOST, why=f"{why}: {old} keeps its name")
            return old
        self.served = {new if name == old else name: one for name, one in self.served.items()}
        resource["name"] = new
        self.decided.setdefault(by, Said(State.TRANSLATED, f"resources: {new}"))
        return new

    def _mps_class(self, name: str) -> str:
        """Make a class for claims whose devices are this resource's, shared through MPS. Return its name."""
        short = name.partition("/")[2]
        called = f"mps-{short.lower()}.{CLASS_DOMAIN}"
        mine = f'device.attributes["{CLASS_DOMAIN}"]'
        cel = f'device.driver == "{CLASS_DOMAIN}" && {mine}.kind == "gpu" && {mine}.resource == "{short}"'
        parameters = {"apiVersion": OPAQUE, "kind": "GpuConfig", "mps": {}}
        self.objects.append(
            {
                "apiVersion": "resource.k8s.io/v1",
                "kind": "DeviceClass",
                "metadata": {"name": called},
                "spec": {
                    "selectors": [{"cel": {"expression": cel}}],
                    "config": [{"opaque": {"driver": CLASS_DOMAIN, "parameters": parameters}}],
                },
            }
        )
        return called

    def _channels(self) -> None:
        for channel in (self.file.imex or _Imex()).channels or ():
            if channel != 0:
                raise InputError(f"cannot use channel {channel} at $.imex.channelIDs: NVIDIA's plugin takes [] or [0]")
            self.served["imex"] = {
                "name": "imex",
                "kind": "imex",
                "match": {"channel": "0"},
                "replicas": MOST_REPLICAS,
            }

    # ---------------------------------------------------------------- the rest

    def rules(self) -> Mapping[str, Rule]:
        """Return what becomes of each key of the format."""
        gfd = Said(State.ELSEWHERE, "gpu-feature-discovery", "it runs without the plugin, with the flags that it has")
        way = self._active[0] if self._active is not None else ""
        return {
            **FLAGS,
            "$.flags.migStrategy": self._mig(),
            "$.flags.useNodeFeatureAPI": gfd,
            "$.flags.gfd.**": gfd,
            "$.flags.gfd": gfd,
            "$.imex.channelIDs": switch(
                Said(
                    State.PARTLY,
                    "resources: imex",
                    "NVIDIA's plugin gives the channel to every container with a GPU; here a pod asks for "
                    "nodeagent.dev/imex: 1 in addition",
                ),
                Said(State.BUILT_IN, why="there are none"),
            ),
            **{f"$.sharing.{one}.{key}": rule for one in ("timeSlicing", "mps") for key, rule in SHARING.items()},
            "$.sharing.mps.failRequestsGreaterThanOne": switch(MANY, Said(State.BUILT_IN, why=AS_MANY)),
            **{
                f"$.resources.{key}{part}": NO_NAMES
                for key in ("gpus", "mig")
                for part in ("", "[].pattern", "[].name")
            },
            f"$.sharing.{way}": NOT_SET,
        }

    def _mig(self) -> Said:
        if self.strategy == "none":
            return Said(
                State.BUILT_IN, why="instances are offered by no resource; a GPU in MIG mode is not offered whole"
            )
        if self.strategy == "single":
            return Said(
                State.TRANSLATED, f"resources: {DOMAIN}/gpu: match", "GPUs that are not in MIG mode, and instances"
            )
        named = [name for name in self.served if name.startswith(f"{DOMAIN}/mig-")]
        if named or (self.as_written and self.file.resources is not None and self.file.resources.mig):
            return Said(State.TRANSLATED, f"resources: {', '.join(named)}")
        why = "there are no instances here now: name the profiles of the node with --mig-profile"
        return Said(State.LOST, why=why)

    def further(self, where: str) -> Sequence[Finding]:
        """Return what a key decides that the file does not have."""
        found = []
        if self._active is not None and self._active[0] == "mps":
            key = "$.sharing.mps.failRequestsGreaterThanOne"
            if self._active[1].fail_requests_greater_than_one is None:
                found.append(Finding(where + key, "(true, by default)", MANY))
        for key in ("gpus", "mig"):
            if (said := self.decided.get(f"$.resources.{key}")) and said.state is State.LOST:
                what = f"{DOMAIN}/gpu" if key == "gpus" or self.strategy == "single" else f"{DOMAIN}/mig-PROFILE"
                why = f"NVIDIA's plugin has {what} for what fits none of these patterns: add a resource for it"
                found.append(Finding(f"{where}$.resources.{key}", "", Said(State.LOST, why=why)))
        return found

    def written(self) -> tuple[Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
        """Return the agent's configuration, and the objects that it needs."""
        config: dict[str, Any] = {"resources": list(self.served.values())}
        root = (self.file.flags or _Flags()).nvidia_driver_root or ""
        if driver_root(root).to == DRIVER_ROOT:
            config["nvidia"] = {"driverRoot": root}
        return config, tuple(self.objects)


def full_name(name: str) -> str:
    """Return the full name of a resource as NVIDIA's plugin reads it."""
    return name if name.startswith(f"{DOMAIN}/") else f"{DOMAIN}/{name}"


def _is_name(name: str) -> bool:
    """Return whether the agent can serve a name."""
    short = name.partition("/")[2]
    return len(short) <= LONGEST_NAME and bool(re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", short))


def _shell(pattern: str) -> str:
    """Return the shell pattern that matches what NVIDIA's pattern matches, where only * is special."""
    return "*".join(_literal(one) for one in pattern.split("*"))


def _literal(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def may_both_match(one: str, other: str) -> bool:
    """Return whether some text matches both of two patterns, in which only * is special."""
    ways = [False] * len(other) + [True]
    for j in range(len(other) - 1, -1, -1):
        ways[j] = other[j] == "*" and ways[j + 1]
    for first in reversed(one):
        below, ways = ways, [False] * (len(other) + 1)
        ways[-1] = first == "*" and below[-1]
        for j in range(len(other) - 1, -1, -1):
            if "*" in (first, other[j]):
                ways[j] = (other[j] == "*" and ways[j + 1]) or (first == "*" and (below[j] or ways[j + 1]))
                ways[j] = ways[j] or (other[j] == "*" and below[j])
            else:
                ways[j] = first == other[j] and below[j + 1]
    return ways[0]
