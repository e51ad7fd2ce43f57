"""Every rule of the configuration, and the message for a configuration that breaks one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from nodeagent.config import accelerators, dra, hugepages, isolation, network, operation, resources
from nodeagent.config import schema as schema_of
from nodeagent.config.base import Base
from nodeagent.config.json_schema import json_schema
from nodeagent.config.load import LARGEST_FILE_BYTES, differences, load, parse
from nodeagent.config.schema import DEFAULT_RESOURCES, Config, schema
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import ConfigError
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.resources.offer import offers
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.support.paths import CHECKOUT

EXAMPLE = CHECKOUT / "systemd" / "config.example.yaml"


def refusal(text: str | bytes) -> str:
    """Why a configuration is refused: one line."""
    with pytest.raises(ConfigError) as caught:
        parse(text, source="here.yaml")
    said = str(caught.value)
    assert "\n" not in said
    assert "here.yaml" in said
    return said


def resource(**keys: Any) -> str:
    return json.dumps({"resources": [{"name": "it", **keys}]})


def cache_class(**keys: Any) -> str:
    return json.dumps({"pinning": {"resctrl": {"classes": [{"name": "it", **keys}]}}})


def io_class(**keys: Any) -> str:
    return json.dumps({"pinning": {"io": {"classes": [{"name": "it", **keys}]}}})


def uclamp_class(**keys: Any) -> str:
    return json.dumps({"pinning": {"uclamp": {"classes": [{"name": "it", **keys}]}}})


@pytest.mark.parametrize("text", ["", "{}", "# nothing\n", "---\n", "null"])
def test_nothing_is_the_default(text: str) -> None:
    assert parse(text, source="here.yaml") == Config()


def test_the_default_serves_what_needs_no_preparation() -> None:
    """No hugepages, no physical function, no disk."""
    assert Config().served == list(DEFAULT_RESOURCES)
    assert {one.kind for one in Config().served} == {"cpu", "gpu", "nic", "char"}
    assert [one.match for one in Config().served if one.kind == "nic"] == [{"sriov": "vf"}]


def test_the_default_gpus_are_whole() -> None:
    """Parts have less memory; a pod that asks for a GPU must not get one of either."""
    (default,) = (one for one in Config().served if one.kind == "gpu")
    resource = DeviceResource(name="r/gpu", kind="gpu", match=default.match)
    whole, part = Device(kind="gpu", id="g"), Device(kind="gpu", id="g/mig-1-0", parent="g")
    assert [one.id for one in resource.devices(Inventory(devices=(whole, part)))] == ["g"]


def test_an_empty_list_serves_nothing() -> None:
    assert parse("resources: []", source="here.yaml").served == []


def test_every_key_is_read() -> None:
    text = """
apiVersion: nodeagent.dev/v1alpha1
kind: NodeAgentConfiguration
kubeletDir: /k
stateDir: /s
runtimeDir: /r
domain: example.com
reservedCpus: 0-1,4
resyncSeconds: 5
auditDays: 3
log: {level: debug, format: json}
status: {group: adm}
metrics: {listen: "[::1]:9464", tokenFile: /t, tls: {certFile: /cert, keyFile: /key, clientCaFile: /ca}}
events: {enabled: false}
publish: {nodeLabels: true, nodeResourceTopology: true}
release: {unconfirmedSeconds: 7, confirmedSeconds: 0.5}
health: {recoverSeconds: 8, nvmlSeconds: 9, quarantine: ["0000:41:00.0"]}
kubeletConfig: {file: /k.yaml, dropIns: /k.d}
dra: {driver: d.example.com, nodeName: n, kubeconfig: /c, cdiDir: /cdi, unhealthyEffect: NoExecute}
nvidia: {driverFiles: inject, driverRoot: /opt/driver}
amd: {partitions: [{gpus: ["0000:c1:*"], compute: CPX, memory: NPS4}]}
accelerators: {dsa: [{accelerators: [dsa0], queues: [{size: 16, count: 2}]}]}
pinning: {mode: nri, nriSocket: /n, nriIndex: "10", onFailure: warn, memory: local, strictReservation: false,
  verifySeconds: 5, cgroupRoot: /c, partition: isolated, moveInterrupts: true, intrudersSeconds: 9,
  deviceInterrupts: follow,
  tuning: {governor: performance, energyPerformancePreference: power, minFrequencyMhz: 1, maxFrequencyMhz: 2,
    wakeupLatencyUs: 0},
  io: {classes: [{name: a, disks: ["sd*", /dev/disk/by-id/x], readBytesPerSecond: 5, writeBytesPerSecond: 1Mi,
    readIOPS: 2, writeIOPS: 3, weight: 4, latencyTargetMicroseconds: 5}]},
  resctrl: {exclusiveWays: 3, classes: [{name: a, caches: {L3: 2, L2: "0xf"}, memoryBandwidthPercent: 20,
    memoryBandwidthMBps: 5}]}}
