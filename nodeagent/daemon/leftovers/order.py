"""Everything that the agent leaves on a host, in one list, and how each is undone.

What stays, because it ends with its container or nothing tells whether it was the agent's: hugepage limits of
containers, controllers enabled for kubepods, folders of kubelet's. Pools of hugepages that were grown are reported.
Every call blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from nodeagent.daemon.leftovers import cluster, confinement, devices, folders
from nodeagent.daemon.leftovers.leftover import Host, Leftover


def leftovers(host: Host, *, purge: bool = False) -> Iterator[Leftover]:
    """Yield what is left on a host, in the order in which it has to be undone: undo each before the next is asked for.
    Raise HostError if some of it cannot be read. purge: the state folder too."""
    yield confinement.drop_ins(host)
    yield confinement.cgroups(host)
    yield confinement.interrupts(host)
    yield confinement.tuning(host)
    yield confinement.resctrl(host)
    yield confinement.io(host)
    yield confinement.uclamp(host)
    yield confinement.hugepages(host)
    yield devices.shared_gpus(host)
    yield devices.instances(host)
    yield devices.prepared(host)
    yield devices.amd_partitions(host)
    yield devices.vf_properties(host)
    yield devices.passthrough(host)
    yield devices.interfaces(host)
    yield devices.targets(host)
    yield devices.dsa_queues(host)
    yield folders.cdi_files(host)
    yield folders.claim_files(host)
    yield folders.device_info(host)
    yield devices.virtual_functions(host)
    yield folders.kubelet_sockets(host)
    yield cluster.slices(host)
    yield cluster.shared_slices(host)
    yield cluster.published_objects(host)
    yield folders.runtime_folder(host)
    if purge:
        yield folders.state_folder(host)
