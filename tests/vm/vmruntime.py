"""The container runtime that the guest's tests of pods use: NODEAGENT_VM_RUNTIME names it.

    containerd    of the guest's distribution, with runc (default)
    crio          CRI-O with the distribution's runc
    crio-crun     CRI-O with crun

CRI-O is in no distribution: the folder NODEAGENT_VM_CRIO has crio, pinns, conmon and crun, and in its lib the shared
libraries that these need and the guest lacks.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.vm import vmnode
from tests.vm.vmguest import Guest

RUNTIME, BINARIES = "NODEAGENT_VM_RUNTIME", "NODEAGENT_VM_CRIO"
PROGRAMS = ("crio", "pinns", "conmon", "crun")
COPY_S = 300.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What tests have to know of one."""

    unit: str
    prefix: str
    """Of a container's scope, before the id."""
    shown_by: str
    """The command that prints its configuration in effect."""
    prepare: Callable[[Guest], None]
    """Has it run with NRI and CDI on, and with the one image that pods are made of."""


def missing() -> str | None:
    """Why the runtime cannot run in a guest; None where it can."""
    if CHOSEN.unit != "crio":
        return None
    if BINARIES not in os.environ:
        return f"no CRI-O: {BINARIES} names no folder"
    absent = [name for name in PROGRAMS if not (Path(os.environ[BINARIES]) / name).is_file()]
    return f"no CRI-O: {', '.join(absent)} not in {os.environ[BINARIES]}" if absent else None


def _crio(guest: Guest, runtime: str) -> None:
    shutil.copytree(os.environ[BINARIES], guest.share / "crio")
    guest.run("systemctl disable --now containerd")
    guest.run(f"cd /share/crio && install -t /usr/local/bin {' '.join(PROGRAMS)}", COPY_S)
    guest.run(
        "! test -d /share/crio/lib || { install -m 644 -t /usr/local/lib /share/crio/lib/* && ldconfig; }", COPY_S
    )
    guest.run("cd /share/inside/crio && install -D -m 644 -t /etc/crio crio.conf policy.json")
    guest.run("install -D -m 644 -t /etc/containers /share/inside/crio/registries.conf")
    chosen = f'[crio.runtime]\\ndefault_runtime = "{runtime}"\\n'
    guest.run(f"mkdir -p /etc/crio/crio.conf.d && printf '{chosen}' >/etc/crio/crio.conf.d/10-runtime.conf")
    guest.run("install -D -m 644 -t /etc/systemd/system/service.d /share/inside/few-threads.conf")
    guest.run("install -m 644 -t /etc/systemd/system /share/inside/crio/crio.service")
    guest.run("systemctl daemon-reload && systemctl enable --now crio")
    guest.run("/opt/nodeagent/bin/python /share/inside/registry.py /bin/busybox")
    print(f"vm: {guest.run('crio --version | head -n 1').strip()}, {runtime}", flush=True)


def _of_crio(runtime: str) -> Runtime:
    return Runtime(
        unit="crio", prefix="crio", shown_by="crio status config", prepare=lambda guest: _crio(guest, runtime)
    )


RUNTIMES = {
    "containerd": Runtime(
        unit="containerd",
        prefix="cri-containerd",
        shown_by="containerd config dump",
        prepare=vmnode.prepare_runtime,
    ),
    "crio": _of_crio("runc"),
    "crio-crun": _of_crio("crun"),
}


def _chosen(name: str) -> Runtime:
    if name not in RUNTIMES:
        raise ValueError(f"cannot use {RUNTIME}={name}: it is none of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


CHOSEN = _chosen(os.environ.get(RUNTIME, "containerd"))