network: {deviceInfoDir: /i, moveInterfaces: true, vfProperties: [mac],
  vfs: [{match: {netdevs: a}, count: 2, driversAutoprobe: false}]}
hugepages: [{pageSize: 2Mi, node: 1, pages: 4, maxPages: 8}]
resources:
- name: vf
  kind: nic
  serve: dra
  match: {sriov: vf, driver: ["ia*", vfio-pci]}
  matchAny: [{pf_name: a, vf_index: ["0"]}, {parent: b}]
  replicas: 2
  deviceNodes: false
  cdi: {kind: vendor.com/net, name: pci_address}
  env: {A_1: b}
  vhostNet: true
  additionalInfo: {"*": {a: b}, "0000:3b:00.1": {c: ""}}
  mounts: [{hostPath: /a, containerPath: /b, readOnly: false}]
- {name: port, kind: char, paths: [/dev/ttyUSB*]}
- {name: gpu, kind: gpu, driverCapabilities: [graphics, video]}
- {name: cam, kind: usb, usb: [{vendor: 046D, product: 082d, serial: X}]}
- {name: page, kind: hugepages, pageSize: 2Mi, pagesPerBlock: 64}
- {name: cpu, kind: cpu, options: [full-pcpus-only], numa: single, serve: both, grouping: l3}
"""
    found = parse(text, source="here.yaml")
    silent = parse("resources: [{name: x, kind: x}]", source="here.yaml")
    unsaid = [key for key, value in msgspec.to_builtins(found).items() if value == msgspec.to_builtins(silent)[key]]
    assert unsaid == ["apiVersion", "kind"]
    assert found.served[0].cdi == resources.CdiConfig(kind="vendor.com/net", name="pci_address")
    assert found.served[4].pages_per_block == 64
    assert found.served[2].driver_capabilities == ["graphics", "video"]
    assert [one.name for one in found.served_by_dra] == ["vf", "cpu"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resorces: []", ["$.resorces", "did you mean resources?"]),
        ("resources: [{name: m, kind: nic, mig: {mode: dynamic}, serve: dra}]", ["$.resources[0].mig", "only for gpu"]),
        ("resources: [{name: m, kind: gpu, mig: {mode: dynamic}}]", ["$.resources[0].serve", "expected 'dra'"]),
        (
            "resources: [{name: m, kind: gpu, mig: {mode: dynamic}, serve: dra, replicas: 2}]",
            ["$.resources[0].replicas", "expected 1"],
        ),
        ('resources: [{name: m, kind: gpu, mig: {gpus: ["*"]}}]', ["$.resources[0].mig.gpus", "mode 'static'"]),
        (
            'amd: {partitions: [{gpus: ["*"]}]}',
            ["nothing at $.amd.partitions[0], expected compute, memory or both"],
        ),
        ("amd: {partitions: [{gpus: [], compute: CPX}]}", ["$.amd.partitions[0].gpus"]),
        ("log: {levle: info}", ["$.log.levle", "did you mean level?"]),
        (resource(kind="gpu", replica=2), ["$.resources[0].replica", "did you mean replicas?"]),
        (resource(kind="gpu", cdi={"kind": "a/b", "nam": "x"}), ["$.resources[0].cdi.nam", "did you mean name?"]),
        (resource(kind="usb", usb=[{"vendr": "1234"}]), ["$.resources[0].usb[0].vendr", "vendor?"]),
        ("kubelet_dir: /x", ["$.kubelet_dir", "kubeletDir"]),
        ("dra: {nodename: x}", ["$.dra.nodename", "did you mean nodeName?"]),
        ("dra: {driver: x}", ["$.dra.driver", "'x'"]),
        *(
            (f'metrics: {{listen: "{one}"}}', [f"{one!r} at $.metrics.listen", "expected an IP address and a port"])
            for one in ("9464", ":9464", "localhost:9464", "::1:9464", "127.0.0.1", "127.0.0.1:", "[::1]", "1.2.3:9464")
        ),
        *(
            (f"metrics: {{listen: 127.0.0.1:{port}}}", ["at $.metrics.listen", "expected a port from 1 to 65535"])
            for port in ("0", "65536")
        ),
        ("metrics: {tls: {certFile: /c}}", ["nothing at $.metrics.tls.keyFile", "certFile names one", "(line 1"]),
        ("metrics: {tls: {keyFile: /k}}", ["nothing at $.metrics.tls.certFile", "keyFile names one"]),
        ("metrics: {tls: {clientCaFile: /a}}", ["'/a' at $.metrics.tls.clientCaFile", "no meaning without certFile"]),
        (
            resource(kind="gpu", overhead={"memory": {"perPod": "1Gi"}}),
            ["$.resources[0].overhead", "'device-plugin'"],
        ),
        (
            resource(kind="cpu", serve="dra", overhead={"memory": {"perPod": "1Gi"}}),
            ["$.resources[0].overhead", "only for devices"],
        ),
        (
            resource(kind="gpu", serve="dra", overhead={"memory": {}}),
            ["$.resources[0].overhead.memory", "perPod"],
        ),
        (
            resource(kind="gpu", serve="dra", overhead={"nvidia.com/gpu": {"perPod": "1"}}),
            ["$.resources[0].overhead", "nvidia.com/gpu", "hugepages-"],
        ),
        (
            resource(kind="gpu", serve="dra", overhead={"memory": {"perPod": "-1Gi"}}),
            ["$.resources[0].overhead", "perPod", "-1Gi"],
        ),
        ("dra: {nodeAllocatable: on}", ["$.dra.nodeAllocatable"]),
        (resource(kind="memory"), ["$.resources[0].serve", "'dra'"]),
        (resource(kind="Memory", serve="dra"), ["kind 'Memory'", "cannot name a pool"]),
        (resource(kind="gpu", grouping="l3"), ["$.resources[0].grouping", "only for cpu"]),
        (
            "resources: [{name: a, kind: cpu, serve: dra}, {name: b, kind: cpu, serve: both}]",
            ["kind cpu", "served through DRA 2 times"],
        ),
        ("zzz: 1", ["$.zzz", "expected one of accelerators, amd, apiVersion, auditDays"]),
        ("1: 2", ["$.1", "expected one of"]),
        ("null: 2", ["$.None", "expected one of"]),
        ("on: 2", ["$.True", "expected one of"]),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_one(text: str, expected: list[str]) -> None:
    said = refusal(text)
    assert all(part in said for part in expected), said


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("hugepages: [{pageSize: 2M, node: 0}]", "$.hugepages[0].pageSize", "'2M'"),
        ("hugepages: [{pageSize: 3Mi, node: 0}]", "$.hugepages[0].pageSize", "'3Mi'"),
        ("hugepages: [{pageSize: 4Ki, node: 0}]", "$.hugepages[0].pageSize", "'4Ki'"),
        ("hugepages: [{pageSize: 64Gi, node: 0}]", "$.hugepages[0].pageSize", "'64Gi'"),
        ("hugepages: [{pageSize: 2Mi, node: -1}]", "$.hugepages[0].node", "-1"),
        ("hugepages: [{pageSize: 2Mi, node: 0, pages: 5, maxPages: 4}]", "$.hugepages[0].maxPages", "4"),
        ("hugepages: [{pageSize: 1Gi, node: 0}, {pageSize: 1024Mi, node: 0}]", "$.hugepages[1]", "'1024Mi'"),
        ("resyncSeconds: soon", "$.resyncSeconds", "'soon'"),
        ("resyncSeconds: 0", "$.resyncSeconds", "0"),
        ("resyncSeconds: .nan", "$.resyncSeconds", "nan"),
        ("resyncSeconds: .inf", "$.resyncSeconds", "inf"),
        ("auditDays: 0", "$.auditDays", "0"),
        ("auditDays: 1.5", "$.auditDays", "1.5"),
        ("auditDays: true", "$.auditDays", "True"),
        ("reservedCpus: 0", "$.reservedCpus", "0"),
        ("kubeletDir: relative", "$.kubeletDir", "'relative'"),
        ("domain: nodots", "$.domain", "'nodots'"),
        ("domain: Upper.case", "$.domain", "'Upper.case'"),
        ("log: {level: trace}", "$.log.level", "'trace'"),
        ("apiVersion: v2", "$.apiVersion", "'v2'"),
        ("kind: Pod", "$.kind", "'Pod'"),
        ("resources: 3", "$.resources", "3"),
        ("resources: [3]", "$.resources[0]", "3"),
        ("resources: [{kind: gpu}]", "$.resources[0]", "name"),
        (resource(kind="gpu", replicas=0), "$.resources[0].replicas", "0"),
        (resource(kind="gpu", replicas=100000), "$.resources[0].replicas", "100000"),
        (resource(kind="gpu", env={"A": 1}), "$.resources[0].env", "int"),
        (resource(kind="gpu", env={"1A": "x"}), "$.resources[0].env", "A-Za-z_"),
        (resource(kind="gpu", env={"A": "x\0"}), "$.resources[0].env", "0"),
        (resource(kind="gpu", cdi={"kind": "noslash"}), "$.resources[0].cdi.kind", "'noslash'"),
        (resource(kind="gpu", mounts=[{"hostPath": "a", "containerPath": "/b"}]), "mounts[0].hostPath", "'a'"),
        (resource(kind="char", paths=["/etc/shadow"]), "$.resources[0].paths[0]", "'/etc/shadow'"),
        (resource(kind="char", paths=["/dev/../etc/x"]), "$.resources[0].paths", "'/dev/../etc/x'"),
        (resource(kind="cpu", numa="maybe"), "$.resources[0].numa", "'maybe'"),
        (resource(kind="usb", usb=[{"vendor": "12"}]), "$.resources[0].usb[0].vendor", "'12'"),
        (resource(kind="hugepages"), "$.resources[0].pageSize", "''"),
        (resource(kind="hugepages", pageSize="3Mi"), "$.resources[0].pageSize", "'3Mi'"),
        (resource(kind="hugepages", pageSize="2M"), "$.resources[0].pageSize", "'2M'"),
        (resource(kind="hugepages", pageSize="0Mi"), "$.resources[0].pageSize", "'0Mi'"),
        (resource(kind="hugepages", pageSize="2Mi", pagesPerBlock=0), "$.resources[0].pagesPerBlock", "0"),
        (resource(kind="char"), "$.resources[0].paths", "/dev/ttyUSB*"),
        (resource(kind="usb"), "$.resources[0].usb", "vendor"),
        (resource(kind="gpu", paths=["/dev/x"]), "$.resources[0].paths", "only for char"),
        (resource(kind="gpu", options=["full-pcpus-only"]), "$.resources[0].options", "only for cpu"),
        (resource(kind="cpu", replicas=2), "$.resources[0].replicas", "only for devices"),
        (resource(kind="cpu", match={"a": "b"}), "$.resources[0].match", "only for devices"),
        ('{"resources":[{"name":"a","kind":"gpu"},{"name":"a","kind":"nic"}]}', "$.resources[1].name", "twice"),
        ("pinning: {resctrl: {exclusiveWays: 32}}", "$.pinning.resctrl.exclusiveWays", "32"),
        ("pinning: {resctrl: {}, mode: 'off'}", "$.pinning.resctrl", "mode 'off'"),
        ("{network: {vfProperties: [mac, vlans]}}", "$.network.vfProperties[1]", "'vlans'"),
        ("{network: {moveInterfaces: true}, pinning: {mode: cgroup}}", "$.network.moveInterfaces", "mode 'cgroup'"),
        (cache_class(name="Gold"), "$.pinning.resctrl.classes[0].name", "'Gold'"),
        (cache_class(caches={"L4": 1}), "$.pinning.resctrl.classes[0].caches", "'L4'"),
        (cache_class(caches={"L3": 0}), "$.pinning.resctrl.classes[0].caches", "0"),
        (cache_class(caches={"L3": "0x0"}), "$.pinning.resctrl.classes[0].caches", "'0x0'"),
        (cache_class(caches={"L3": 1, "L3CODE": 1}), "$.pinning.resctrl.classes[0].caches", "both of its parts"),
        ("pinning: {resctrl: {classes: [{name: a}, {name: a}]}}", "$.pinning.resctrl.classes[1].name", "twice"),
        ("pinning: {io: {}, mode: 'off'}", "$.pinning.io", "mode 'off'"),
        ("pinning: {uclamp: {}, mode: 'off'}", "$.pinning.uclamp", "mode 'off'"),
        ("pinning: {uclamp: {default: fast}}", "$.pinning.uclamp.default", "the name of one of its classes"),
        (uclamp_class(), "$.pinning.uclamp.classes[0]", "clamps nothing, expected min, max or both"),
        (uclamp_class(name="Fast", min=5), "$.pinning.uclamp.classes[0].name", "'Fast'"),
        (uclamp_class(min=101), "$.pinning.uclamp.classes[0].min", "101"),
        (uclamp_class(max="100.01"), "$.pinning.uclamp.classes[0].max", "'100.01'"),
        (uclamp_class(min="12.345"), "$.pinning.uclamp.classes[0].min", "'12.345'"),
        (uclamp_class(min=12.5), "$.pinning.uclamp.classes[0].min", "12.5"),
        (uclamp_class(min="50.01", max=50), "$.pinning.uclamp.classes[0].min", "is above its max, 50"),
        (uclamp_class(min="max", max="99.9"), "$.pinning.uclamp.classes[0].min", "is above its max"),
        (
            "pinning: {uclamp: {classes: [{name: a, min: 5}, {name: a, min: 5}]}}",
            "$.pinning.uclamp.classes[1]",
            "twice",
        ),
        (io_class(), "$.pinning.io.classes[0]", "limits nothing, expected one of readBytesPerSecond"),
        (io_class(disks=["sd*"]), "$.pinning.io.classes[0]", "limits nothing"),
        (io_class(name="Gold", readIOPS=5), "$.pinning.io.classes[0].name", "'Gold'"),
        (io_class(readIOPS=1), "$.pinning.io.classes[0].readIOPS", "1"),
        (io_class(readBytesPerSecond="1"), "$.pinning.io.classes[0].readBytesPerSecond", "'1'"),
        (io_class(writeBytesPerSecond="fast"), "$.pinning.io.classes[0].writeBytesPerSecond", "'fast'"),
        (io_class(weight=10_001), "$.pinning.io.classes[0].weight", "10001"),
        (io_class(readIOPS=5, disks=["a/b"]), "$.pinning.io.classes[0].disks[0]", "'a/b'"),
        ("pinning: {io: {classes: [{name: a, weight: 5}, {name: a, weight: 5}]}}", "$.pinning.io.classes[1]", "twice"),
        ("domain: kubernetes.io", "$.domain", "kubernetes.io"),
        ("domain: gpu.kubernetes.io", "$.domain", "gpu.kubernetes.io"),
        ("domain: requests.example.com", "$.domain", "requests"),
        (f"domain: {'a' * 60}.{'b' * 60}.{'c' * 60}.{'d' * 60}.{'e' * 60}", "$.domain", "at most 253"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(text: str, path: str, value: str) -> None:
    said = refusal(text)
    assert path in said, said
    assert value in said, said


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "a/b", "a b", "x" * 64, "ü", "/a", "a.b/", "a.b/c/d", "A.b/c", "a.b/-c"]
)
def test_a_name_that_kubelet_would_refuse_is_refused_here(name: str) -> None:
    assert "$.resources[0].name" in refusal(json.dumps({"resources": [{"name": name, "kind": "gpu"}]}))


def test_a_resource_may_have_a_domain_of_its_own(tmp_path: Path) -> None:
    """One agent can take the names of several plugins over; Kubernetes' own domains stay refused."""
    file = tmp_path / "config.yaml"
    named = ("gpu", "nvidia.com/gpu", "intel.com/sriov_netdevice")
    file.write_text(json.dumps({"domain": "example.org", "resources": [{"name": one, "kind": "gpu"} for one in named]}))
    found = load(file)
    assert [found.full_name(one) for one in found.served] == ["example.org/gpu", *named[1:]]
    assert [one.name for one in offers(found, builtin_kinds())] == ["example.org/gpu", *named[1:]]
    for domain in ("kubernetes.io", "gpu.kubernetes.io", "requests.example.com", ".".join(["a" * 60] * 5)):
        assert "$.resources[0].name" in refusal(json.dumps({"resources": [{"name": f"{domain}/x", "kind": "gpu"}]}))
    twice = [{"name": "gpu", "kind": "gpu"}, {"name": "nodeagent.dev/gpu", "kind": "gpu"}]
    assert "'nodeagent.dev/gpu' at $.resources[1].name stands twice" in refusal(json.dumps({"resources": twice}))


