"""The API server, reached only on first use: a node without DRA does not even import its client.

If it cannot be reached, for example because a service account is not mounted yet, each call raises the error and the
next one tries again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nodeagent.core.model.claim import ClaimRef
from nodeagent.errors import ConfigError, PeerError
from nodeagent.kube.event import in_core

if TYPE_CHECKING:
    from nodeagent.kube.apiserver.client import ApiServer

WARM_S, AWAY_S = 10.0, 60.0
"""How often to see whether a connection is ready; how long to wait if none can be opened."""


def is_configured(kubeconfig: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether there is an API server: a kubeconfig, or the variables of a pod."""
    return bool(kubeconfig or environ.get("KUBERNETES_SERVICE_HOST"))


class LazyApi:
    """API client of the publisher and the claim preparer. Each call raises PeerError if the server cannot be asked."""

    def __init__(self, kubeconfig: str) -> None:
        """Store the path of the kubeconfig, or "" for this pod's service account."""
        self._kubeconfig = kubeconfig
        self._server: ApiServer | None = None

    async def get(self, resource: Any, name: str, namespace: str = "") -> dict[str, Any] | None:
        return await self._reached().get(resource, name, namespace)

    async def version(self) -> str:
        return await self._reached().version()

    async def list(self, resource: Any, *, fields: Mapping[str, str]) -> Any:
        return await self._reached().list(resource, fields=fields)

    async def create(self, resource: Any, body: dict[str, Any]) -> dict[str, Any]:
        return await self._reached().create(resource, body)

    async def replace(self, resource: Any, body: dict[str, Any]) -> dict[str, Any]:
        return await self._reached().replace(resource, body)

    async def delete(self, resource: Any, name: str, *, uid: str) -> bool:
        return await self._reached().delete(resource, name, uid=uid)

    async def apply(
        self, resource: Any, name: str, body: Mapping[str, Any], *, manager: str, force: bool
    ) -> dict[str, Any]:
        return await self._reached().apply(resource, name, "", body, manager=manager, force=force)

    def watch(self, resource: Any, *, fields: Mapping[str, str], revision: str) -> AsyncIterator[Any]:
        return self._reached().watch(resource, fields=fields, revision=revision)

    async def slices_of(self, node: str) -> Sequence[Mapping[str, Any]]:
        """Return the ResourceSlices of a node, of all drivers."""
        from nodeagent.kube.apiserver.client import SLICES

        listing = await self._reached().list(SLICES, fields={"spec.nodeName": node})
        return listing.items

    def claims(self) -> AsyncIterator[Any]:
        """Return all claims of the cluster, page by page."""
        from nodeagent.kube.apiserver.client import CLAIMS

        return self._reached().pages(CLAIMS)

    def watch_claims(self, revision: str) -> AsyncIterator[Any]:
        """Return the changes of all claims of the cluster since a revision."""
        from nodeagent.kube.apiserver.client import CLAIMS

        return self._reached().watch(CLAIMS, revision=revision)

    async def claim(self, ref: ClaimRef) -> Mapping[str, Any] | None:
        """Return the claim of that name, or None if there is none. Never waits behind calls that no pod waits for, such
        as Events."""
        from nodeagent.kube.apiserver.client import CLAIMS

        return await self._reached().get(CLAIMS, ref.name, ref.namespace, urgent=True)

    async def tell(self, ref: ClaimRef, body: Mapping[str, Any], manager: str) -> None:
        """Apply a claim's status."""
        from nodeagent.kube.apiserver.client import CLAIMS

        await self._reached().apply(
            CLAIMS, ref.name, ref.namespace, body, manager=manager, force=True, subresource="status"
        )

    async def create_event(self, event: Mapping[str, Any]) -> None:
        """Create an Event of events.k8s.io/v1, or the same in the core group if only that is allowed."""
        from nodeagent.kube.apiserver.client import CORE_EVENTS, EVENTS

        try:
            await self._reached().create(EVENTS, event)
        except PeerError as error:
            if error.status != 403:
                raise
            await self._reached().create(CORE_EVENTS, in_core(event))

    async def patch_event(self, namespace: str, name: str, patch: Mapping[str, Any]) -> dict[str, Any] | None:
        """Change an Event, through either group, and return it, or None if there is none."""
        from nodeagent.kube.apiserver.client import CORE_EVENTS, EVENTS

        try:
            return await self._reached().merge(EVENTS, name, namespace, patch)
        except PeerError as error:
            if error.status != 403:
                raise
            return await self._reached().merge(CORE_EVENTS, name, namespace, in_core(patch))

    async def keep_warm(self) -> None:
        """Keep a connection ready indefinitely: kubelet waits while a claim is read.

        The server closes idle ones after a while (kube-apiserver after 90 s).
        """
        while True:
            rest_s = WARM_S
            try:
                await self._reached().warm()
            except PeerError:
                rest_s = AWAY_S  # the caller that needs the server reports why it cannot be reached
            await asyncio.sleep(rest_s)

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()

    def _reached(self) -> ApiServer:
        if self._server is None:
            from nodeagent.kube.apiserver.client import ApiServer, access

            try:
                self._server = ApiServer(access(self._kubeconfig or None))
            except ConfigError as error:
                raise PeerError(f"cannot reach the API server: {error}") from None
        return self._server
