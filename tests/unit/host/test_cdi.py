"""CDI files and claim metadata: what a runtime reads, and that no reader ever sees half of it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from nodeagent.core.model.device import ContainerEdits, DeviceNode, Hook, Mount
from nodeagent.errors import HostError, InputError
from nodeagent.host.cdi import CdiDevice, CdiFolder, ClaimFiles, NodeFacts, node_facts, spec
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.host.sysfs.sysfs import SysFs
from tests.support.paths import CHECKOUT

DRIVER, KIND = "nodeagent.dev", "nodeagent.dev/claim"
UID, OTHER = "6f1c1f9e-0a5c-4a40-8d3e-57a4ad0ce4a5", "a6a1b0f2-2f0c-4b5e-9e2b-0c8e3c2b7d11"
LIVE = SysFs("/")


def env(**values: str) -> ContainerEdits:
    return ContainerEdits(env=MappingProxyType(values))


def node(host: str, inside: str = "", permissions: str = "rw") -> ContainerEdits:
    one = DeviceNode(host_path=host, container_path=inside or host, permissions=permissions)
    return ContainerEdits(device_nodes=(one,))


def mounts(*found: Mount) -> ContainerEdits:
    return ContainerEdits(mounts=found)


def device(edits: ContainerEdits, name: str = "device-0") -> CdiDevice:
    return CdiDevice(name=name, edits=edits)


def document(*devices: CdiDevice, kind: str = KIND, sysfs: SysFs = LIVE) -> Any:
    return json.loads(spec(kind, devices, node_facts(sysfs, devices)))


def edits_of(edits: ContainerEdits) -> Any:
    return document(device(edits))["devices"][0]["containerEdits"]


@pytest.fixture
def cdi(tmp_path: Path) -> CdiFolder:
    return CdiFolder(tmp_path / "run" / "cdi", DRIVER, LIVE)


def cdi_files(tmp_path: Path) -> list[str]:
    return sorted(entry.name for entry in (tmp_path / "run" / "cdi").iterdir())


ONE = device(env(NODEAGENT_CPUS="0-3"))


# ---------------------------------------------------------------- the document


def test_a_spec_says_all_that_a_container_gets() -> None:
    edits = ContainerEdits(
        env=MappingProxyType({"B": "2=2", "A": ""}),
        device_nodes=(DeviceNode(host_path="/dev/null", container_path="/dev/nothing", permissions="rwm"),),
        mounts=(Mount(host_path="/run/claim", container_path="/claim"),),
        annotations=MappingProxyType({"for": "kubelet"}),
        cdi_devices=("nvidia.com/gpu=0",),
    )
    assert document(device(edits)) == {
        "cdiVersion": "0.5.0",
        "kind": KIND,
        "devices": [
            {
                "name": "device-0",
                "containerEdits": {
                    "env": ["A=", "B=2=2"],
                    "deviceNodes": [
                        {
                            "path": "/dev/nothing",
                            "hostPath": "/dev/null",
                            "type": "c",
                            "major": 1,
                            "minor": 3,
                            "fileMode": stat.S_IMODE(os.stat("/dev/null").st_mode),
                            "permissions": "rwm",
                        }
                    ],
                    "mounts": [
                        {
                            "hostPath": "/run/claim",
                            "containerPath": "/claim",
                            "options": ["ro", "nosuid", "nodev", "bind"],
                        }
                    ],
                },
            }
        ],
    }


@pytest.mark.parametrize(
    ("version", "kind", "one"),
    [
        ("0.3.0", KIND, device(env(A="1"))),
        ("0.3.0", KIND, device(node("/dev/null"))),
        ("0.3.0", KIND, device(mounts(Mount(host_path="/a", container_path="/b")))),
        ("0.4.0", KIND, device(mounts(Mount(host_path="none", container_path="/b", type="hugetlbfs")))),
        ("0.5.0", KIND, device(node("/dev/null", "/dev/nothing"))),
        ("0.5.0", KIND, device(env(A="1"), name="0-device")),
        ("0.6.0", "nodeagent.dev/claim.v2", device(env(A="1"))),
    ],
)
def test_a_spec_states_the_lowest_version_that_has_what_it_uses(version: str, kind: str, one: CdiDevice) -> None:
    assert document(one, kind=kind)["cdiVersion"] == version
    assert document(device(env(A="1"), name="plain"), one, kind=kind)["cdiVersion"] == version


def test_the_same_is_written_in_the_same_bytes() -> None:
    one, other = device(env(A="1", B="2")), device(env(B="2", A="1"))
    assert spec(KIND, [one], {}) == spec(KIND, [other], {})


def test_a_mount_with_a_type_is_a_file_system_of_its_own() -> None:
    pages = Mount(
        host_path="nodev", container_path="/hp", read_only=False, type="hugetlbfs", options=("pagesize=2M", "nodev")
    )
    assert edits_of(mounts(pages))["mounts"] == [
        {
            "hostPath": "nodev",
            "containerPath": "/hp",
            "options": ["rw", "nosuid", "nodev", "pagesize=2M"],
            "type": "hugetlbfs",
        }
    ]


def test_the_group_of_a_node_is_the_hosts_and_root_is_left_to_the_runtime() -> None:
    facts = NodeFacts(type="c", major=226, minor=128, mode=0o660, uid=0, gid=44)
    found = json.loads(spec(KIND, [device(node("/dev/dri/renderD128"))], {"/dev/dri/renderD128": facts}))
    assert found["devices"][0]["containerEdits"]["deviceNodes"] == [
        {
            "path": "/dev/dri/renderD128",
            "type": "c",
            "major": 226,
            "minor": 128,
            "fileMode": 0o660,
            "permissions": "rw",
            "gid": 44,
        }
    ]


def test_facts_are_those_of_the_node_itself(tmp_path: Path) -> None:
    pipe = tmp_path / "dev" / "pipe"
    pipe.parent.mkdir()
    os.mkfifo(pipe, 0o640)
    pipe.chmod(0o640)
    (tmp_path / "dev" / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        facts = node_facts(SysFs(tmp_path), [device(node(f"/dev/{name}"))])[f"/dev/{name}"]
        assert (facts.type, facts.mode, facts.uid, facts.gid) == ("p", 0o640, os.getuid(), os.stat(pipe).st_gid)


def test_a_captured_tree_has_no_nodes_and_the_runtime_finds_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "file").touch()
    found = [device(node("/dev/absent"), "a"), device(node("/dev/file"), "b")]
    assert node_facts(SysFs(tmp_path), found) == {}
    assert document(found[0], sysfs=SysFs(tmp_path))["devices"][0]["containerEdits"]["deviceNodes"] == [
        {"path": "/dev/absent", "permissions": "rw"}
    ]


@pytest.mark.parametrize(
    ("path", "cause"),
    [("/dev/nodeagent-absent", "No such file or directory"), ("/etc/passwd", "it is not a device node")],
)
def test_on_the_machine_itself_a_missing_node_is_named(cdi: CdiFolder, path: str, cause: str) -> None:
    with pytest.raises(HostError, match=f"cannot give {path} to a container: {cause}"):
        cdi.write(UID, [device(node(path))])
    assert cdi.uids() == frozenset()


@pytest.mark.parametrize(
    ("devices", "problem"),
    [
        ([], "without devices"),
        ([ONE, ONE], "it stands twice"),
        ([device(ContainerEdits())], "it gives a container nothing"),
        ([device(ContainerEdits(annotations=MappingProxyType({"a": "b"})))], "it gives a container nothing"),
        ([device(env(**{"": "x"}))], "is no environment variable"),
        ([device(env(**{"A=B": "x"}))], "is no environment variable"),
        ([device(env(A="x\0y"))], "is no environment variable"),
        ([device(env(A="1"), name="")], "cannot use '' as CDI device"),
        ([device(env(A="1"), name="-a")], "cannot use '-a' as CDI device"),
        ([device(env(A="1"), name="a.")], "cannot use 'a.' as CDI device"),
        ([device(env(A="1"), name="a/b")], "cannot use 'a/b' as CDI device"),
        ([device(env(A="1"), name="a\n")], "as CDI device"),
    ],
)
def test_what_every_runtime_would_pass_over_is_refused(devices: list[CdiDevice], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        spec(KIND, devices, {})


@pytest.mark.parametrize("kind", ["", "nodeagent.dev", "/claim", "1st.dev/claim", "a/b/c", "a-/claim", "a/_b", "a b/c"])
def test_a_kind_is_a_vendor_and_a_class(kind: str) -> None:
    with pytest.raises(InputError, match="CDI kind"):
        spec(kind, [ONE], {})


# ---------------------------------------------------------------- the folder


def test_a_device_has_a_name_that_every_runtime_takes(cdi: CdiFolder) -> None:
    assert cdi.device_id(UID, "gpu-0") == f"nodeagent.dev/claim={UID}-gpu-0"
    assert cdi.device_name(UID, "gpu-0") == f"{UID}-gpu-0"


@pytest.mark.parametrize("uid", ["", "..", "../x", "a/b", "-a", "a b", "x" * 129, "a\n"])
def test_a_uid_leads_nowhere_else(cdi: CdiFolder, tmp_path: Path, uid: str) -> None:
    for call in (
        lambda: cdi.write(uid, [ONE]),
        lambda: cdi.remove(uid),
        lambda: cdi.device_id(uid, "a"),
        lambda: ClaimFiles(tmp_path).remove(uid),
        lambda: ClaimFiles(tmp_path).write(uid, {}),
    ):
        with pytest.raises(InputError, match="cannot name files after claim"):
            call()


def test_a_driver_that_cdi_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="CDI vendor"):
        CdiFolder(tmp_path, "1st.example.com", LIVE)


def test_a_claims_file_is_written_where_runtimes_look_and_readable(cdi: CdiFolder, tmp_path: Path) -> None:
    cdi.write(UID, [ONE])
    path = tmp_path / "run" / "cdi" / f"nodeagent.dev-claim_{UID}.json"
    assert json.loads(path.read_bytes())["kind"] == KIND
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert cdi_files(tmp_path) == [path.name]
    assert cdi.uids() == {UID}


def test_what_is_there_already_is_not_written_again(cdi: CdiFolder, tmp_path: Path) -> None:
    cdi.write(UID, [ONE])
    path = tmp_path / "run" / "cdi" / f"nodeagent.dev-claim_{UID}.json"
    before = path.stat()
    cdi.write(UID, [ONE])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    cdi.write(UID, [device(env(NODEAGENT_CPUS="4-7"))])
    assert path.stat().st_ino != before.st_ino
    assert b"4-7" in path.read_bytes()


@pytest.mark.parametrize("harm", ["cut", "other", "mode", "link", "dangling", "pipe", "gone"])
def test_a_file_that_was_tampered_with_is_made_again(cdi: CdiFolder, tmp_path: Path, harm: str) -> None:
    cdi.write(UID, [ONE])
    path = tmp_path / "run" / "cdi" / f"nodeagent.dev-claim_{UID}.json"
    good = path.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    if harm in ("link", "dangling", "pipe", "gone"):
        path.unlink()
    if harm == "link":
        elsewhere.write_bytes(good)
    {
        "cut": lambda: path.write_bytes(good[:-9]),
        "other": lambda: path.write_bytes(good.replace(b"0-3", b"0-9")),
        "mode": lambda: path.chmod(0o600),
        "link": lambda: path.symlink_to(elsewhere),
        "dangling": lambda: path.symlink_to(elsewhere),
        "pipe": lambda: os.mkfifo(path),
        "gone": lambda: None,
    }[harm]()
    cdi.write(UID, [ONE])
    assert stat.S_ISREG(path.lstat().st_mode)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o644
    assert path.read_bytes() == good


def test_a_folder_that_was_deleted_is_made_again(cdi: CdiFolder, tmp_path: Path) -> None:
    cdi.write(UID, [ONE])
    (tmp_path / "run" / "cdi" / f"nodeagent.dev-claim_{UID}.json").unlink()
    (tmp_path / "run" / "cdi").rmdir()
    assert cdi.uids() == frozenset()
    assert not cdi.remove(UID)
    assert cdi.sweep(()) == []
    cdi.write(UID, [ONE])
    assert cdi.uids() == {UID}


def test_removing_is_done_once_and_never_an_error(cdi: CdiFolder) -> None:
    cdi.write(UID, [ONE])
    assert cdi.remove(UID)
    assert not cdi.remove(UID)
    assert cdi.uids() == frozenset()


def test_a_sweep_removes_ours_and_nothing_else(cdi: CdiFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "cdi"
    cdi.write(UID, [ONE])
    cdi.write(OTHER, [ONE])
    foreign = [
        "nvidia.yaml",
        "gpu.example.com-claim_abc.json",
        "nodeagent.dev-claim_abc.yaml",
        "xnodeagent.dev-claim_abc.json",
        "nodeagentxdev-claim_abc.json",
        ".gpu.example.com-claim_abc.json.1a.tmp",
        "spec.123.tmp",
    ]
    half = f".nodeagent.dev-claim_{OTHER}.json.q1w2e3.tmp"
    for name in (*foreign, half):
        (folder / name).write_text("{")
    (folder / "nodeagent.dev-claim_x").mkdir()
    assert cdi.uids() == {UID, OTHER}
    assert cdi.sweep({UID}) == [f"nodeagent.dev-claim_{OTHER}.json", half]
    assert cdi_files(tmp_path) == sorted([*foreign, "nodeagent.dev-claim_x", f"nodeagent.dev-claim_{UID}.json"])
    assert cdi.sweep({UID}) == []


# ---------------------------------------------------------------- what goes wrong


def failure(cdi: CdiFolder) -> str:
    with pytest.raises(HostError) as error:
        cdi.write(UID, [ONE])
    return str(error.value)


def test_a_folder_that_is_a_file_is_named(cdi: CdiFolder, tmp_path: Path) -> None:
    path = tmp_path / "run" / "cdi"
    path.parent.mkdir()
    path.write_text("")
    assert failure(cdi) == f"cannot write {path}/nodeagent.dev-claim_{UID}.json: Not a directory"


def test_a_file_that_is_a_folder_is_named(cdi: CdiFolder, tmp_path: Path) -> None:
    path = tmp_path / "run" / "cdi" / f"nodeagent.dev-claim_{UID}.json"
    path.mkdir(parents=True)
    assert failure(cdi) == f"cannot write {path}: Is a directory"
    assert cdi_files(tmp_path) == [path.name]
    with pytest.raises(HostError, match=f"cannot remove {path}: Is a directory"):
        cdi.remove(UID)


def test_a_folder_that_cannot_be_made_is_not_tried_for_ever() -> None:
    folder = Path("/proc/nodeagent/cdi")
    said = failure(CdiFolder(folder, DRIVER, LIVE))
    assert said == f"cannot write {folder}/nodeagent.dev-claim_{UID}.json: No such file or directory"


@contextmanager
def room_for(bytes_: int) -> Iterator[None]:
    """Files cannot grow beyond this: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_there_is_no_room_the_old_file_stays_whole(cdi: CdiFolder, tmp_path: Path) -> None:
    cdi.write(UID, [ONE])
    with room_for(16), pytest.raises(HostError, match=f"cannot write .*{UID}.json: File too large"):
        cdi.write(UID, [device(env(A="2"))])
    assert cdi_files(tmp_path) == [f"nodeagent.dev-claim_{UID}.json"]
    cdi.write(UID, [ONE])
    assert b"0-3" in (tmp_path / "run" / "cdi" / f"nodeagent.dev-claim_{UID}.json").read_bytes()


