"""The API server, reached only when somebody asks it: its client is not even imported on a node without DRA.

What keeps it from being reached, as a service account that is not mounted yet, is said by each call and tried again by
the next.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from nodeagent.core.model.claim import ClaimRef
from nodeagent.errors import ConfigError, PeerError

if TYPE_CHECKING:
    from nodeagent.kube.apiserver.client import ApiServer


class LazyApi:
    """As the publisher and the claim preparer use it; each call raises PeerError where the server cannot be asked."""

    def __init__(self, kubeconfig: str) -> None:
        """kubeconfig: a path; "": as the service account of this pod."""
        self._kubeconfig = kubeconfig
        self._server: ApiServer | None = None

    async def get(self, resource: Any, name: str) -> dict[str, Any] | None:
        return await self._reached().get(resource, name)

    async def list(self, resource: Any, *, fields: Mapping[str, str]) -> Any:
        return await self._reached().list(resource, fields=fields)

    async def create(self, resource: Any, body: dict[str, Any]) -> dict[str, Any]:
        return await self._reached().create(resource, body)

    async def replace(self, resource: Any, body: dict[str, Any]) -> dict[str, Any]:
        return await self._reached().replace(resource, body)

    async def delete(self, resource: Any, name: str, *, uid: str) -> bool:
        return await self._reached().delete(resource, name, uid=uid)

    def watch(self, resource: Any, *, fields: Mapping[str, str], revision: str) -> AsyncIterator[Any]:
        return self._reached().watch(resource, fields=fields, revision=revision)

    async def claim(self, ref: ClaimRef) -> Mapping[str, Any] | None:
        """The claim of that name; None: there is none."""
        from nodeagent.kube.apiserver.client import CLAIMS

        return await self._reached().get(CLAIMS, ref.name, ref.namespace)

    async def tell(self, ref: ClaimRef, body: Mapping[str, Any], manager: str) -> None:
        """Apply a claim's status."""
        from nodeagent.kube.apiserver.client import CLAIMS

        await self._reached().apply_status(CLAIMS, ref.name, ref.namespace, body, manager=manager)

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
