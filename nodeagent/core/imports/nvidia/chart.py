"""Values of the Helm chart of NVIDIA's DRA driver, as a configuration of the agent.

Source of the values: deployments/helm of NVIDIA's DRA driver for GPUs, and pkg/featuregates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from nodeagent.core.imports.findings import NOT_SET, Rule, Said, State, Translation, findings, switch, usual
from nodeagent.core.imports.nvidia.common import DRIVER_ROOT, INSTANCES, VENDOR, WHOLE, driver_root, hook
from nodeagent.errors import InputError

KUBELET, SOCKETS = "/var/lib/kubelet", ("plugins_registry", "plugins")
MUCH_LOGGED = 6
"""From this verbosity on NVIDIA's driver logs each request."""


class _Gpus(msgspec.Struct, frozen=True):
    enabled: bool | None = None


class _Resources(msgspec.Struct, frozen=True):
    gpus: _Gpus | None = None


class _Plugin(msgspec.Struct, frozen=True, rename="camel"):
    kubelet_registrar_directory_path: str | None = None
    kubelet_plugins_directory_path: str | None = None


class _Values(msgspec.Struct, frozen=True, rename="camel"):
    nvidia_driver_root: str | None = None
    resources: _Resources | None = None
    feature_gates: dict[str, bool] | None = None
    log_verbosity: str | int | None = None
    kubelet_plugin: _Plugin | None = None


def is_chart_values(document: Mapping[str, Any]) -> bool:
    """Return whether a document looks like values of the chart."""
    return "kind" not in document and bool(
        document.keys() & ({"featureGates", "kubeletPlugin", *_KEYS} - {"resources"})
    )


def translate(document: Mapping[str, Any], where: str = "") -> Translation:
    """Return the agent's form of such values. Raise InputError if one has the wrong type.

    where: begins the place of each finding.
    """
    try:
        values = msgspec.convert(document, _Values)
        verbosity = int(values.log_verbosity or 0)
    except (msgspec.ValidationError, ValueError) as error:
        raise InputError(f"cannot read {where or 'the values'}: {error}") from None
    gates, config = values.feature_gates or {}, dict[str, Any]()
    if driver_root(values.nvidia_driver_root or "").to == DRIVER_ROOT:
        config["nvidia"] = {"driverRoot": values.nvidia_driver_root}
    if verbosity >= MUCH_LOGGED:
        config["log"] = {"level": "debug"}
    if gates.get("PassthroughSupport"):
        config["dra"] = {"passthroughDrivers": ["vfio-pci"]}
    folder = _kubelet(values.kubelet_plugin or _Plugin())
    if folder and folder != KUBELET:
        config["kubeletDir"] = folder
    config["resources"] = _resources(values, dynamic=gates.get("DynamicMIG", False))
    return Translation((*findings(document, _rules(folder), where=where),), config)


def _resources(values: _Values, *, dynamic: bool) -> list[Mapping[str, Any]]:
    gpus = (values.resources or _Resources()).gpus
    if gpus is not None and gpus.enabled is False:
        return []
    whole = {"name": "gpu", "kind": "gpu", "serve": "dra", "match": {**WHOLE}}
    parts = {"name": "mig", "kind": "gpu", "serve": "dra"}
    if dynamic:
        return [whole, {**parts, "match": {"vendor": VENDOR}, "mig": {"mode": "dynamic"}}]
    return [whole, {**parts, "match": {**INSTANCES}}]


def _kubelet(plugin: _Plugin) -> str:
    """Return kubelet's folder by those of its sockets, or "" if these are not below one folder as kubelet has them."""
    paths = (plugin.kubelet_registrar_directory_path, plugin.kubelet_plugins_directory_path)
    given = [(path.rpartition("/"), name) for path, name in zip(paths, SOCKETS, strict=True) if path is not None]
    found = {folder if folder.startswith("/") and last == name else "" for (folder, _, last), name in given}
    return KUBELET if not found else found.pop() if len(found) == 1 else ""