def test_accelerators_are_divided_into_queues_that_there_can_be() -> None:
    def said(*queues: dict[str, Any]) -> str:
        return refusal(json.dumps({"accelerators": {"dsa": [{"accelerators": ["dsa*"], "queues": queues}]}}))

    where = "$.accelerators.dsa[0].queues"
    assert f"200 queues at {where}, expected at most 128" in said({"size": 1, "count": 100}, {"size": 2, "count": 100})
    why = "the kernel may keep a shared queue dedicated in the hardware"
    assert f"'shared' at {where}[1].mode, expected 'dedicated': {why}" in said(
        {"size": 8}, {"mode": "shared", "size": 8}
    )
    assert f"{where}[0].threshold" in said({"size": 8, "threshold": 4})
    for serve, replicas in (("both", 1), ("device-plugin", 1), ("dra", 2)):
        one = {"name": "q", "kind": "dsa-queue", "serve": serve, "replicas": replicas}
        assert "$.resources[0]." in refusal(json.dumps({"resources": [one]}))


def test_a_target_stands_once_in_the_configuration_as_it_would_be_one_disk_under_two_names() -> None:
    def san(name: str, *targets: tuple[str, str, int], kind: str = "nvmeof") -> dict[str, Any]:
        found = [
            {"name": one, "nqn": f"nqn.2024-01.com.example:{nqn}", "traddr": "192.0.2.1", "trsvcid": port}
            for one, nqn, port in targets
        ]
        return {"name": name, "kind": kind, "serve": "dra", **({"targets": found} if found else {})}

    def said(*resources: dict[str, Any]) -> str:
        return refusal(json.dumps({"resources": resources}))

    first = "first at $.resources[0].targets[0]"
    named = f"name 'a' at $.resources[1].targets[0].name stands twice, {first}"
    assert named in said(san("x", ("a", "1", 4420)), san("y", ("a", "2", 4420)))
    for port in (4420, 4421):
        same = f"nqn 'nqn.2024-01.com.example:1' at $.resources[0].targets[1].nqn stands twice, {first}"
        assert same in said(san("x", ("a", "1", 4420), ("b", "1", port)))
    assert "$.resources[0].targets[0].name is that of a kind, nvmeof-a" in said(
        san("x", ("a", "1", 4420)), san("y", kind="nvmeof-a")
    )