FULL_DISK = """
import sys
import threading
from pathlib import Path
from nodeagent.core.model.device import ContainerEdits
from nodeagent.host.cdi import CdiDevice, CdiFolder
from nodeagent.host.sysfs.sysfs import SysFs
cdi = CdiFolder(Path(sys.argv[1]), "nodeagent.dev", SysFs("/"))
try:
    cdi.write("uid", [CdiDevice(name="a", edits=ContainerEdits(env={"A": "x" * int(sys.argv[2])}))])
except Exception as error:
    print(type(error).__name__, error)
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
"""


def mounted(tmp_path: Path, options: str, size: int) -> list[str]:
    """What a writer says in a mount namespace of its own, on a small tmpfs with these options."""
    steps = f'mount -t tmpfs -o {options} none "$1" && shift && exec "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", steps, "sh", str(tmp_path)]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", FULL_DISK, str(tmp_path), str(size)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode != 0 and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path: Path) -> None:
    said = mounted(tmp_path, "size=16k", 100_000)
    path = tmp_path / "nodeagent.dev-claim_uid.json"
    assert said == [f"HostError cannot write {path}: No space left on device", "[]"]


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    said = mounted(tmp_path, "ro", 1)
    path = tmp_path / "nodeagent.dev-claim_uid.json"
    assert said == [f"HostError cannot write {path}: Read-only file system", "[]"]


