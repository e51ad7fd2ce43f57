"""`nodeagent capture`: what is in it, what is not, and what becomes of the file."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import re
import stat
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from nodeagent.cli import main
from nodeagent.cli.node.capture import collect, redact
from nodeagent.cli.node.capture.anonymize import anonymized
from nodeagent.cli.node.capture.archive import Members
from nodeagent.cli.node.capture.pseudonyms import Pseudonyms
from nodeagent.core.ledger.ledger import GRANTED, RELEASED, Change
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.atomic_file import drafts
from nodeagent.host.sysfs.recording import DeviceNode, RecordingSysFs
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.state.agent import Agent
from nodeagent.state.audit import Happening, Refusal
from nodeagent.state.store import FILE, Store
from nodeagent.state.values import AgentSettings
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.builders.node_captures import contents
from tests.support.agent_pages import pages_of

POD_UID, CLAIM_UID = "7a1f9c3e-54b2-4a6d-8e11-0c9d2b7f4a55", "c0ffee11-2222-4333-8444-555566667777"
CONTAINER_ID = "5d" * 32
SERIAL, MAC, ADDRESS = "S5XANG0N123456", "b8:59:9f:aa:bb:cc", "192.168.77.13"
NAMES = ("blue-harbor", "orderbook", "matcher", "gpu-claim-of-blue", "rack7-node12", "oldpod", "shy")
SECRETS = (*NAMES, POD_UID, POD_UID.replace("-", "_"), CLAIM_UID, CONTAINER_ID, SERIAL, MAC, ADDRESS)


KUBELET = {"clusterDNS": [ADDRESS], "staticPodURLHeader": {"X-Token": ["abc"]}}


@dataclass
class Around:
    """A node with secrets in every corner."""

    folder: Path
    root: Path
    agent: Agent

    def words(self, *more: str) -> list[str]:
        return [
            *("capture", "--root", str(self.root), "--socket", str(self.folder / "s"), "--config", str(self.config)),
            *("--state-dir", str(self.folder / "state"), "--kubelet-dir", str(self.folder / "kubelet"), *more),
        ]

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def cgroup(root: Path) -> None:
    """The cgroups of a pod, as systemd's driver names them."""
    pod = root / "sys/fs/cgroup/kubepods.slice" / f"kubepods-pod{POD_UID.replace('-', '_')}.slice"
    write(root / "sys/fs/cgroup/cgroup.controllers", "cpuset cpu memory\n")
    write(pod / f"cri-containerd-{CONTAINER_ID}.scope/cpuset.cpus", "1-2\n")
    write(pod / "cpuset.cpus.effective", "0-3\n")
    write(pod / "memory.secret_file", "not read\n")


@contextlib.asynccontextmanager
async def around(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Around]:
    tree = DeviceTree(machine(folder / "root", "1s2n4c"))
    tree.node("/dev/ttyS0")
    cgroup(tree.root)
    tree.pci("0000:3b:00.0", pci_class="020000", driver="mlx5_core")
    tree.net("0000:3b:00.0", "eth0", address=MAC)
    tree.pci("0000:3c:00.0", pci_class="010802", driver="nvme")
    tree.nvme("0000:3c:00.0", 0, {1: 1 << 30})
    (serial,) = tree.root.glob("sys/devices/**/nvme/nvme0/serial")
    serial.write_text(f"{SERIAL}\n")
    write(tree.root / "proc/mounts", f"{ADDRESS}:/export/{NAMES[1]} /var/lib/kubelet/pods/{POD_UID}/vol nfs rw 0 0\n")
    write(tree.root / "proc/cmdline", f"quiet ip={ADDRESS} wifi.password=hunter2\n")
    monkeypatch.setattr(collect, "host_name", lambda: NAMES[4])
    states = {POD_UID: {NAMES[2]: "1-2"}}
    write(folder / "kubelet/cpu_manager_state", json.dumps({"policyName": "static", "entries": states}))
    write(
        folder / "kubelet/config.yaml",
        yaml.safe_dump(KUBELET),
    )
    write(folder / "config.yaml", yaml.safe_dump({"stateDir": str(folder / "state"), "auditDays": 7}))
    agent = filled(folder, scan(SysFs(tree.root), load_kinds()))
    async with pages_of(agent, folder / "s"):
        yield Around(folder, tree.root, agent)
    await agent.close()