@pytest.mark.parametrize(
    "text",
    [
        "- a list",
        "just text",
        "{",
        "a: [",
        "\t",
        "a: b: c",
        "\x00",
        b"\xff\xfe\x00",
        b"\x80",
        "!!python/object/apply:os.system [true]",
        "a: !!binary '*'",
        "a: 2026-13-45",
        "? [a]\n: b",
        "a: *nowhere",
        "[" * 100_000,
        "{a: " * 5_000,
        "--- a\n--- b",
    ],
)
def test_garbage_is_refused_in_one_line(text: str | bytes) -> None:
    refusal(text)


def test_a_key_that_stands_twice_is_refused() -> None:
    """YAML would take the last, silently."""
    assert "'domain' stands twice" in refusal("domain: a.b\ndomain: c.d\n")
    assert "'name' stands twice" in refusal("resources: [{name: a, name: b, kind: gpu}]")


def test_an_alias_is_fine_and_a_bomb_of_them_is_not() -> None:
    aliased = "resources:\n- {name: a, kind: gpu, env: &e {A: b}}\n- {name: b, kind: gpu, env: *e}\n"
    assert parse(aliased, source="here.yaml").served[1].env == {"A": "b"}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    assert "values" in refusal("\n".join(lines))
    assert "values" in refusal("a: &a [*a]")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ConfigError, match=str(LARGEST_FILE_BYTES)):
        load(file)


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, what: str) -> None:
    path = tmp_path / "here.yaml" if what == "missing" else tmp_path
    with pytest.raises(ConfigError, match="No such file" if what == "missing" else "directory"):
        load(path)