def test_a_reader_sees_one_version_or_the_other(cdi: CdiFolder, tmp_path: Path) -> None:
    """While one thread writes two versions in turn and another sweeps, a reader finds a whole file each time."""
    versions = [[device(env(A=letter * 20_000))] for letter in "xy"]
    cdi.write(UID, versions[0])
    path = tmp_path / "run" / "cdi" / f"nodeagent.dev-claim_{UID}.json"
    whole = {spec(KIND, version, {}) for version in versions}
    done = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for turn in range(150):
                cdi.write(UID, versions[turn % 2])
                cdi.sweep({UID})
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    read = 0
    while not done.is_set():
        assert path.read_bytes() in whole
        read += 1
    writer.join(60)
    assert not failures
    assert read > 0
    assert cdi_files(tmp_path) == [path.name]


def test_writers_of_several_claims_do_not_disturb_each_other(cdi: CdiFolder) -> None:
    failures: list[BaseException] = []

    def write(uid: str) -> None:
        try:
            for turn in range(60):
                cdi.write(uid, [device(env(TURN=str(turn)))])
        except BaseException as error:
            failures.append(error)

    uids = [f"claim-{i}" for i in range(4)]
    writers = [threading.Thread(target=write, args=(uid,)) for uid in uids]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert not failures
    assert cdi.uids() == {*uids}


