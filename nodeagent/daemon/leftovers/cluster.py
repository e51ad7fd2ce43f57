"""What is left in the API server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from nodeagent.daemon.leftovers.leftover import Host, Leftover, Line
from nodeagent.errors import HostError, PeerError
from nodeagent.kube.apiserver.lazy import LazyApi, is_configured
from nodeagent.kube.resourceslice.render import Owner, belongs
from nodeagent.managers.dra.manager import node_name
from nodeagent.managers.publish.journal import FILE, PublishJournal
from nodeagent.managers.publish.publications import LABELS, TOPOLOGY


def slices(host: Host) -> Leftover:
    """Return the ResourceSlices of this driver and node, or the command that deletes them if they cannot be listed."""
    dra, node = host.config.dra, node_name(host.config)
    fields = f"spec.driver={dra.driver},spec.nodeName={node}"
    command = f"kubectl delete resourceslices --field-selector {fields}"
    if not is_configured(dra.kubeconfig):
        return Leftover(notes=[f"{command} deletes what was published, if it was"] if host.config.served_by_dra else [])
    try:
        found = asyncio.run(_published(dra.kubeconfig, Owner(driver=dra.driver, node_name=node)))
    except PeerError as error:
        return Leftover(notes=[f"{command} deletes what was published, if it was: {error}"])
    names = {str(one["metadata"]["name"]): str(one["metadata"]["uid"]) for one in found}
    return Leftover([Line(f"resourceslice {name}") for name in names], lambda: _delete(dra.kubeconfig, names))


def shared_slices(host: Host) -> Leftover:
    """Return the command that deletes the pools that nodes share: other nodes may use them."""
    if not host.config.targets:
        return Leftover()
    command = f"kubectl delete resourceslices --field-selector spec.nodeName=,spec.driver={host.config.dra.driver}"
    return Leftover(notes=[f"the pools of NVMe targets stay for other nodes; {command} deletes them"])


def published_objects(host: Host) -> Leftover:
    """Return the commands that remove what was published of the machine."""
    try:
        found = PublishJournal(host.where.state_dir / FILE).read()
    except HostError as error:
        return Leftover(notes=[str(error)])
    node, domain = node_name(host.config), host.config.domain
    commands = {
        LABELS: f"kubectl label node {node} with each label that starts with {domain}/ and a - after it",
        TOPOLOGY: f"kubectl delete noderesourcetopology {node}",
    }
    return Leftover(notes=[f"{commands[key]} removes what {key} published" for key in sorted(found & commands.keys())])


async def _published(kubeconfig: str, owner: Owner) -> list[dict[str, Any]]:
    async with _api(kubeconfig) as api:
        return [one for one in map(dict, await api.slices_of(owner.node_name)) if belongs(one, owner)]


def _delete(kubeconfig: str, names: Mapping[str, str]) -> list[str]:
    """Delete slices, UIDs by name. Return why some stay."""
    try:
        asyncio.run(_deleted(kubeconfig, names))
    except PeerError as error:
        return [str(error)]
    return []


async def _deleted(kubeconfig: str, names: Mapping[str, str]) -> None:
    from nodeagent.kube.apiserver.client import SLICES

    async with _api(kubeconfig) as api:
        for name, uid in names.items():
            await api.delete(SLICES, name, uid=uid)


@contextlib.asynccontextmanager
async def _api(kubeconfig: str) -> AsyncIterator[LazyApi]:
    api = LazyApi(kubeconfig)
    try:
        yield api
    finally:
        await api.close()
