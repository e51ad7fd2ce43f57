"""A node in a guest, for all tests of a file: booted once, with the product's wheel installed and its unit running.

    make vm-test

Without that (NODEAGENT_VM=1 says it), without root, QEMU or mmdebstrap the tests are skipped and say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.vm import vmimage
from tests.vm.vmguest import LIFE_S, Guest

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
CONFIG: Mapping[str, Any] = {
    "apiVersion": "nodeagent.dev/v1alpha1",
    "kind": "NodeAgentConfiguration",
    "resyncSeconds": 3600,
    "release": {"unconfirmedSeconds": 600},
    "resources": [
        {"name": "cpu", "kind": "cpu"},
        {"name": "nvme", "kind": "nvme"},
        {"name": "hugepages-2Mi", "kind": "hugepages", "pageSize": "2Mi", "pagesPerBlock": 8},
        {"name": "fuse", "kind": "char", "paths": ["/dev/fuse"], "replicas": 10},
    ],
}
INSTALL_S = 300


def install(guest: Guest) -> None:
    """The wheel's contents, the unit and a configuration, all from the shared folder; nothing is started."""
    guest.run("tar -xf /share/installed.tar -C / --no-same-owner --keep-directory-symlink", INSTALL_S)
    guest.run("install -D -m 644 -t /etc/systemd/system /share/systemd/nodeagent.service && systemctl daemon-reload")
    guest.run("install -D -m 644 -t /etc/nodeagent /share/config.yaml")


def start_kubelet(guest: Guest) -> None:
    """The double of inside/kubelet.py."""
    guest.run("systemd-run -q --unit=vm-kubelet /opt/nodeagent/bin/python /share/inside/kubelet.py")
    guest.run("test -S /run/vm-kubelet.sock", until=True)


def start(guest: Guest) -> None:
    """Through systemd; returns when the agent says that kubelet shows every resource."""
    guest.run("systemctl enable --now --no-block nodeagent")
    guest.run("nodeagent status | grep ', ready'", until=True)


def prepare_runtime(guest: Guest) -> None:
    """containerd with NRI and CDI on, and the one image that pods are made of."""
    guest.run("install -D -m 644 /share/inside/containerd.toml /etc/containerd/config.toml")
    guest.run("install -D -m 644 -t /etc/systemd/system/service.d /share/inside/few-threads.conf")
    guest.run("systemctl daemon-reload && systemctl restart containerd")
    guest.run("python3 /share/inside/ociimage.py /bin/busybox localhost/busybox:vm /run/busybox.tar")
    guest.run("ctr -n k8s.io images import /run/busybox.tar")


def fill(share: Path, wheel: Path, config: Mapping[str, Any]) -> None:
    """What the guest finds in /share."""
    (share / "out").mkdir()
    shutil.copytree(HERE / "inside", share / "inside")
    protoc = (sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", f"--python_out={share}/inside", "cri.proto")
    subprocess.run(protoc, check=True, timeout=60)
    doubles = share / "tests" / "doubles"
    doubles.mkdir(parents=True)
    for module in ("__init__.py", "kubelet.py", "kubelet_plugins.py"):
        shutil.copy(HERE.parent / "doubles" / module, doubles)
    shutil.copy(HERE.parent / "__init__.py", share / "tests")
    shutil.copytree(HERE.parent / "pb", share / "tests" / "pb")
    support = share / "tests" / "support"
    support.mkdir()
    for module in ("__init__.py", "until.py"):
        shutil.copy(HERE.parent / "support" / module, support)
    shutil.copytree(vmimage.CHECKOUT / "systemd", share / "systemd")
    shutil.copy(wheel, share)
    (share / "config.yaml").write_text(json.dumps(config))


@contextlib.contextmanager
def started(*, life_s: float = LIFE_S, **config: Any) -> Iterator[Guest]:
    """Booted, installed, the agent started and ready. config: keys of the configuration in place of those of CONFIG.
    Skips where there can be no guest."""
    with booted(life_s=life_s, **config) as guest:
        start_kubelet(guest)
        _timed("start until ready", lambda: start(guest))
        yield guest


@contextlib.contextmanager
def booted(*, life_s: float = LIFE_S, devices: Sequence[str] = (), **config: Any) -> Iterator[Guest]:
    """Booted and installed; nothing is started. devices: more arguments of QEMU's."""
    if not os.environ.get("NODEAGENT_VM"):
        pytest.skip("tests in a guest run with `make vm-test`")
    reason = vmimage.missing()
    if reason is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        share = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="na-share-")))
        with vmimage.unshared():
            image = _timed("image", _image)
            wheel = _timed("wheel", lambda: vmimage.wheel(image / "root"))
            shutil.copy(vmimage.installed(image / "root", wheel), share)
            fill(share, wheel, {**CONFIG, **config})
        guest = stack.enter_context(Guest(image, share, life_s=life_s, devices=devices))
        print(f"vm: boot: {guest.boot_s:.1f} s", flush=True)
        _timed("install", lambda: install(guest))
        yield guest


def _image() -> Path:
    """Without a network there is nothing to make it from: that is why the tests are skipped."""
    try:
        return vmimage.image()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no guest: its image cannot be made: {error}")


def _timed(what: str, do: Callable[[], T]) -> T:
    """Do it and print how long it took."""
    began = time.monotonic()
    done = do()
    print(f"vm: {what}: {time.monotonic() - began:.1f} s", flush=True)
    return done