def _rules(folder: str) -> Mapping[str, Rule]:
    sockets = usual(
        frozenset({f"{KUBELET}/{one}" for one in SOCKETS}),
        Said(State.TRANSLATED, "kubeletDir")
        if folder
        else Said(State.LOST, why="the agent's sockets are in plugins and plugins_registry below kubeletDir"),
        f"kubeletDir is {KUBELET}",
    )
    return {
        **{f"$.{key}": rule for key, rule in _KEYS.items()},
        "$.kubeletPlugin.kubeletRegistrarDirectoryPath": sockets,
        "$.kubeletPlugin.kubeletPluginsDirectoryPath": sockets,
    }


_CHART = Said(State.ELSEWHERE, "values of the agent's chart", "it is about NVIDIA's pods")
_DOMAINS = Said(
    State.LOST,
    why="domains of several nodes are made by NVIDIA's controller; channels are devices of kind imex (docs/gpu.md)",
)
_NO_DOMAINS = Said(State.BUILT_IN, why="domains of several nodes are off")
_LOGGING = Said(State.BUILT_IN, why="events have fields")
_KEYS: Mapping[str, Rule] = {
    "nvidiaDriverRoot": driver_root,
    "nvidiaCDIHookPath": hook,
    "altProcDevices": usual(frozenset({""}), Said(State.LOST, why="/proc/devices is read as it is"), "it is not set"),
    **{
        key: _CHART
        for name in (
            "nameOverride",
            "fullnameOverride",
            "namespaceOverride",
            "selectorLabelsOverride",
            "allowDefaultNamespace",
            "imagePullSecrets",
            "image",
            "serviceAccount",
            "kubeletPlugin",
            "controller",
        )
        for key in (name, f"{name}.**")
    },
    "gpuResourcesEnabledOverride": Said(State.BUILT_IN, why="device plugin and DRA share one ledger"),
    "resourceApiVersion": Said(State.BUILT_IN, why="the agent asks the API server"),
    "resources": NOT_SET,
    "resources.gpus": NOT_SET,
    "resources.gpus.enabled": switch(Said(State.TRANSLATED, "resources"), Said(State.TRANSLATED, "resources")),
    "resources.computeDomains": NOT_SET,
    "resources.computeDomains.enabled": switch(_DOMAINS, _NO_DOMAINS),
    "featureGates": NOT_SET,
    "featureGates.TimeSlicingSettings": Said(State.BUILT_IN, why="claims may always ask for a time slice"),
    "featureGates.MPSSupport": Said(State.BUILT_IN, why="claims may always ask for MPS"),
    "featureGates.PassthroughSupport": switch(Said(State.TRANSLATED, "dra.passthroughDrivers")),
    "featureGates.DynamicMIG": switch(Said(State.TRANSLATED, "resources: mig: mig.mode")),
    "featureGates.NVMLDeviceHealthCheck": switch(
        Said(State.BUILT_IN, why="health is judged always (docs/health.md)"),
        Said(State.LOST, why="health is judged always; health.ignore leaves out sources"),
    ),
    "featureGates.DeviceMetadata": switch(
        Said(State.BUILT_IN, why="claims always have metadata (docs/dra.md)"),
        Said(State.BUILT_IN, why="claims always have metadata, which nothing has to read"),
    ),
    **{
        f"featureGates.{name}": switch(_DOMAINS, _NO_DOMAINS)
        for name in ("IMEXDaemonsWithDNSNames", "ComputeDomainCliques", "CrashOnNVLinkFabricErrors")
    },
    **{f"featureGates.{name}": _LOGGING for name in ("ContextualLogging", "LoggingAlphaOptions", "LoggingBetaOptions")},
    "logVerbosity": lambda value: (
        Said(State.TRANSLATED, "log.level")
        if int(value) >= MUCH_LOGGED
        else Said(State.BUILT_IN, why="log.level is info")
    ),
    "webhook": NOT_SET,
    "webhook.**": Said(State.BUILT_IN, why="deploy/admission.yaml checks parameters without a webhook"),
}