@pytest.mark.parametrize("taken", ["draft", "folder"])
def test_what_is_taken_away_between_two_steps_is_made_again(
    cdi: CdiFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    folder = tmp_path / "run" / "cdi"
    real, times = os.fchmod, []

    def fchmod(handle: int, mode: int) -> None:
        real(handle, mode)
        if not times:
            times.append(handle)
            for draft in folder.iterdir():
                draft.unlink()
            if taken == "folder":
                folder.rmdir()

    monkeypatch.setattr(os, "fchmod", fchmod)
    cdi.write(UID, [ONE])
    assert times
    assert cdi_files(tmp_path) == [f"nodeagent.dev-claim_{UID}.json"]


def test_a_draft_has_a_name_that_runtimes_pass_over(
    cdi: CdiFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = os.fchmod

    def fchmod(handle: int, mode: int) -> None:
        seen.extend(cdi_files(tmp_path))
        real(handle, mode)

    monkeypatch.setattr(os, "fchmod", fchmod)
    cdi.write(UID, [ONE])
    drafts = [name for name in seen if not name.endswith(".json")]
    assert len(drafts) == 1
    assert drafts[0].startswith(f".nodeagent.dev-claim_{UID}.json.")
    assert Path(drafts[0]).suffix not in (".json", ".yaml")


# ---------------------------------------------------------------- claim metadata


def test_everybody_may_read_what_a_claim_holds(tmp_path: Path) -> None:
    """Also where the agent itself runs with a umask of its own."""
    claims = ClaimFiles(tmp_path / "claims")
    content = {"uid": UID, "devices": ({"request": "gpu", "pages": MappingProxyType({"2Mi": 4})},)}
    before = os.umask(0o077)
    try:
        claims.write(UID, content)
    finally:
        os.umask(before)
    path = tmp_path / "claims" / UID / "metadata.json"
    assert claims.path(UID) == path
    assert json.loads(path.read_bytes()) == {"uid": UID, "devices": [{"request": "gpu", "pages": {"2Mi": 4}}]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


def test_metadata_that_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    claims = ClaimFiles(tmp_path)
    claims.write(UID, {"a": 1, "b": 2})
    before = claims.path(UID).stat().st_ino
    claims.write(UID, {"b": 2, "a": 1})
    assert claims.path(UID).stat().st_ino == before


def test_metadata_goes_with_its_folder(tmp_path: Path) -> None:
    claims = ClaimFiles(tmp_path / "claims")
    claims.write(UID, {})
    claims.write(OTHER, {})
    (tmp_path / "claims" / OTHER / ".metadata.json.abc.tmp").touch()
    (tmp_path / "claims" / UID / ".metadata.json.abc.tmp").touch()
    (tmp_path / "claims" / "notes.txt").touch()
    assert claims.uids() == {UID, OTHER}
    assert claims.sweep({UID}) == [OTHER, f"{UID}/.metadata.json.abc.tmp"]
    assert claims.uids() == {UID}
    assert claims.remove(UID)
    assert not claims.remove(UID)
    assert sorted(entry.name for entry in (tmp_path / "claims").iterdir()) == ["notes.txt"]


def test_the_files_of_requests_come_and_go_with_their_requests(tmp_path: Path) -> None:
    """A stream of objects, one a line; what did not change is not written again, and drafts are removed."""
    claims = ClaimFiles(tmp_path)
    claims.write(UID, {})
    claims.write_requests(UID, {"a": [{"n": 1}, {"n": 2}], "metadata": [{"n": 3}]})
    assert claims.request_path(UID, "a").read_bytes() == b'{"n":1}\n{"n":2}\n'
    assert stat.S_IMODE(claims.request_path(UID, "a").stat().st_mode) == 0o644
    before = claims.request_path(UID, "a").stat().st_ino
    (tmp_path / UID / ".request-a.json.abc.tmp").touch()
    claims.write_requests(UID, {"a": [{"n": 1}, {"n": 2}]})
    assert claims.request_path(UID, "a").stat().st_ino == before
    assert claims.sweep({UID}) == [f"{UID}/.request-a.json.abc.tmp"]
    assert sorted(one.name for one in (tmp_path / UID).iterdir()) == ["metadata.json", "request-a.json"]
    assert claims.remove(UID)
    assert not (tmp_path / UID).exists()


@pytest.mark.parametrize("request_name", ["", "..", "../../etc", "a/b", "A", "x" * 64, "-a", "a\0", "a\n"])
def test_no_file_is_named_after_what_no_request_is_called(request_name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot name a file after request"):
        ClaimFiles(tmp_path).write_requests(UID, {request_name: []})
    assert not (tmp_path / UID).exists()


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="as JSON"):
        ClaimFiles(tmp_path).write(UID, {"a": object()})
    assert ClaimFiles(tmp_path).uids() == frozenset()


def test_a_folder_with_folders_in_it_is_not_ours_to_remove(tmp_path: Path) -> None:
    (tmp_path / UID / "deeper").mkdir(parents=True)
    with pytest.raises(HostError, match="cannot remove"):
        ClaimFiles(tmp_path).remove(UID)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(HostError, match=f"cannot list {loop}: Too many levels of symbolic links"):
        files.entries(loop)


def test_a_folder_goes_also_while_somebody_writes_into_it(tmp_path: Path) -> None:
    """As another agent may, that has not heard yet: its write comes to nothing or is there afterwards, whole."""
    claims = ClaimFiles(tmp_path)
    with ThreadPoolExecutor(1) as other:
        for number in range(300):
            claims.write("a-1", {"number": -number})
            writing = other.submit(claims.write, "a-1", {"number": number})
            claims.remove("a-1")
            with contextlib.suppress(HostError):
                writing.result()
            if claims.uids():
                assert json.loads(claims.path("a-1").read_text()) == {"number": number}
            claims.remove("a-1")
            assert not claims.uids()


def test_a_hook_is_one_of_the_container_s_creation() -> None:
    hook = Hook(path="/usr/bin/nvidia-cdi-hook", args=("nvidia-cdi-hook", "update-ldcache"))
    edits = ContainerEdits(env={"A": "1"}, hooks=(hook,))
    written = json.loads(spec("nodeagent.dev/claim", [CdiDevice(name="a", edits=edits)], {}))
    assert written["devices"][0]["containerEdits"]["hooks"] == [
        {
            "hookName": "createContainer",
            "path": "/usr/bin/nvidia-cdi-hook",
            "args": ["nvidia-cdi-hook", "update-ldcache"],
        }
    ]
