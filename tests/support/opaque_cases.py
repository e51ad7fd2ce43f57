"""Opaque parameters, right and wrong: what the driver and the API server's admission policy have to agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nodeagent.core.dra.opaque_config import API_VERSION
from nodeagent.core.model.options import OPTIONS, POLICIES

STRANGE: list[tuple[Mapping[str, Any], str]] = [
    ({}, "nothing at $.apiVersion, expected 'nodeagent.dev/v1alpha1'"),
    ({"apiVersion": "nodeagent.dev/v1", "kind": "CpuConfig"}, "'nodeagent.dev/v1' at $.apiVersion, expected"),
    ({"apiVersion": API_VERSION}, "nothing at $.kind; expected one of CpuConfig, HugepageConfig"),
    ({"apiVersion": API_VERSION, "kind": "CpuConfg"}, "'CpuConfg' at $.kind; did you mean CpuConfig?"),
    ({"apiVersion": API_VERSION, "kind": ["CpuConfig"]}, "['CpuConfig'] at $.kind;"),
    ({"apiVersion": API_VERSION, "kind": "MemoryConfig", "x": 1}, "MemoryConfig has no key $.x; expected none"),
]
"""Whole parameters, and what the driver says of them."""

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("CpuConfig", {"option": []}, "has no key $.option; did you mean options?"),
    ("CpuConfig", {"options": "full-pcpus-only"}, "at `$.options`, found 'full-pcpus-only'"),
    ("CpuConfig", {"options": ["full-pcpus-only", 3]}, "at `$.options[1]`, found 3"),
    ("CpuConfig", {"options": ["full-pcpus"]}, 'did you mean "full-pcpus-only"? at $.options'),
    (
        "CpuConfig",
        {"options": ["prefer-performance-cores"], "coreType": "efficiency"},
        'it excludes "prefer-performance-cores" at $.options',
    ),
    ("CpuConfig", {"numa": "strict"}, "at `$.numa`, found 'strict'"),
    ("CpuConfig", {"coreType": "fast"}, "at `$.coreType`, found 'fast'"),
    ("CpuConfig", {"cacheWays": 0}, "at `$.cacheWays`, found 0"),
    ("CpuConfig", {"cacheWays": 33}, "at `$.cacheWays`, found 33"),
    ("CpuConfig", {"cacheWays": "2"}, "at `$.cacheWays`, found '2'"),
    ("CpuConfig", {"memoryBandwidthPercent": 101}, "at `$.memoryBandwidthPercent`, found 101"),
    ("CpuConfig", {"memoryBandwidthMBps": 0}, "at `$.memoryBandwidthMBps`, found 0"),
    ("CpuConfig", {"memoryBandwidthMbps": 5}, "has no key $.memoryBandwidthMbps; did you mean memoryBandwidthMBps?"),
    ("CpuConfig", {"cacheClass": "Gold"}, "at `$.cacheClass`, found 'Gold'"),
    ("CpuConfig", {"cacheClass": "gold", "cacheWays": 2}, "$.cacheClass excludes $.cacheWays"),
    ("HugepageConfig", {"mountPath": "hugepages"}, "at `$.mountPath`, found 'hugepages'"),
    ("HugepageConfig", {"mountPath": "/a\0b"}, "at `$.mountPath`"),
    ("HugepageConfig", {"mountPath": "/"}, "'/' at $.mountPath"),
    ("HugepageConfig", {"mountPath": "/mnt/../etc"}, "'/mnt/../etc' at $.mountPath"),
    ("HugepageConfig", {"mountPath": "//proc/1"}, "would hide the kernel's own files"),
    ("HugepageConfig", {"mountPath": "/dev"}, "would hide the kernel's own files"),
    ("GpuConfig", {"timeSlicing": {}, "mps": {}}, "$.timeSlicing and $.mps exclude each other"),
    ("GpuConfig", {"timeSlicing": {"interval": "long"}}, "at `$.timeSlicing.interval`, found 'long'"),
    ("GpuConfig", {"timeSlicing": {"intervall": "Long"}}, "$.timeSlicing.intervall; did you mean interval?"),
    ("GpuConfig", {"mps": {"activeThreadPercentage": 0}}, "at `$.mps.activeThreadPercentage`, found 0"),
    ("GpuConfig", {"mps": {"activeThreadPercentage": 101}}, "at `$.mps.activeThreadPercentage`, found 101"),
    ("GpuConfig", {"mps": {"activeThreadPercentage": True}}, "at `$.mps.activeThreadPercentage`, found True"),
    ("GpuConfig", {"mps": {"pinnedDeviceMemoryLimit": "100m"}}, "a whole number at $.mps.pinnedDeviceMemoryLimit"),
    ("GpuConfig", {"mps": {"pinnedDeviceMemoryLimit": "0"}}, "nothing at $.mps.pinnedDeviceMemoryLimit"),
    ("GpuConfig", {"driver": "nvidia"}, "at `$.driver`, found 'nvidia'"),
    ("GpuConfig", {"driver": "vfio-pci", "mps": {}}, "$.driver excludes all other keys"),
    ("NicConfig", {"driver": "vfio-pci", "rdma": True}, "$.driver and $.rdma exclude each other"),
    ("GpuConfig", {"driverCapabilities": ["compute"]}, "at `$.driverCapabilities[0]`, found 'compute'"),
    ("GpuConfig", {"driverCapabilities": "graphics"}, "at `$.driverCapabilities`, found 'graphics'"),
    ("NicConfig", {"rdma": "true"}, "at `$.rdma`, found 'true'"),
    ("NicConfig", {"driver": "vfio-pci", "interface": {}}, "$.driver and $.interface exclude each other"),
    ("NicConfig", {"interface": {"mac": "02:00:00:00:00:01"}}, "has no key $.interface.mac"),
    ("NicConfig", {"interface": {"name": "a/b"}}, "at `$.interface.name`, found 'a/b'"),
    ("NicConfig", {"interface": {"name": "sixteen-letters-"}}, "at `$.interface.name`"),
    ("NicConfig", {"interface": {"name": "lo"}}, "'lo' at $.interface.name"),
    ("NicConfig", {"interface": {"mtu": 67}}, "at `$.interface.mtu`, found 67"),
    ("NicConfig", {"interface": {"hardwareAddress": "01:00:00:00:00:01"}}, "at `$.interface.hardwareAddress`"),
    ("NicConfig", {"interface": {"addresses": ["10.0.0.5"]}}, "'10.0.0.5' at $.interface.addresses[0]"),
    ("NicConfig", {"interface": {"addresses": ["10.0.0.5/33"]}}, "'10.0.0.5/33' at $.interface.addresses[0]"),
    ("NicConfig", {"interface": {"addresses": ["127.0.0.1/8"]}}, "'127.0.0.1/8' at $.interface.addresses[0]"),
    ("NicConfig", {"interface": {"addresses": ["10.0.0.5/24"] * 2}}, "stands twice at $.interface.addresses"),
    ("NicConfig", {"interface": {"addresses": [f"10.0.0.{i}/24" for i in range(1, 18)]}}, "17 entries at"),
    ("NicConfig", {"interface": {"routes": [{"to": "10.1.0.0/16"}]}}, "has no key $.interface.routes[0].to"),
    (
        "NicConfig",
        {"interface": {"routes": [{"destination": "10.1.0.0"}]}},
        "'10.1.0.0' at $.interface.routes[0].destination",
    ),
    (
        "NicConfig",
        {"interface": {"routes": [{"destination": "10.1.0.1/16"}]}},
        "'10.1.0.1/16' at $.interface.routes[0].destination",
    ),
    (
        "NicConfig",
        {"interface": {"routes": [{"destination": "10.1.0.0/16", "gateway": "fd00::1"}]}},
        "'fd00::1' at $.interface.routes[0].gateway",
    ),
    ("BlockConfig", {"readBytesPerSecond": 1}, "at `$.readBytesPerSecond`, found 1"),
    ("BlockConfig", {"readBytesPerSecond": "1"}, "'1' is not 2 to 1000000000000000 bytes per second"),
    ("BlockConfig", {"readBytesPerSecond": "2P"}, "'2P' is not 2 to 1000000000000000 bytes per second"),
    ("BlockConfig", {"writeBytesPerSecond": "fast"}, 'cannot read quantity "fast"'),
    ("BlockConfig", {"writeBytesPerSecond": "2500m"}, "not a whole number at $.writeBytesPerSecond"),
    ("BlockConfig", {"writeBytesPerSecond": [5]}, "at `$.writeBytesPerSecond`"),
    ("BlockConfig", {"readIOPS": 1}, "at `$.readIOPS`, found 1"),
    ("BlockConfig", {"writeIOPS": "5"}, "at `$.writeIOPS`, found '5'"),
    ("BlockConfig", {"readIops": 5}, "has no key $.readIops; did you mean readIOPS?"),
    ("BlockConfig", {"weight": 10_001}, "at `$.weight`, found 10001"),
    ("BlockConfig", {"latencyTargetMicroseconds": 0}, "at `$.latencyTargetMicroseconds`, found 0"),
    ("BlockConfig", {"ioClass": "Gold"}, "at `$.ioClass`, found 'Gold'"),
    ("BlockConfig", {"ioClass": "gold", "weight": 5}, "$.ioClass excludes all limits"),
    ("BlockConfig", {"env": {"A-B": "1"}}, "A-B: '1' at $.env"),
    ("DeviceConfig", {"env": {"A-B": "1"}}, "A-B: '1' at $.env"),
    ("DeviceConfig", {"env": {"SPEED": 115200}}, "SPEED: 115200 at $.env"),
    ("DeviceConfig", {"env": {"SPEED": "a\0b"}}, "SPEED: 'a\\x00b' at $.env"),
    ("DeviceConfig", {"env": {"NODEAGENT_CPUS": "0-3"}}, "NODEAGENT_CPUS at $.env"),
]
"""(kind, the other keys, what the driver says of them)."""

RIGHT: list[tuple[str, dict[str, Any]]] = [
    *(
        (kind, {})
        for kind in (
            "CpuConfig",
            "HugepageConfig",
            "MemoryConfig",
            "GpuConfig",
            "NicConfig",
            "BlockConfig",
            "DeviceConfig",
        )
    ),
    *(("CpuConfig", {"options": [one]}) for one in OPTIONS),
    *(("CpuConfig", {"numa": one}) for one in ("", *POLICIES)),
    ("CpuConfig", {"options": [], "coreType": ""}),
    ("CpuConfig", {"options": ["full-pcpus-only", "prefer-isolated-cpus"], "coreType": "performance"}),
    ("CpuConfig", {"options": ["prefer-efficiency-cores"], "coreType": "efficiency", "numa": "single"}),
    ("CpuConfig", {"cacheWays": 32, "memoryBandwidthPercent": 1, "memoryBandwidthMBps": 10_000_000}),
    ("CpuConfig", {"cacheClass": "gold-1", "cacheWays": None}),
    ("HugepageConfig", {"mountPath": "/dev/hugepages"}),
    ("HugepageConfig", {"mountPath": "//mnt//huge/"}),
    ("HugepageConfig", {"mountPath": None}),
    ("GpuConfig", {"timeSlicing": {}}),
    ("GpuConfig", {"timeSlicing": {"interval": "Default"}, "mps": None}),
    ("GpuConfig", {"mps": {}, "timeSlicing": None}),
    ("GpuConfig", {"mps": {"activeThreadPercentage": 1, "pinnedDeviceMemoryLimit": "10Gi"}}),
    ("GpuConfig", {"mps": {"activeThreadPercentage": 100, "pinnedDeviceMemoryLimit": None}}),
    ("GpuConfig", {"mps": {"activeThreadPercentage": None, "pinnedDeviceMemoryLimit": "1e9"}}),
    ("GpuConfig", {"driverCapabilities": ["graphics", "video"], "mps": {}}),
    ("GpuConfig", {"driver": "vfio-pci"}),
    ("NicConfig", {"driver": "mlx5_vfio_pci"}),
    ("NicConfig", {"rdma": True}),
    ("NicConfig", {"rdma": None}),
    ("NicConfig", {"interface": None}),
    ("NicConfig", {"interface": {}, "rdma": False}),
    (
        "NicConfig",
        {
            "interface": {
                "name": "net1",
                "addresses": ["10.0.0.5/24", "fd00::5/64"],
                "routes": [
                    {"destination": "10.1.0.0/16", "gateway": "10.0.0.1"},
                    {"destination": "10.2.0.0/16"},
                    {"destination": "::/0", "gateway": "fd00::1"},
                ],
                "mtu": 9000,
                "hardwareAddress": "02:00:00:00:00:0A",
            }
        },
    ),
    ("BlockConfig", {"readBytesPerSecond": 2, "writeBytesPerSecond": 10**15, "readIOPS": 2, "writeIOPS": 10**9}),
    ("BlockConfig", {"readBytesPerSecond": "2", "writeBytesPerSecond": "1P", "weight": 1}),
    ("BlockConfig", {"writeBytesPerSecond": "1.5M", "latencyTargetMicroseconds": 10_000_000, "weight": 10_000}),
    ("BlockConfig", {"ioClass": "gold-1", "readIOPS": None, "env": {"A": "b"}}),
    ("BlockConfig", {"ioClass": "", "readIOPS": 5}),
    ("DeviceConfig", {"env": {}}),
    ("DeviceConfig", {"env": {"SPEED": "115200", "_x1": ""}}),
]
