"""A claim's opaque configuration for one of its devices, decoded strictly.

For each device the last matching configuration applies as a whole, the claim's overriding the class's, in the order in
which Kubernetes lists them. Nothing is merged field by field, so that the effective configuration can be read in one
place. A configuration without requests applies to the devices of its kind. A claim's configuration that names a request
whose device is of another kind, or that fits none of its devices, is an error. One of a class is not: a class may cover
several kinds and has no other way to configure each.

A third-party kind may have a configuration of its own: a Struct whose name is the configuration's kind (docs/kinds.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

import msgspec

from nodeagent.config import hints
from nodeagent.core.model.claim import FROM_CLAIM, FROM_CLASS, Opaque, Result
from nodeagent.core.opaque.compute import CpuForm, HugepageForm, MemoryForm
from nodeagent.core.opaque.device import BlockForm, DeviceForm
from nodeagent.core.opaque.form import Form
from nodeagent.core.opaque.gpu import GpuForm
from nodeagent.core.opaque.nic import NicForm
from nodeagent.core.opaque.settings import NO_SETTINGS, OpaqueConfig
from nodeagent.errors import InputError

API_VERSION = "nodeagent.dev/v1alpha1"


class Forms(msgspec.Struct, frozen=True):
    """The forms of configurations: the built-in ones, and those that third-party kinds bring."""

    own: Mapping[str, type[msgspec.Struct]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By kind of device. Their names are distinct."""

    def expected(self, kind: str) -> tuple[str, ...]:
        """Return the configuration's kinds for devices of a kind."""
        if kind in self.own:
            return (self.own[kind].__name__,)
        one = CONFIG_KINDS.get(kind, "DeviceConfig")
        return (one, "DeviceConfig") if one == "BlockConfig" else (one,)

    def by_name(self) -> Mapping[str, type[msgspec.Struct]]:
        """Return all forms by the configuration's kind."""
        return {**{form.__name__: form for form in self.own.values()}, **FORMS}


BUILT_IN = Forms()


def settings_for(
    result: Result, kind: str, configs: Sequence[Opaque], driver: str, forms: Forms = BUILT_IN
) -> OpaqueConfig:
    """Return the effective configuration of one allocated device of a kind.

    Raise InputError naming the configuration, path and value that are wrong.
    """
    expected = forms.expected(kind)
    found: dict[str, OpaqueConfig] = {}
    for where, config in _ours(configs, driver):
        if not _covers(config.requests, result.request):
            continue
        said, settings = _decode(config.parameters, where, forms)
        if said in expected:
            found[config.source] = settings
        elif config.source == FROM_CLAIM and result.request in config.requests:
            raise InputError(
                f'cannot use {where}: {said} is for request "{result.request}", which got device '
                f'"{result.device}" of kind {kind}, expected {" or ".join(expected)}'
            )
    if not found and kind in forms.own:
        read_own(NO_SETTINGS, forms.own[kind])
    return found.get(FROM_CLAIM, found.get(FROM_CLASS, NO_SETTINGS))


def read_own(settings: OpaqueConfig, form: type[msgspec.Struct]) -> msgspec.Struct:
    """Return a third-party kind's own configuration of a device, by default one without any key. Raise InputError if
    there has to be one, or if the kind reads it no longer."""
    try:
        return msgspec.json.decode(msgspec.json.encode(settings.own, enc_hook=dict), type=form)
    except Exception as error:  # whatever the third party's type raises
        raise InputError(f"cannot read the {form.__name__} of the claim: {error}") from None


def check_all(configs: Sequence[Opaque], driver: str, forms: Forms = BUILT_IN) -> None:
    """Raise InputError for the first invalid configuration of this driver, whether it applies to a device or not."""
    for where, config in _ours(configs, driver):
        _decode(config.parameters, where, forms)


def check_fit(configs: Sequence[Opaque], driver: str, kinds: Mapping[str, str], forms: Forms = BUILT_IN) -> None:
    """Raise InputError for the first valid configuration of the claim that is of a kind that none of its devices has.

    kinds: the kind of device of each request that this driver satisfies. The scheduler of Kubernetes 1.37 and later
    removes the requests from a configuration that names all of the claim, so the absence of requests does not show that
    the user named none (dynamic-resource-allocation, structured allocators).
    """
    for where, config in _ours(configs, driver):
        fit = {form for one, kind in kinds.items() if _covers(config.requests, one) for form in forms.expected(kind)}
        said = config.parameters["kind"]
        if config.source == FROM_CLAIM and fit and said not in fit:
            raise InputError(
                f"cannot use {where}: {said} fits no device of the claim, expected {', '.join(sorted(fit))}"
            )


