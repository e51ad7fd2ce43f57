"""The image in a container runtime, found and started as kubelet would."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nodeagent.version import VERSION
from tests.image.containerd import Containerd, containerd, lacking
from tests.rules.test_deploy import container

if TYPE_CHECKING:
    from image.build import Image

REFERENCE = f"localhost/nodeagent:{VERSION}"
OWN = ("/sys", "/sys/fs/cgroup", "/dev")
"""What ctr mounts itself."""


@pytest.fixture(scope="module")
def runtime(image: Image) -> Iterator[Containerd]:
    """A containerd that has the image. Its folder has a short name, for its sockets."""
    if reason := lacking():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="na-image-") as folder, containerd(Path(folder)) as started:
        started.load(image.archive)
        yield started


def test_a_pod_finds_the_image_by_the_name_in_the_daemonset(runtime: Containerd) -> None:
    assert REFERENCE in runtime.ctr("images", "ls", "-q").split()
    assert REFERENCE.encode() in runtime.image_status(REFERENCE)
    assert runtime.image_status("nodeagent:another") == b""


def test_it_starts_and_sees_the_machine(runtime: Containerd) -> None:
    assert runtime.run(REFERENCE, ("--read-only",), "nodeagent", "--version").startswith(f"nodeagent {VERSION} ")
    shown = runtime.run(REFERENCE, ("--read-only", "--net-host"), "nodeagent", "inventory", "-o", "json")
    assert json.loads(shown)["cpus"]


CHECK = """
import json, os, sys
written = []
for path in json.loads(sys.argv[1]):
    with open(f"{path}/probe", "w"):
        written.append(path)
capabilities = dict(line.split(":") for line in open("/proc/self/status"))["CapEff"].strip()
print(json.dumps({"written": written, "capabilities": capabilities, "uid": os.getuid()}))
"""


def test_it_writes_where_the_daemonset_mounts_and_has_no_capability(runtime: Containerd, tmp_path: Path) -> None:
    """Root without capabilities on a root file system that cannot be written to: what is mounted at each of the paths
    is the host's folder, also below /var/run, which is a link."""
    words, folders = ["--read-only", *(f"--cap-drop={one}" for one in CAPABILITIES)], []
    for mount in container()["volumeMounts"]:
        path, source = mount["mountPath"], tmp_path / mount["mountPath"].strip("/")
        if path not in OWN:
            source.mkdir(parents=True)  # as on the host: what lies in a folder that cannot be written to is there
            mode = "ro" if mount.get("readOnly") else "rw"
            words += ["--mount", f"type=bind,src={source},dst={path},options=rbind:{mode}"]
            folders += [(path, source)] if mode == "rw" else []
    paths = [path for path, _ in folders]
    answer = json.loads(runtime.run(REFERENCE, tuple(words), "python", "-c", CHECK, json.dumps(paths)))
    assert answer == {"written": paths, "capabilities": "0" * 16, "uid": 0}
    assert all((source / "probe").exists() for _, source in folders)


CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
        *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
)
"""What containerd gives a container that asks for nothing."""
