"""The container runtime that makes the guest's pods: what differs between runtimes is here and nowhere else.

    NODEAGENT_VM_RUNTIME=containerd | crio | crio-crun    make vm-test

`containerd`, the default, is that of the guest's distribution. CRI-O's binaries come from the folder NODEAGENT_E2E_BIN:
`crio`, `conmon` and `pinns`; with `crio` the guest's runc runs the containers, with `crio-crun` a `crun` from that
folder does. Shared libraries that these need and the guest does not have lie in its folder `lib`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.vm.vmguest import Guest

VARIABLE, FOLDER = "NODEAGENT_VM_RUNTIME", "NODEAGENT_E2E_BIN"
IMAGE = "localhost/busybox:vm"
SOCKET = "/run/vm-cri.sock"
"""Leads to the socket of the runtime that runs: inside/pods.py calls it there."""
COPY_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One runtime, as the tests name it and what it is made of."""

    service: str
    """Its systemd unit."""
    socket: str
    """Where it serves the container runtime interface."""
    prefix: str
    """Before the id in the name of a container's scope."""
    oci_runtime: str
    programs: tuple[str, ...] = ()
    """To be found in the folder."""
    settings: str
    """A command that prints the settings in force."""
    cdi: str
    """What that has where CDI is on."""

    def prepare(self, guest: Guest) -> None:
        """Start it with NRI and CDI on, and with the one image that pods are made of."""
        guest.run(f"python3 /share/inside/ociimage.py /bin/busybox {IMAGE} /run/busybox.tar")
        if self.service == "crio":
            _prepare_crio(guest, self)
        else:
            _prepare_containerd(guest)
        guest.run(f"ln -sfn {self.socket} {SOCKET}")
        if self.service == "crio":
            _pull(guest)


_CRIO = ("crio", "conmon", "pinns")
CONTAINERD = Runtime(
    service="containerd",
    socket="/run/containerd/containerd.sock",
    prefix="cri-containerd",
    oci_runtime="runc",
    settings="containerd config dump",
    cdi="enable_cdi = true",
)
RUNTIMES = {
    "containerd": CONTAINERD,
    "crio": Runtime(
        service="crio",
        socket="/run/crio/crio.sock",
        prefix="crio",
        oci_runtime="runc",
        programs=_CRIO,
        settings="crio status config",
        cdi="/var/run/cdi",
    ),
    "crio-crun": Runtime(
        service="crio",
        socket="/run/crio/crio.sock",
        prefix="crio",
        oci_runtime="crun",
        programs=(*_CRIO, "crun"),
        settings="crio status config",
        cdi="/var/run/cdi",
    ),
}


def chosen() -> Runtime:
    """The runtime that the environment names. ValueError where it names none."""
    name = os.environ.get(VARIABLE, "") or "containerd"
    if name not in RUNTIMES:
        raise ValueError(f"cannot run {VARIABLE}={name}: it is not one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


RUNTIME = chosen()


def missing(runtime: Runtime) -> str | None:
    """Why a runtime cannot run here; None where it can."""
    absent = [one for one in runtime.programs if not os.access(_folder() / one, os.X_OK)]
    return f"no {runtime.service}: missing in {FOLDER}={_folder()}: {', '.join(absent)}" if absent else None


def _folder() -> Path:
    return Path(os.environ.get(FOLDER) or "/nonexistent")


def _prepare_containerd(guest: Guest) -> None:
    guest.run("install -D -m 644 /share/inside/containerd.toml /etc/containerd/config.toml")
    guest.run("systemctl restart containerd")
    guest.run("ctr -n k8s.io images import /run/busybox.tar")


def _prepare_crio(guest: Guest, runtime: Runtime) -> None:
    """In containerd's place: both would serve NRI at the same socket."""
    guest.run("systemctl disable --now containerd")
    given = guest.share / "crio"
    (given / "bin").mkdir(parents=True)
    for program in runtime.programs:
        shutil.copy(_folder() / program, given / "bin")
    guest.run("install -m 755 -t /usr/local/bin /share/crio/bin/*", COPY_S)
    if (_folder() / "lib").is_dir():
        shutil.copytree(_folder() / "lib", given / "lib")
        guest.run("install -m 644 -t /usr/local/lib /share/crio/lib/* && ldconfig", COPY_S)
    for file, place in (
        ("crio.toml", "/etc/crio/crio.conf"),
        ("registries.toml", "/etc/containers/registries.conf"),
        ("policy.json", "/etc/containers/policy.json"),
        ("crio.service", "/etc/systemd/system/crio.service"),
    ):
        guest.run(f"install -D -m 644 /share/inside/crio/{file} {place}")
    guest.run(f"sed -i 's/^default_runtime = .*/default_runtime = \"{runtime.oci_runtime}\"/' /etc/crio/crio.conf")
    guest.run("systemctl daemon-reload && systemctl start crio")


def _pull(guest: Guest) -> None:
    """CRI-O imports no archives: a registry in the guest serves the image as long as that is pulled."""
    registry = f"/share/inside/registry.py /run/busybox.tar {IMAGE.split('/')[1]}"
    guest.run(f"systemd-run -q --unit=vm-registry python3 {registry}")
    guest.run("until python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 80))'; do sleep 0.2; done", 60)
    guest.run("/opt/nodeagent/bin/python /share/inside/pods.py pull '{}'")
    guest.run("systemctl stop vm-registry")
