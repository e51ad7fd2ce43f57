"""Pods in the guest: admitted by its kubelet, made through its runtime, and what can be seen of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from tests.vm.vmguest import Guest
from tests.vm.vmruntime import CHOSEN

CPU = "nodeagent.dev/cpu"
PYTHON = "/opt/nodeagent/bin/python"
PODS = f"{PYTHON} /share/inside/pods.py"
FIRST_LINES = "grep -h _allowed_list /proc/self/status; echo CPUS=$NODEAGENT_CPUS; exec sleep infinity"
CGROUPS = "/sys/fs/cgroup/kubepods.slice"


def cpus(text: str) -> set[int]:
    """ "0-2,5" -> {0, 1, 2, 5}"""
    ends = [one.split("-") for one in text.strip().split(",") if one]
    return {cpu for one in ends for cpu in range(int(one[0]), int(one[-1]) + 1)}


def listed(some: set[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5", as the kernel has it"""
    starts = [one for one in sorted(some) if one - 1 not in some]
    ends = [one for one in sorted(some) if one + 1 not in some]
    return ",".join(f"{one}" if one == last else f"{one}-{last}" for one, last in zip(starts, ends, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Admitted:
    """A pod that kubelet has admitted; `envs` is what "main" was given."""

    name: str
    uid: str
    envs: dict[str, str]
    others: tuple[str, ...]

    @property
    def cpus(self) -> str:
        return self.envs.get("NODEAGENT_CPUS", "")

    @property
    def slice(self) -> str:
        return f"{CGROUPS}/kubepods-pod{self.uid.replace('-', '_')}.slice"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod(Admitted):
    """... and that runs."""

    sandbox: str
    ids: dict[str, str]

    def scope(self, container: str = "main") -> str:
        return f"{self.slice}/{CHOSEN.prefix}-{self.ids[container]}.scope"


def admit(guest: Guest, name: str, wants: dict[str, int], others: tuple[str, ...] = ()) -> Admitted:
    said = guest.kubelet("admit", name=name, wants=wants, others={one: {} for one in others})
    return Admitted(name=name, uid=said["uid"], envs=said["envs"], others=others)


def run(
    guest: Guest,
    admitted: Admitted,
    script: str = FIRST_LINES,
    mounts: tuple[str, ...] = (),
    annotations: Mapping[str, str] | None = None,
) -> Pod:
    """GuestError with the runtime's reason where it refuses."""
    containers = [{"name": "main", "script": script, "envs": admitted.envs, "mounts": mounts}]
    containers += [{"name": one, "script": FIRST_LINES} for one in admitted.others]
    pod = {"name": admitted.name, "uid": admitted.uid, "annotations": dict(annotations or {})}
    made = json.loads(guest.run(f"{PODS} run {_quoted(**pod, containers=containers)}"))
    return Pod(**dataclasses.asdict(admitted), sandbox=made["sandbox"], ids=made["containers"])


def begin(guest: Guest, admitted: Admitted) -> None:
    """Kubelet makes the pod's cgroup; then it waits for volumes, which may take long."""
    guest.run(f"{PODS} slice {_quoted(uid=admitted.uid)}")


@contextlib.contextmanager
def checked(guest: Guest, *exclusive: Pod) -> Iterator[dict[str, Any]]:
    """What inside/checker.py has seen of these pods by the end, in the dictionary that it begins with."""
    known, out, said = "/run/vm-known.json", "/run/vm-seen.json", dict[str, Any]()
    guest.run(f"echo {_quoted(**{one.ids['main']: one.cpus for one in exclusive})} >{known}")
    guest.run(f"systemd-run -q --unit=vm-checker {PYTHON} /share/inside/checker.py {known} {out}")
    guest.run("test $(systemctl show vm-checker -P MainPID) != 0", until=True)
    yield said
    guest.run("systemctl stop vm-checker")
    said.update(json.loads(guest.run(f"cat {out}")))


def make(guest: Guest, name: str, count: int = 0, others: tuple[str, ...] = ()) -> Pod:
    """A pod with so many CPUs of its own."""
    return run(guest, admit(guest, name, {CPU: count} if count else {}, others))


def remove(guest: Guest, pod: Pod) -> None:
    guest.run(f"{PODS} remove {_quoted(sandbox=pod.sandbox, uid=pod.uid)}")
    forget(guest, pod.name)


def forget(guest: Guest, name: str) -> None:
    """Kubelet writes its checkpoint when it admits the next pod, whatever that wants."""
    guest.kubelet("delete", name=name)
    guest.kubelet("admit", name="next", wants={})
    guest.kubelet("delete", name="next")


def first_lines(guest: Guest, pod: Pod, container: str = "main", last: str = "CPUS") -> dict[str, str]:
    """What a container's first lines say, by their first word, once it has said the last of them."""
    log = f"/var/log/pods/{pod.name}/{container}.log"
    guest.run(f"grep -q ' {last}=' {log}", until=True)
    texts = [line.split(" ", 3)[3] for line in guest.run(f"cat {log}").splitlines()]
    return dict(text.replace(":\t", "=").split("=", 1) for text in texts)


def effective(guest: Guest, cgroup: str) -> str:
    """What its processes may run on: those of a scope of crun's are in a cgroup below."""
    return guest.run(_effective(cgroup)).strip()


def until_effective(guest: Guest, cgroup: str, wanted: str) -> None:
    guest.run(f'test "$({_effective(cgroup)})" = "{wanted}"', until=True)


def pinning(guest: Guest) -> dict[str, Any]:
    """What `nodeagent status` says of it."""
    found: dict[str, Any] = json.loads(guest.run("nodeagent status -o json"))["pinning"]
    return found


def pinned(guest: Guest, pod: Pod) -> dict[str, Any]:
    """What it says of the container "main" of a pod."""
    return next(one for one in pinning(guest)["pinned"] if one["id"] == pod.ids["main"])


def until_connected(guest: Guest) -> None:
    guest.run("""nodeagent status -o json | grep -q '"connected": *true'""", until=True)


def until_shared(guest: Guest, wanted: str) -> None:
    guest.run(f"""nodeagent status -o json | grep -q '"shared_cpus": *"{wanted}"'""", until=True)


def _effective(cgroup: str) -> str:
    name = "cpuset.cpus.effective"
    return f"cat {cgroup}/container/{name} 2>/dev/null || cat {cgroup}/{name}"


def _quoted(**said: Any) -> str:
    return shlex.quote(json.dumps(said))
