"""The keys of the configuration file of NVIDIA's device plugin that decide nothing about resources, and what becomes of
each: those of how it starts, what it gives to containers, and where files are.
"""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.core.imports.findings import NOT_SET, Rule, Said, State, switch, usual
from nodeagent.core.imports.nvidia.common import driver_root, hook

MANY = Said(State.LOST, why="a container that asks for several shares gets several: limit them by a ResourceQuota")
AS_MANY = "a container may have several shares"
_NODES = Said(State.BUILT_IN, why="containers get the device nodes and the driver's files from the agent")
SHARING: Mapping[str, Rule] = {
    "renameByDefault": switch(
        Said(State.IGNORED, why="there is nothing to rename"), Said(State.BUILT_IN, why="names stay")
    ),
    "failRequestsGreaterThanOne": switch(MANY, Said(State.BUILT_IN, why=AS_MANY)),
    "resources": Said(State.BUILT_IN, why="there are none"),
    "resources[].name": NOT_SET,
    "resources[].replicas": NOT_SET,
    "resources[].devices": Said(State.BUILT_IN, why="all devices of a resource are divided"),
    "resources[].rename": Said(State.BUILT_IN, why="it has that name anyway"),
}


def _with_node(path: str, kind: str) -> Rule:
    why = f"serve {path} as a resource of kind {kind}, which a pod asks for in addition"
    return switch(Said(State.LOST, why=why))


FLAGS: Mapping[str, Rule] = {
    "$.version": Said(State.BUILT_IN, why="apiVersion and kind have defaults"),
    "$.flags.failOnInitError": Said(
        State.BUILT_IN, why="the agent does not end: `nodeagent status` reports what is wrong, and NVML is tried again"
    ),
    "$.flags.mpsRoot": Said(State.BUILT_IN, why="daemons have folders in mps below runtimeDir"),
    "$.flags.nvidiaDriverRoot": driver_root,
    "$.flags.nvidiaDevRoot": usual(
        frozenset({"", "/"}), Said(State.LOST, why="device nodes are those in the host's /dev"), "the host's /dev"
    ),
    "$.flags.gdrcopyEnabled": _with_node("/dev/gdrdrv", "char"),
    "$.flags.gdsEnabled": _with_node("/dev/nvidia-fs*", "char"),
    "$.flags.mofedEnabled": switch(
        Said(State.LOST, why="RDMA nodes come with adapters: serve kind nic, which a pod asks for in addition")
    ),
    "$.flags.deviceDiscoveryStrategy": usual(
        frozenset({"", "auto", "nvml"}),
        Said(State.LOST, why="GPUs of Tegra are not known"),
        "PCI, and NVML where it is",
    ),
    "$.flags.plugin.passDeviceSpecs": _NODES,
    "$.flags.plugin.deviceListStrategy": Said(
        State.BUILT_IN,
        why="containers get the device nodes and the driver's files from the agent; nvidia.driverFiles: off leaves the "
        "files to NVIDIA's runtime",
    ),
    "$.flags.plugin.deviceIDStrategy": usual(
        frozenset({"", "uuid"}), Said(State.LOST, why="GPUs are named by UUID, which is stable"), "UUIDs"
    ),
    "$.flags.plugin.cdiAnnotationPrefix": usual(
        frozenset({"", "cdi.k8s.io/"}), Said(State.LOST, why="no annotations are used"), "no annotations are needed"
    ),
    "$.flags.plugin.nvidiaCTKPath": hook,
    "$.flags.plugin.containerDriverRoot": Said(
        State.BUILT_IN, why="the agent's pod has the folders of the host as its chart mounts them"
    ),
    "$.flags.plugin.sharedDevicesAllocationPolicy": usual(
        frozenset({"", "distributed"}),
        Said(State.LOST, why="shares are taken from the device that has most left, never packed"),
        "shares of the device that has most left come first",
    ),
    "$.flags.plugin": NOT_SET,
    "$.flags": NOT_SET,
    "$.resources": NOT_SET,
    "$.sharing": NOT_SET,
    "$.imex": NOT_SET,
    "$.imex.required": switch(Said(State.BUILT_IN, why="pods that ask for a channel wait until there is one")),
}