def filled(folder: Path, inventory: object) -> Agent:
    """A ledger with a pod, a claim, a refusal and a pod that has gone."""
    names = {"namespace": NAMES[0], "pod": NAMES[1], "container": NAMES[2]}
    holder = Holder(api=DEVICE_PLUGIN, resource="nodeagent.dev/cpu", **names)
    one = Grant(id="g-1", holder=holder, cpus=CpuSet([1, 2]), ids=("cpu1", "cpu2"), pods=(POD_UID,), confirmed=True)
    claim = Holder(api=CLAIM, resource="char.x", namespace=NAMES[0], claim=NAMES[3], uid=CLAIM_UID)
    other = Grant(id=f"{CLAIM_UID}-0", holder=claim, devices=("/dev/ttyS0",), pods=(POD_UID,))
    gone = replace(one, id="g-2", holder=replace(holder, pod=NAMES[5]), cpus=CpuSet([3]), ids=("cpu3",))
    store = Store(folder / "state")
    store.save([Change(action=GRANTED, grant=grant) for grant in (one, other, gone)], op="a", at=1e9)
    store.save([Change(action=RELEASED, grant=gone, why=f"{NAMES[4]} is drained")], op="b", at=1e9 + 1)
    refusal = Refusal(holder=f"claim {NAMES[0]}/{NAMES[3]} of {NAMES[6]}", want=f"{NAMES[4]}/cpu/numa0", why="1 free")
    store.record_refusals([refusal], op="c", at=1e9 + 2)

    async def listing() -> tuple[()]:
        return ()

    return Agent(store, inventory, AgentSettings(boot_id="boot"), listing)  # type: ignore[arg-type]


async def captured(around: Around, *more: str) -> Path:
    path = around.folder / f"c{len(more)}.tar.zst"
    assert await asyncio.to_thread(main, around.words("-o", str(path), *more)) == 0
    return path