def _ours(configs: Sequence[Opaque], driver: str) -> Iterator[tuple[str, Opaque]]:
    """Yield the configurations for this driver, each with its name in error messages."""
    for i, config in enumerate(configs):
        if config.driver != driver:
            continue
        if config.source not in (FROM_CLASS, FROM_CLAIM):
            raise InputError(
                f"cannot use config[{i}]: {config.source!r} at source, expected {FROM_CLASS}, {FROM_CLAIM}"
            )
        yield f"config[{i}] ({config.source})", config


def _covers(requests: Sequence[str], request: str) -> bool:
    """Return whether a configuration is for a request: "r" includes "r/subrequest", and no names mean all requests."""
    return not requests or request in requests or request.partition("/")[0] in requests


FORMS: Mapping[str, type[Form]] = MappingProxyType(
    {
        "CpuConfig": CpuForm,
        "HugepageConfig": HugepageForm,
        "MemoryConfig": MemoryForm,
        "GpuConfig": GpuForm,
        "NicConfig": NicForm,
        "BlockConfig": BlockForm,
        "DeviceConfig": DeviceForm,
    }
)
"""Form by the configuration's kind."""
CONFIG_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "CpuConfig",
        "hugepages": "HugepageConfig",
        "memory": "MemoryConfig",
        "gpu": "GpuConfig",
        "nic": "NicConfig",
        "block": "BlockConfig",
        "nvme": "BlockConfig",
    }
)
"""The configuration's kind by kind of device; all others use DeviceConfig, which disks take too."""


def _decode(parameters: Mapping[str, Any], where: str, forms: Forms) -> tuple[str, OpaqueConfig]:
    """Return the configuration's kind, and what it says."""
    said = dict(parameters)
    version, kind = said.pop("apiVersion", None), said.pop("kind", None)
    if version != API_VERSION:
        raise InputError(f"cannot use {where}: {hints.shown(version)} at $.apiVersion, expected {API_VERSION!r}")
    every = forms.by_name()
    form = every.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise InputError(f"cannot use {where}: {hints.shown(kind)} at $.kind; {hints.hint(str(kind), list(every))}")
    for path, key, known in _unknown(said, form, "$"):
        raise InputError(f"cannot use {where}: {kind} has no key {hints.one_line(path)}; {hints.hint(key, known)}")
    try:
        return str(kind), _settings(msgspec.convert(said, form))
    except msgspec.ValidationError as error:
        value = hints.found(said, str(error), hints.steps(str(error)))
        raise InputError(f"cannot use {where}: {kind}: {hints.one_line(str(error))}{value}") from None
    except InputError as error:
        raise InputError(f"cannot use {where}: {kind}: {error}") from None
    except Exception as error:  # whatever a third party's type raises
        raise InputError(f"cannot use {where}: {kind}: {type(error).__name__}: {error}") from None


def _settings(found: msgspec.Struct) -> OpaqueConfig:
    if isinstance(found, Form):
        return found.settings()
    return OpaqueConfig(own=MappingProxyType(msgspec.json.decode(msgspec.json.encode(found))))


def _unknown(said: Mapping[str, Any], form: type[msgspec.Struct], path: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the keys that a form does not have: (path, key, known keys at that place)."""
    known = {one.encode_name: one.type for one in msgspec.structs.fields(form)}
    for key, value in said.items():
        if key in known:
            for one in (known[key], *get_args(known[key])):
                if isinstance(one, type) and issubclass(one, msgspec.Struct):
                    yield from _unknown_below(value, one, f"{path}.{key}")
        else:
            yield f"{path}.{key}", str(key), list(known)


def _unknown_below(value: object, form: type[msgspec.Struct], path: str) -> Iterator[tuple[str, str, list[str]]]:
    if isinstance(value, Mapping):
        yield from _unknown(value, form, path)
    for i, one in enumerate(value if isinstance(value, list) else ()):
        yield from _unknown_below(one, form, f"{path}[{i}]")
