"""Runs in the guest: pods through the container runtime interface, as kubelet makes them; no network, one image.

    pods.py run JSON       {"name", "uid", "annotations", "containers": [{"name", "script", "cpus", "envs", "mounts"}]}
                           prints {"sandbox": ID, "containers": {NAME: ID}}
    pods.py remove JSON    {"uid", "sandbox": ID}
    pods.py slice JSON     {"uid"}: no more than kubelet's first step, after which it waits for volumes

A container runs SCRIPT in a shell; what it prints comes to LOGS/NAME/CONTAINER.log in the form of the interface: time,
stream, tag, text. cpus: what kubelet itself would write to its cpuset; "" is nothing. The pod's slice is there before
its sandbox, as kubelet has it, and lets no hugepages through, as kubelet has it where a pod asks kubelet for none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, "/share/inside")

import cri_pb2 as cri

SOCKETS = (Path("/run/crio/crio.sock"), Path("/run/containerd/containerd.sock"))
"""Where both are there, containerd has been stopped."""
IMAGE = "localhost/busybox:vm"
LOGS = Path("/var/log/pods")
PODS = Path("/sys/fs/cgroup/kubepods.slice")
CALL_S, SLICE_S = 60.0, 20.0
SYSTEMD = (
    "busctl",
    "call",
    "org.freedesktop.systemd1",
    "/org/freedesktop/systemd1",
    "org.freedesktop.systemd1.Manager",
)


class Runtime:
    """A context manager: the connection to the runtime."""

    def __enter__(self) -> Runtime:
        self._channel = grpc.insecure_channel(f"unix://{next(path for path in SOCKETS if path.exists())}")
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(self, name: str, service: str = "RuntimeService", **fields: Any) -> Any:
        """One call of a service of runtime.v1."""
        method = self._channel.unary_unary(
            f"/runtime.v1.{service}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=getattr(cri, f"{name}Response").FromString,
        )
        return method(getattr(cri, f"{name}Request")(**fields), timeout=CALL_S)

    def sandbox(self, pod: dict[str, Any]) -> str:
        make_slice(pod["uid"])
        (LOGS / pod["name"]).mkdir(parents=True, exist_ok=True)
        return str(self.call("RunPodSandbox", config=sandbox(pod)).pod_sandbox_id)

    def container(self, made: str, pod: dict[str, Any], spec: dict[str, Any]) -> str:
        """Created and started; its id."""
        config = container(**spec)
        config.labels.update(labels(pod))
        said = {"config": config, "sandbox_config": sandbox(pod)}
        created = str(self.call("CreateContainer", pod_sandbox_id=made, **said).container_id)
        self.call("StartContainer", container_id=created)
        return created

    def remove(self, made: str, uid: str) -> None:
        self.call("StopPodSandbox", pod_sandbox_id=made)
        self.call("RemovePodSandbox", pod_sandbox_id=made)
        systemd("StopUnit", "ss", slice_name(uid), "replace")
        until(lambda: not (PODS / slice_name(uid)).is_dir(), f"{slice_name(uid)} is still there")


def systemd(method: str, form: str, *words: str) -> None:
    subprocess.run([*SYSTEMD, method, form, *words], check=True, stdout=subprocess.DEVNULL, timeout=CALL_S)


def slice_name(uid: str) -> str:
    """As kubelet's systemd driver names a pod's cgroup."""
    return f"kubepods-pod{uid.replace('-', '_')}.slice"


def until(holds: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + SLICE_S
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"{otherwise} after {SLICE_S:g} s")
        time.sleep(0.005)


def make_slice(uid: str) -> None:
    """Through systemd, with every controller that the one above has, as runc's library does it for kubelet; nothing
    where it is there already."""
    path = PODS / slice_name(uid)
    if path.is_dir():
        return
    systemd(
        "StartTransientUnit", "ssa(sv)a(sa(sv))", path.name, "replace", "1", "DefaultDependencies", "b", "false", "0"
    )
    until(path.is_dir, f"{path} is not there")
    have = (PODS / "cgroup.controllers").read_text().split()
    (PODS / "cgroup.subtree_control").write_text(" ".join(f"+{one}" for one in have))
    for file in (*path.glob("hugetlb.*.rsvd.max"), *path.glob("hugetlb.*[!d].max")):
        file.write_text("0")


def labels(pod: dict[str, Any]) -> dict[str, str]:
    """As kubelet has them on a pod's sandbox and containers: a container's bundle of CRI-O names its pod only so."""
    prefix = "io.kubernetes.pod"
    return {f"{prefix}.name": pod["name"], f"{prefix}.namespace": "vm", f"{prefix}.uid": pod["uid"]}


def sandbox(pod: dict[str, Any]) -> Any:
    """The node's network, so that no CNI is needed."""
    name, uid = pod["name"], pod["uid"]
    options = cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(network=cri.NODE))
    return cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name=name, uid=uid, namespace="vm"),
        log_directory=str(LOGS / name),
        labels=labels(pod),
        annotations=pod.get("annotations", {}),
        linux=cri.LinuxPodSandboxConfig(cgroup_parent=slice_name(uid), security_context=options),
    )


def container(
    script: str, name: str = "main", cpus: str = "", envs: dict[str, str] | None = None, mounts: tuple[str, ...] = ()
) -> Any:
    return cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name=name),
        image=cri.ImageSpec(image=IMAGE, user_specified_image=IMAGE),
        command=["/bin/busybox", "sh", "-c", script],
        envs=[cri.KeyValue(key=key, value=value) for key, value in (envs or {}).items()],
        mounts=[cri.Mount(container_path=path, host_path=path, readonly=True) for path in mounts],
        labels={"io.kubernetes.container.name": name},
        log_path=f"{name}.log",
        linux=cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(cpuset_cpus=cpus)),
    )


def run(runtime: Runtime, pod: dict[str, Any]) -> dict[str, Any]:
    """Nothing is left of a pod of which a container was refused."""
    made = runtime.sandbox(pod)
    try:
        ids = {one["name"]: runtime.container(made, pod, one) for one in pod["containers"]}
    except grpc.RpcError:
        runtime.remove(made, pod["uid"])
        raise
    return {"sandbox": made, "containers": ids}


def main(verb: str, said: str) -> int:
    pod = json.loads(said)
    with Runtime() as runtime:
        try:
            if verb == "run":
                print(json.dumps(run(runtime, pod)))
            elif verb == "slice":
                make_slice(pod["uid"])
            else:
                runtime.remove(pod["sandbox"], pod["uid"])
        except grpc.RpcError as error:
            print(error.details(), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