@given(some.binary(max_size=200))
def test_bytes_are_a_configuration_or_refused(data: bytes) -> None:
    try:
        parse(data, source="here.yaml")
    except ConfigError as error:
        assert "here.yaml" in str(error)


_VALUE = some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=8)
_PLAIN = _VALUE | some.lists(_VALUE, max_size=2) | some.dictionaries(some.text(max_size=4), _VALUE, max_size=2)


@given(some.dictionaries(some.sampled_from([*schema()["$defs"]["Config"]["properties"]]), _PLAIN, max_size=3))
def test_any_value_at_any_key_is_a_configuration_or_refused(document: dict[str, Any]) -> None:
    try:
        parse(json.dumps(document), source="here.yaml")
    except ConfigError as error:
        assert str(error).isprintable()


def test_a_key_with_a_line_break_is_named_in_one_line() -> None:
    with pytest.raises(ConfigError) as refused:
        parse(json.dumps({"kubeletConfig": {"fi\nle\x1b": None}}), source="here.yaml")
    assert "unknown key $.kubeletConfig.fi\\nle\\x1b; did you mean file?" in str(refused.value)


def test_a_configuration_survives_being_written_and_read() -> None:
    """Every default written out is what nothing means."""
    document = msgspec.to_builtins(Config(resources=list(DEFAULT_RESOURCES)))
    assert parse(json.dumps(document), source="here.yaml") == Config(resources=list(DEFAULT_RESOURCES))