async def test_a_capture_has_the_node_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with around(folder, monkeypatch) as node:
        path = await captured(node)
    manifest, files, links = contents(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (manifest.format, manifest.host, manifest.anonymized) == (1, NAMES[4], False)
    assert manifest.members >= len(files) + len(links)
    pod = f"tree/sys/fs/cgroup/kubepods.slice/kubepods-pod{POD_UID.replace('-', '_')}.slice"
    assert files[f"{pod}/cri-containerd-{CONTAINER_ID}.scope/cpuset.cpus"] == b"1-2\n"
    assert not files.get(f"{pod}/memory.secret_file")
    assert {one["pod"] for one in json.loads(files["pages/v1/grants.json"])} == {NAMES[1], ""}
    assert b"nodeagent_grants 1" in files["pages/metrics.txt"]
    assert json.loads(files["kubelet/cpu_manager_state"])["entries"] == {POD_UID: {NAMES[2]: "1-2"}}
    assert yaml.safe_load(files["config/config.yaml"])["auditDays"] == 7
    assert set(json.loads(files["versions.json"])) >= {"nodeagent", "python", "kernel"}
    assert [one for one in manifest.missing if one.startswith("/v1")] == []


async def test_a_capture_has_no_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernel's command line and of configurations."""
    async with around(folder, monkeypatch) as node:
        _, files, _ = contents(await captured(node))
    assert files["tree/proc/cmdline"] == f"quiet ip={ADDRESS} wifi.password=REDACTED\n".encode()
    assert yaml.safe_load(files["kubelet/config.yaml"])["staticPodURLHeader"] == {"X-Token": ["REDACTED"]}


async def test_an_anonymous_capture_has_no_name_address_or_serial_in_any_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in a name of a file, a link, or in what the ledger's file has left of what it replaced."""
    async with around(folder, monkeypatch) as node:
        whole = await captured(node)
        path = await captured(node, "--anonymize")
    _, before, links_before = contents(whole)
    everything = b"".join((*before.values(), *map(str.encode, before), *map(str.encode, links_before)))
    lacking = [one for one in SECRETS if one.encode() not in everything]
    assert lacking == []
    manifest, files, links = contents(path)
    for secret in SECRETS:
        for name, content in files.items():
            assert secret.encode() not in content and secret not in name, (secret, name)
        assert not [one for one in links.items() if secret in "".join(one)]
        assert secret not in json.dumps(manifest.missing) and manifest.host != secret


async def test_the_same_thing_has_the_same_replacement_everywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger, the pages, kubelet's files and the cgroups still fit together, and the ledger is whole."""
    async with around(folder, monkeypatch) as node:
        path = await captured(node, "--anonymize")
    _, files, _ = contents(path)
    grants = {one["resource"]: one for one in json.loads(files["pages/v1/grants.json"])}
    uid = grants["nodeagent.dev/cpu"]["pod_uids"][0]
    assert [*json.loads(files["kubelet/cpu_manager_state"])["entries"]] == [uid]
    assert any(f"kubepods-pod{uid.replace('-', '_')}.slice" in name for name in files)
    with contextlib.closing(opened_store(folder / "again", files[f"state/{FILE}"])) as store:
        assert store.note == "" and store.loss == ""
        held = {one.holder.resource: one for one in store.load()}
    cpu = held["nodeagent.dev/cpu"]
    shown = grants["nodeagent.dev/cpu"]
    assert (cpu.holder.namespace, cpu.holder.pod, cpu.holder.container) == (
        shown["namespace"], shown["pod"], shown["container"],
    )  # fmt: skip
    assert held["char.x"].id == grants["char.x"]["id"] == f"{held['char.x'].holder.uid}-0"
    capsys.readouterr()
    assert main(["replay", str(path), "history", "-o", "jsonl"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["action"] for one in told] == ["granted", "granted", "granted", "released", "refused"]
    assert told[0]["holder"] == str(cpu.holder) and told[0]["cpus"] == "1-2"


def opened_store(folder: Path, content: bytes) -> Store:
    folder.mkdir()
    (folder / FILE).write_bytes(content)
    return Store(folder)


# ---------------------------------------------------------------- every place of a name


def everywhere(folder: Path, name: Mapping[str, str]) -> Members:
    """A capture in which each name stands in every place where a node has it, and some in one place alone."""
    whose = f"{name['namespace']}/{name['pod']}/{name['container']}"
    claim = f"{name['namespace']}/{name['claim']}"
    answer = base64.b64encode(f"\n\x04GRANT\x12{name['env']}".encode()).decode()
    pods = [{"PodUID": POD_UID, "ContainerName": name["container2"], "ResourceName": "a/b", "AllocResp": answer}]
    claims = {"ClaimInfoStateList": [{"ClaimUID": CLAIM_UID, "ClaimName": name["claim2"], "Namespace": "default"}]}
    lines = [
        {"event": "drift", "whose": f"{name['namespace2']}/{name['pod2']}/{name['container3']}", "files": []},
        {"event": "pinned", "name": whose, "container": CONTAINER_ID},
        {"event": "claim-not-prepared", "claim": f"{name['namespace3']}/{name['claim3']}", "error": "no"},
        {"event": "x", "error": f"cannot prepare claim {name['namespace3']}/{name['claim4']}: 1 is free"},
        {"event": "x", "error": f"cannot start container {name['namespace3']}/{name['pod3']}/{name['container4']}: no"},
        {"event": "x", "error": f"cannot find nodes {name['node2']}: kubelet has not registered it"},
        {"event": "x", "pod": name["pod4"], "holders": [f"claim {claim}", "kubepods/burstable/pod1"]},
    ]
    with contextlib.closing(Store(folder)) as store:
        wrong = "cpuset.cpus: '6', not '4-5'"
        drift = Happening(action="drift", what=f"{name['namespace']}/{name['pod5']}/{name['container5']}: {wrong}")
        store.record_happenings([drift], at=1e9)
        store.record_refusals([Refusal(holder="", want="1", why=f"cannot prepare claim {claim}: no")], op="", at=1e9)
    log = [f"2026-11-29T21:08:26+0000 {name['host']} nodeagent[7]: {json.dumps(one)}" for one in lines]
    console = f"drift  error= whose={name['namespace2']}/{name['pod6']}/{name['container']}"
    yaml_of = {"config": {"dra": {"nodeName": name["node"]}}, "kubelet": {"providerID": f"aws:///z/{name['provider']}"}}
    files: dict[str, Any] = {
        "kubelet/cpu_manager_state": {"policyName": "static", "entries": {POD_UID: {name["container6"]: "1-2"}}},
        "kubelet/memory_manager_state": {"entries": {POD_UID: {name["container7"]: [{"size": 1}]}}},
        "kubelet/device-plugins/kubelet_internal_checkpoint": {"Data": {"PodDeviceEntries": pods}, "Checksum": 1},
        "kubelet/dra_manager_state": {"Data": json.dumps(claims), "Checksum": 1},
        "pages/v1/status.json": {
            "notes": [f"pod {name['namespace']}/{name['pod']} has claim {claim}"],
            "not_ready": [],
        },
        "pages/v1/grants.json": [{"namespace": name["namespace"], "pod": name["pod"], "container": name["container"]}],
    }
    command = ["kubelet", f"--hostname-override={name['node3']}", f"--provider-id=x:///{name['provider2']}"]
    members = Members(files={path: json.dumps(one).encode() for path, one in files.items()})
    members.files |= {
        "config/config.yaml": yaml.safe_dump(yaml_of["config"]).encode(),
        "kubelet/config.yaml": yaml.safe_dump(yaml_of["kubelet"]).encode(),
        "log.txt": "\n".join([*log, console]).encode(),
        "tree/proc/812/cmdline": "\0".join(command).encode(),
        f"state/{FILE}": (folder / FILE).read_bytes(),
    }
    return members


PLACES = (
    *("namespace", "namespace2", "namespace3", "host", "env", "provider", "provider2", "node", "node2", "node3"),
    *(f"pod{number}" for number in ("", 2, 3, 4, 5, 6)),
    *(f"container{number}" for number in ("", 2, 3, 4, 5, 6, 7)),
    *(f"claim{number}" for number in ("", 2, 3, 4)),
)


def some_names(seed: int) -> dict[str, str]:
    """A name for each place that nothing else in a capture contains, short and long ones."""
    draw, found = random.Random(seed), dict[str, str]()
    while len(found) < len(PLACES):
        middle = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 10)))
        found[f"zq{middle}{draw.choice(('q', '-7', '-x-y', '0'))}"] = ""
    return dict(zip(PLACES, found, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_no_name_of_a_node_is_anywhere_in_an_anonymous_capture(seed: int) -> None:
    """Whatever it names, however long it is, and also where it stands in one place alone. What is no name stays."""
    name = some_names(seed)
    with tempfile.TemporaryDirectory() as folder:
        before = everywhere(Path(folder), name)
    whole = b"".join(before.files.values())
    assert [one for place, one in name.items() if one.encode() not in whole and place != "env"] == []
    after, _ = anonymized(before, name["host"])
    for path, content in after.files.items():
        for place, one in name.items():
            assert one.encode() not in content and one not in path, (place, one, path)
    states = json.loads(after.files["kubelet/cpu_manager_state"])
    assert next(iter(states["entries"].values())).popitem()[1] == "1-2"
    (pod,) = json.loads(after.files[f"kubelet/{collect.CHECKPOINT}"])["Data"]["PodDeviceEntries"]
    assert (pod["AllocResp"], pod["ResourceName"]) == ("", "a/b")
    log = after.files["log.txt"].decode()
    assert "cpuset" not in log and "kubepods/burstable/pod1" in log and '"event": "claim-not-prepared"' in log


# ---------------------------------------------------------------- the file


async def test_a_file_that_exists_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a link to nothing; and a folder that is not there is not made."""
    there, link = folder / "there", folder / "link"
    there.write_text("mine")
    link.symlink_to(folder / "nothing")
    async with around(folder, monkeypatch) as node:
        for path, why in (
            (there, "it exists, and a capture never replaces a file"),
            (link, "it exists, and a capture never replaces a file"),
            (folder / "none/c", "No such file or directory"),
        ):
            capsys.readouterr()
            assert await asyncio.to_thread(main, node.words("-o", str(path))) == 2
            assert capsys.readouterr().err == f"nodeagent: cannot write {path}: {why}\n"
    assert there.read_text() == "mine" and not (folder / "nothing").exists()
    assert drafts(folder, r".*") == []


async def test_a_node_without_an_agent_is_captured_and_says_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = machine(folder / "root", "1s1n4c")
    monkeypatch.chdir(folder)
    words = ["--socket", "/none", "--state-dir", "/none", "--kubelet-dir", "/none"]
    assert main(["capture", "--root", str(root), *words]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"nodeagent-.+-\d{8}T\d{6}Z\.tar\.zst\n", out)
    assert "nodeagent: not captured: pages: cannot ask the agent at /none: No such file or directory\n" in err
    assert "nodeagent: not captured: ledger: unable to open database file\n" in err
    assert main(["replay", out.strip(), "status"]) == 1
    why = "cannot ask the agent at /none: No such file or directory"
    assert capsys.readouterr().err == f"nodeagent: cannot read /v1/status of {out.strip()}: {why}\n"


# ---------------------------------------------------------------- parts


def test_what_is_recorded_reads_the_same_again(folder: Path) -> None:
    """Through links of links, up and down; what was only listed is a name."""
    root = folder / "root"
    write(root / "sys/devices/pci0/nic/net/eth0/address", "aa\n")
    write(root / "sys/devices/pci0/nic/numa_node", "1\n")
    (root / "sys/class/net").mkdir(parents=True)
    (root / "sys/class/net/eth0").symlink_to("../../devices/pci0/nic/net/eth0")
    (root / "sys/devices/pci0/nic/net/eth0/device").symlink_to("../../../nic")
    (root / "sys/all").symlink_to("class")
    sysfs = RecordingSysFs(root)
    again = folder / "again"

    def read(one: SysFs) -> tuple[object, ...]:
        return (
            one.names("sys/all/net"), one.text("sys/all/net/eth0/device/numa_node"), one.text("sys/none", "no"),
            one.exists("sys/class/net/eth0/address"), one.exists("sys/class/net/eth1"),
            one.names("sys/devices/pci0/nic"),
            one.link("sys/class/net/eth0"), one.real("sys/class/net/eth0/device"), one.link_name("sys/all"),
        )  # fmt: skip

    first = read(sysfs)
    for path, content in sysfs.tree():
        write(again / path, content.decode())
    for one in sysfs.folders:
        (again / one).mkdir(parents=True, exist_ok=True)
    for path, target in sysfs.links.items():
        (again / path).parent.mkdir(parents=True, exist_ok=True)
        (again / path).symlink_to(target)
    assert read(SysFs(again)) == first


def test_an_absolute_link_is_recorded_relative_to_its_folder(folder: Path) -> None:
    """It would lead to the machine that replays it."""
    (folder / "a").mkdir()
    (folder / "a/link").symlink_to(folder / "b")
    sysfs, name = RecordingSysFs("/"), str(folder / "a/link")[1:]
    assert sysfs.link(name) == str(folder / "b")
    assert sysfs.links[name] == "../b"


def test_a_device_node_is_a_name_with_its_numbers() -> None:
    sysfs = RecordingSysFs("/")
    assert sysfs.exists("dev/null")
    assert sysfs.nodes == {"dev/null": DeviceNode("c", 1, 3)} and [*sysfs.tree()] == [("dev/null", b"")]


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("--token=abc --x=1", "--token=REDACTED --x=1"),
        ("--token abc -v", "--token REDACTED -v"),
        ("password: hunter2", "password: REDACTED"),
        ("https://user:pass@host/x", "https://REDACTED@host/x"),
        ("HTTP://user:pa/ss@host/x", "HTTP://REDACTED@host/x"),
        ("--kubeconfig=/etc/kubernetes/kubelet.conf", "--kubeconfig=/etc/kubernetes/kubelet.conf"),
        ("tokenFile: /etc/token", "tokenFile: /etc/token"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer REDACTED"),
        ("-----BEGIN RSA PRIVATE KEY-----\nx\n-----END RSA PRIVATE KEY-----", "REDACTED"),
    ],
)
def test_secrets_are_hidden_and_paths_of_secrets_are_not(text: str, hidden: str) -> None:
    assert redact.text(text) == hidden


def test_secrets_of_a_configuration_are_hidden_whatever_their_type_and_place() -> None:
    given = {
        "password": 123456,
        "env": [{"name": "DB_PASSWORD", "value": "hunter2"}, {"name": "HOME", "value": "/root"}],
        "args": ["--client-secret", "hunter2", "-v"],
        "tokenFile": "/etc/token",
        "useToken": True,
    }
    assert redact.document(given) == {
        "password": "REDACTED",
        "env": [{"name": "DB_PASSWORD", "value": "REDACTED"}, {"name": "HOME", "value": "/root"}],
        "args": ["--client-secret", "REDACTED", "-v"],
        "tokenFile": "/etc/token",
        "useToken": True,
    }


def test_a_replacement_has_the_form_of_what_it_replaces() -> None:
    names = Pseudonyms(b"key")
    for text in (POD_UID, "GPU-" + POD_UID, CONTAINER_ID, MAC, "10.1.2.3", "fe80::1234:5678", "0002:c903:00a1:b2c4"):
        other = names.special(text)
        assert other != text and other == names.special(text)
        assert re.sub(r"[0-9a-f]+", "", other).replace(".", "").replace(":", "") in (
            re.sub(r"[0-9a-f]+", "", text).replace(".", "").replace(":", ""), "",
        )  # fmt: skip
    for text in ("0000:3b:00.0", "0-3,8", "127.0.0.1", "03:12:07", "/dev/fuse::3", "00:00:00:00:00:00", "5.15.0-1"):
        assert names.special(text) == text
    assert names.special(POD_UID.replace("-", "_")) == names.special(POD_UID).replace("-", "_")


def test_a_name_that_is_a_common_word_is_replaced_where_it_is_a_name() -> None:
    names = Pseudonyms(b"key")
    names.add("pod", "cpu")
    names.protect(["cpu"])
    assert names.text('{"cpu": 1}') == '{"cpu": 1}' and names.name("pod", "cpu") == "pod-1"
    names.add_claim("web-gpus-x7k2p", "gpus")
    assert re.fullmatch(r"pod-2-podclaim-1-[0-9a-f]{5}", names.text("web-gpus-x7k2p"))
    assert names.text("the web, web-server") == "the pod-2, web-server"
