"""Runs in the guest: pods through the container runtime interface, as kubelet makes them; no network, one image.

    pods.py run NAME UID SCRIPT CPUS ENV...    prints the ids of the sandbox and the container
    pods.py remove SANDBOX

The container is called main and runs SCRIPT in a shell; what it prints comes to LOGS/NAME/main.log in the form of the
interface: time, stream, tag, text. CPUS: what kubelet itself would write to its cpuset; "" is nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, "/share/inside")

import cri_pb2 as cri

SOCKET = "unix:///run/containerd/containerd.sock"
IMAGE = "localhost/busybox:vm"
LOGS = Path("/var/log/pods")
CALL_S = 60.0


def call(channel: grpc.Channel, name: str, request: Any) -> Any:
    """One call of runtime.v1.RuntimeService."""
    answer = getattr(cri, f"{name}Response")
    method = channel.unary_unary(
        f"/runtime.v1.RuntimeService/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer.FromString,
    )
    return method(request, timeout=CALL_S)


def sandbox(name: str, uid: str) -> Any:
    """The pod's cgroup as kubelet's systemd driver names it; the node's network, so that no CNI is needed."""
    parent = f"kubepods-pod{uid.replace('-', '_')}.slice"
    labels = {"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "vm", "io.kubernetes.pod.uid": uid}
    options = cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(network=cri.NODE))
    return cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name=name, uid=uid, namespace="vm"),
        log_directory=str(LOGS / name),
        labels=labels,
        linux=cri.LinuxPodSandboxConfig(cgroup_parent=parent, security_context=options),
    )


def container(script: str, cpus: str, envs: list[str]) -> Any:
    pairs = [cri.KeyValue(key=key, value=value) for key, _, value in (one.partition("=") for one in envs)]
    return cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="main"),
        image=cri.ImageSpec(image=IMAGE),
        command=["/bin/busybox", "sh", "-c", script],
        envs=pairs,
        labels={"io.kubernetes.container.name": "main"},
        log_path="main.log",
        linux=cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(cpuset_cpus=cpus)),
    )


def run(channel: grpc.Channel, name: str, uid: str, script: str, cpus: str, *envs: str) -> tuple[str, str]:
    """The ids of the sandbox and of the started container."""
    (LOGS / name).mkdir(parents=True, exist_ok=True)
    config = sandbox(name, uid)
    made = call(channel, "RunPodSandbox", cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
    request = cri.CreateContainerRequest(
        pod_sandbox_id=made, config=container(script, cpus, [*envs]), sandbox_config=config
    )
    created = call(channel, "CreateContainer", request).container_id
    call(channel, "StartContainer", cri.StartContainerRequest(container_id=created))
    return made, created


def remove(channel: grpc.Channel, made: str) -> None:
    call(channel, "StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=made))
    call(channel, "RemovePodSandbox", cri.RemovePodSandboxRequest(pod_sandbox_id=made))


def main(verb: str, *words: str) -> None:
    with grpc.insecure_channel(SOCKET) as channel:
        if verb == "run":
            print(*run(channel, *words))
        else:
            remove(channel, *words)


if __name__ == "__main__":
    main(*sys.argv[1:])