# ---------------------------------------------------------------- what changes


def test_differences_name_each_key_once() -> None:
    old = parse("auditDays: 3\nlog: {level: info}", source="x")
    new = parse("auditDays: 4\nlog: {level: debug}", source="x")
    assert differences(old, new) == ["auditDays: 3 -> 4", "log.level: 'info' -> 'debug'"]
    assert differences(old, old) == []


# ---------------------------------------------------------------- schema and command line


def _keys(struct: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(struct)}


def _parts() -> dict[str, type[msgspec.Struct]]:
    """All parts of the configuration, by the name of their type."""
    return {
        one.__name__: one
        for module in (accelerators, dra, hugepages, isolation, network, operation, resources, schema_of)
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Base) and one is not Base
    }


def test_the_schema_has_every_key_and_allows_no_other() -> None:
    parts = _parts()
    found = schema()["$defs"]
    assert set(found) == set(parts)
    for name, part in parts.items():
        assert set(found[name]["properties"]) == _keys(part)
        assert found[name]["additionalProperties"] is False
        assert "description" in found[name], f"{name} does not say what it is"


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nodeagent", "config", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_config_schema_prints_it() -> None:
    done = cli("schema")
    assert json.loads(done.stdout) == json_schema()


def test_config_check_says_what_is_served(tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    file.write_text(
        "domain: example.com\ndra: {driver: d.example.com}\nresources:\n- {name: gpu, kind: gpu}\n"
        "- {name: vf, kind: nic, serve: both}\n- {name: memory, kind: memory, serve: dra}\n"
    )
    done = cli("check", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{file}: good",
        "  device plugin: example.com/gpu, example.com/vf",
        "  DRA, driver d.example.com: vf (nic), memory (memory)",
    ]
    file.write_text("resources: []\n")
    assert cli("check", str(file)).stdout.splitlines()[1:] == [
        "  device plugin: nothing",
        "  DRA, driver nodeagent.dev: nothing",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resorces: []", "did you mean"),
        ("resources:\n- name: a\n  kind: gpus", "cannot serve nodeagent.dev/a: unknown kind 'gpus'"),
        ("resources:\n- name: a\n  kind: gpus", "(line 3, column 9: kind: gpus)"),
        (
            "resources:\n- name: a\n  kind: cpu\n  options:\n  - full-pcpus-only\n  - fast",
            'cannot use option "fast": unknown; expected one of ',
        ),
        (
            "resources:\n- name: a\n  kind: cpu\n  options:\n  - full-pcpus-only\n  - fast",
            "(line 6, column 5: - fast)",
        ),
        ("# one\nreservedCpus: 3-1", "'3-1'"),
        ("# one\nreservedCpus: 3-1", "(line 2, column 15: reservedCpus: 3-1)"),
        (
            '# one\nreservedCpus: "8191"',
            "cannot reserve CPUs 8191 of reservedCpus: this machine can have CPUs 0",
        ),
        ('# one\nreservedCpus: "8191"', '(line 2, column 15: reservedCpus: "8191")'),
        ("dra: {nodeName: Node_1}", "(line 1, column 17: dra: {nodeName: Node_1})"),
    ],
)
def test_config_check_says_what_is_wrong_and_exits_with_2(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "here.yaml"
    file.write_text(text)
    done = cli("check", str(file))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert expected in done.stderr


def test_config_check_names_what_this_machine_lacks_now(tmp_path: Path) -> None:
    """It may come later, by hot-plug or from a directory service: no mistake, and still said."""
    file = tmp_path / "here.yaml"
    file.write_text(
        "hugepages: [{pageSize: 2Mi, node: 999, pages: 1}]\nstatus: {group: no-such-group}\nresources: []\n"
    )
    done = cli("check", str(file))
    nodes = Path("/sys/devices/system/node/online").read_text().strip()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[3:] == [
        "  note: status.group: there is no group 'no-such-group' here; only root can read the status socket until the "
        "group exists and the agent is restarted",
        f"  note: hugepages[0]: 2Mi on node 999: this machine has no NUMA node 999, it has {nodes}",
    ]


def test_config_check_names_what_no_device_has_of_another_machine_too(tmp_path: Path) -> None:
    """Typing errors in `match` and in the name of a CDI device, of both APIs, compared with a captured tree."""
    file, root = tmp_path / "here.yaml", tmp_path / "root"
    DeviceTree(machine(root, "1s1n2c")).pci("0000:3b:00.0", pci_class="030200", vendor="10de")
    one = {"name": "gpu", "kind": "gpu", "match": {"vender": "10de", "vendor": "10de"}}
    two = {"name": "vfio", "kind": "gpu", "serve": "dra", "cdi": {"kind": "a.b/c", "name": "uuidd"}}
    file.write_text(json.dumps({"reservedCpus": "1", "resources": [one, two, {**one, "name": "fpga", "kind": "fpga"}]}))
    done = cli("check", str(file), "--root", str(root))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[3:] == [
        "  note: nodeagent.dev/gpu: match names 'vender', which no gpu of this machine has",
        "  note: nodeagent.dev/vfio: cdi.name is 'uuidd', which no gpu of this machine has",
    ]
    file.write_text('{"reservedCpus": "2"}')
    done = cli("check", str(file), "--root", str(root))
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot reserve CPUs 2 of reservedCpus: this machine can have CPUs 0-1" in done.stderr


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the example lies in the checkout")
def test_the_example_is_good_and_has_every_key() -> None:
    done = cli("check", str(EXAMPLE))
    assert done.returncode == 0, done.stderr
    text = EXAMPLE.read_text()
    missing = [key for part in _parts().values() for key in _keys(part) if f"{key}:" not in text]
    assert not missing


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the example lies in the checkout")
def test_the_example_is_what_an_agent_without_a_configuration_does() -> None:
    """It is installed as it is: nothing is served, pinned or provided that an admin has not asked for."""
    assert load(EXAMPLE) == msgspec.structs.replace(Config(), resources=list(DEFAULT_RESOURCES))


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the example lies in the checkout")
def test_the_example_with_a_line_lost_is_good_or_refused() -> None:
    lines = EXAMPLE.read_text().splitlines()
    for lost in range(len(lines)):
        try:
            parse("\n".join(lines[:lost] + lines[lost + 1 :]), source="here.yaml")
        except ConfigError as error:
            assert "here.yaml" in str(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "log:\n  level: warn\n",
            "Invalid enum value 'warn' - at `$.log.level`, found 'warn', expected one of debug, error, info, warning "
            "(line 2, column 10: level: warn)",
        ),
        (
            "# CPUs\nreservedCpus: 0\n",
            "Expected `str | null`, got `int` - at `$.reservedCpus`, found 0; quote it "
            "(line 2, column 15: reservedCpus: 0)",
        ),
        (
            "resources:\n- {name: a, kind: cpu}\n- {name: b, kind: gpu, serve: maybe}\n",
            "Invalid enum value 'maybe' - at `$.resources[1].serve`, found 'maybe', "
            "expected one of both, device-plugin, dra (line 3, column 31: - {name: b, kind: gpu, serve: maybe})",
        ),
        ("auditDay: 1\n", "unknown key $.auditDay; did you mean auditDays? (line 1, column 11: auditDay: 1)"),
        (
            "pinning:\n  mode: off\n",
            "Expected `str`, got `bool` - at `$.pinning.mode`, found False, expected one of auto, cgroup, nri, off; "
            "quote it (line 2, column 9: mode: off)",
        ),
        (
            "resources:\n- name: a\n  kind: gpu\n  match:\n    vendor: x\n    sriov: yes\n",
            "Expected `str | array`, got `bool` - at `$.resources[0].match[...]`, found True; quote it "
            "(line 6, column 12: sriov: yes)",
        ),
        (
            "resources:\n- name: a\n  kind: gpu\n  env:\n    A: b\n    B C: d\n",
            "Expected `str` matching regex '^[A-Za-z_][A-Za-z0-9_]*$' - at `key` in `$.resources[0].env`, found 'B C' "
            "(line 6, column 10: B C: d)",
        ),
        (
            "resources:\n- name: a\n  kind: cpu\n  replicas: 2\n",
            "$.resources[0].replicas has no meaning for kind cpu, only for devices (line 4, column 13: replicas: 2)",
        ),
        (
            "domain: gpukubernetes.io\n",
            "'gpukubernetes.io' at $.domain belongs to Kubernetes itself, expected a domain of your own "
            "(line 1, column 9: domain: gpukubernetes.io)",
        ),
        (
            "hugepages: [{pageSize: 3Mi, node: 0}]\n",
            "'3Mi' at $.hugepages[0].pageSize, expected a size that pages have, such as 2Mi or 1Gi "
            "(line 1, column 24: hugepages: [{pageSize: 3Mi, node: 0}])",
        ),
    ],
)
def test_a_mistake_is_shown_with_its_line_and_what_is_expected(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, source="c.yaml")
    assert str(caught.value) == f"cannot use c.yaml: {said}"


@pytest.mark.parametrize("text", ["=", "<<"])
def test_a_plain_sign_that_yaml_1_1_reserves_is_text(text: str) -> None:
    """Other programs, such as helm, write these without quotes."""
    found = parse(f"resources:\n- {{name: k, kind: char, paths: [/dev/k], env: {{A: {text}}}}}\n", source="a file")
    assert found.served[0].env == {"A": text}
