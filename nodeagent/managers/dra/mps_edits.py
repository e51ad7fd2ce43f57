"""What the container of a claim needs to share a GPU through MPS: the way to the daemon of the agent, and its limits.

Client and server exchange data through /dev/shm, so a container gets that of the host, where the daemon runs; with
Docker the same is `--ipc=host`. A program reaches the daemon through CUDA_MPS_PIPE_DIRECTORY. One that unsets it uses
the GPU without MPS and without limits, unless the admin has set the compute mode Exclusive_Process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nodeagent.core.model.device import Mount
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.sharing.mps import devices_of, limits_of, set_name, uses_mps

PIPES = "/tmp/nvidia-mps"  # noqa: S108 - where CUDA looks for a daemon unless told otherwise
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a path that CUDA has built in


def variables(inventory: Inventory, grant: Grant, claim: Sequence[Grant]) -> Mapping[str, str]:
    """Return the variables for one grant of a claim.

    The limit of memory is a variable only where the claim has one such device: CUDA numbers the devices by those that a
    container sees. With several the daemon, which serves this claim alone, limits each.
    """
    if not uses_mps(grant):
        return {}
    limits, env = limits_of(grant), {"CUDA_MPS_PIPE_DIRECTORY": PIPES}
    if limits.threads_percent is not None:
        env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(limits.threads_percent)
    if limits.memory_mib is not None and len(devices_of(inventory, filter(uses_mps, claim))) == 1:
        env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={limits.memory_mib}M"
    return env


def mounts(grant: Grant, folder: Path) -> Iterator[Mount]:
    """Yield the mounts for one grant. folder: of all daemons."""
    if uses_mps(grant):
        yield Mount(host_path=str(folder / set_name(grant) / "pipe"), container_path=PIPES, read_only=False)
        yield Mount(host_path=SHARED_MEMORY, container_path=SHARED_MEMORY, read_only=False)
