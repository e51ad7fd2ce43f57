"""What admins see: the status socket. It reads the frozen values on which the agent decides; changes need root.

GET / is a page for browsers; GET /v1/status /v1/inventory /v1/grants /v1/devices /v1/health /v1/map /v1/events
/healthz /readyz /metrics.
DELETE /v1/grants/ID releases a grant by hand; DELETE /v1/health/DEVICE clears latched causes; POST /v1/reload reads
the configuration again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from nodeagent.admin.http import TEXT, HttpAnswer, HttpRequest, Peer
from nodeagent.admin.http import problem as _problem
from nodeagent.admin.metrics_page import CONTENT_TYPE, MetricsPage
from nodeagent.admin.watched import Watched, disputed, resources
from nodeagent.core.advice.repair import repair
from nodeagent.core.deviceplugin.causes import known_health
from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.model.claim import Result
from nodeagent.core.model.grant import OTHER_PLUGIN, Grant
from nodeagent.core.model.health import HEALTHY
from nodeagent.core.model.inventory_json import to_document
from nodeagent.core.model.quantity import format_size
from nodeagent.core.sharing.mps import enforcement
from nodeagent.errors import ConfigError
from nodeagent.telemetry.log import new_op
from nodeagent.version import VERSION

if TYPE_CHECKING:
    from nodeagent.admin.web.events import Events


PAGE_FILES = frozenset({"/page.js", "/page.css", "/icon.svg"})
"""What the page for browsers loads."""


class Status:
    """Answers requests on the status socket."""

    def __init__(self, watched: Watched, metrics: MetricsPage) -> None:
        self._watched = watched
        self._metrics = metrics
        self._events: Events | None = None
        """Made when the first listener connects."""

    async def handle(self, request: HttpRequest) -> HttpAnswer:
        """Answer one request: 403 if the peer lacks permission, 404 and 405 as usual, never 500 without a reason."""
        method, path, peer = request.method, request.path, request.peer
        if method not in ("GET", "HEAD") and (peer is None or peer.uid not in (0, os.geteuid())):
            return _problem(403, f"cannot {method} {path}: only root may, uid {peer.uid if peer else 'unknown'} asks")
        if method not in ("GET", "HEAD") and request.is_from_web_page:
            return _problem(403, f"cannot {method} {path}: a web page asks for it")
        if method == "DELETE" and path.startswith("/v1/grants/"):
            return await self._release(path.removeprefix("/v1/grants/"))
        if method == "DELETE" and path.startswith("/v1/health/"):
            device = unquote(path.removeprefix("/v1/health/"), errors="surrogateescape")
            return await self._clear_health(device, peer)
        if method == "POST" and path == "/v1/reload":
            return await self._reload()
        page = partial(_asset, path) if path in PAGE_FILES else self._pages().get(path)
        if page is None:
            return _problem(404, f"cannot find {path}: expected one of {', '.join(self._pages())}")
        if method not in ("GET", "HEAD"):
            return _problem(405, f"cannot {method} {path}: it can only be read")
        return await page()

    def _pages(self) -> Mapping[str, Callable[[], Awaitable[HttpAnswer]]]:
        return {
            "/v1/status": _documented(self.status),
            "/v1/inventory": _documented(lambda: to_document(self._watched.agent.inventory)),
            "/v1/grants": _documented(self.grants),
            "/v1/health": _documented(self.health),
            "/v1/devices": _documented(self.devices),
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics_page,
            "/v1/map": self._map,
            "/v1/events": self._listen,
            "/": partial(_asset, "/"),
        }

    def status(self) -> dict[str, Any]:
        """Return the whole state in brief."""
        agent, reasons = self._watched.agent, list(self._watched.not_ready())
        return {
            "version": VERSION,
            "ready": not reasons,
            "not_ready": reasons,
            "started_at": self._watched.started_at,
            "uptime_s": round(time.time() - self._watched.started_at, 1),
            "boot_id": agent.settings.boot_id,
            "inventory": {
                "generation": agent.inventory.generation,
                "cpus_online": str(agent.inventory.cpus_online),
                "cpus_offline": str(agent.inventory.cpus_offline),
                "cpus_outside": str(agent.inventory.cpus_outside),
                "cpus_reserved": str(agent.settings.reserved),
                "numa_nodes": len(agent.inventory.numa_nodes),
                "devices": len(agent.inventory.devices),
                "warnings": list(agent.inventory.warnings),
            },
            "kinds": [{"kind": k.kind, "state": k.state, "reason": k.reason} for k in agent.inventory.kinds],
            "refused": dict(self._watched.refused),
            "kubelet": self._watched.kubelet_document(),
            "dra": self._watched.dra_document(),
            "pinning": self._watched.pinning_document(),
            **self._watched.gpus_document(),
            "resources": resources(self._watched),
            "grants": len(agent.ledger.grants),
            "ledger": {"whole": not agent.loss, "loss": agent.loss, "missing": dict(agent.unaccounted)},
            "listed_at": agent.listed_at,
            "conflicts": list(agent.conflicts),
            "disputed": [f"{agent.ledger.grants[one].holder}: {agent.held_back[one]}" for one in disputed(agent)],
            "notes": list(self._watched.notes),
            "config_error": self._watched.config_error,
            "config_file": self._watched.config_file,
        }

    def grants(self) -> list[dict[str, Any]]:
        """Return all grants, oldest first, and after them what other device plugins gave to pods."""
        agent = self._watched.agent
        every = sorted(agent.ledger.grants.values(), key=lambda g: (g.granted_at, g.id))
        foreign = sorted(agent.ledger.foreign.values(), key=lambda g: g.id)
        return [
            {
                **grant_document(one),
                "disputed": one.id in agent.disputed,
                "held_back": agent.held_back.get(one.id, ""),
            }
            for one in every
        ] + [{**grant_document(one), "api": OTHER_PLUGIN, "disputed": False, "held_back": ""} for one in foreign]

    def devices(self) -> list[dict[str, Any]]:
        """Return every id advertised to kubelet, with its health, NUMA nodes and holder."""
        agent = self._watched.agent
        parts = _by_part((*agent.ledger.foreign.values(), *agent.ledger.grants.values()))
        out = []
        for offer in self._watched.offers():
            for one in agent.advertised(offer.resource):
                grant = agent.ledger.by_id.get((offer.name, one.id)) or parts.get(one.device or one.id)
                device = agent.inventory.device_by_id.get(one.device)
                state = (illness(device, agent.health) if device else None) or agent.health.get(one.device)
                out.append(
                    {
                        "resource": offer.name,
                        "id": one.id,
                        "healthy": one.healthy,
                        "held_elsewhere": one.held and not one.healthy,
                        "state": state.state if state else "",
                        "reason": state.reason if state else one.reason,
                        "numa_nodes": list(one.numa_nodes),
                        "holder": str(grant.holder) if grant else "",
                        "grant": grant.id if grant else "",
                    }
                )
        return out

    def health(self) -> list[dict[str, Any]]:
        """Return every device of which something is known, with all of its causes, in order of id."""
        watched = self._watched
        resources = [one.resource for one in watched.configured()]
        known = known_health(watched.agent.inventory, watched.agent.health, resources)
        return [
            {
                "device": device,
                "state": state.state,
                "reason": state.reason,
                "advice": self._advice(device),
                "causes": [{"source": source, **one._asdict()} for source, one in sorted(state.seen.items())],
            }
            for device, state in known.items()
        ]

    def _advice(self, device: str) -> str:
        """Return what an admin can do about the illness of a device, or ""."""
        agent = self._watched.agent
        there = agent.inventory.device_by_id.get(device)
        return repair(there, agent.health) if there is not None else ""

    async def _healthz(self) -> HttpAnswer:
        return HttpAnswer(200, b"ok\n", TEXT)

    async def _readyz(self) -> HttpAnswer:
        reasons = self._watched.not_ready()
        text = "\n".join(reasons) if reasons else "ok"
        return HttpAnswer(503 if reasons else 200, f"{text}\n".encode(), TEXT)

    async def _metrics_page(self) -> HttpAnswer:
        return HttpAnswer(200, await self._metrics.text(), CONTENT_TYPE)

    # What only the page needs is imported when it is asked for.

    async def _map(self) -> HttpAnswer:
        from nodeagent.admin.web.page import picture

        return picture(self._watched.agent)

    async def _listen(self) -> HttpAnswer:
        from nodeagent.admin.web.events import Events

        if self._events is None:
            self._events = Events(self._watched.agent)
        return self._events.answer()

    async def _release(self, grant_id: str) -> HttpAnswer:
        gone = await self._watched.agent.release([grant_id], new_op())
        if not gone:
            return _problem(404, f"cannot release {grant_id}: there is no such grant")
        return _document([grant_document(one) for one in gone])

    async def _clear_health(self, device: str, peer: Peer | None) -> HttpAnswer:
        who = f"uid {peer.uid}" if peer is not None else "an unknown user"
        if not await self._watched.clear_health(device, who):
            return _problem(404, f"cannot clear {device}: nothing is remembered against it")
        state = self._watched.agent.health.get(device)
        return _document({"device": device, "state": state.state if state is not None else HEALTHY})

    async def _reload(self) -> HttpAnswer:
        try:
            return _document({"changed": await self._watched.reload()})
        except ConfigError as error:
            return _problem(409, str(error))


def grant_document(grant: Grant) -> dict[str, Any]:
    """Return one grant in plain types."""
    return {
        "id": grant.id,
        "api": grant.holder.api,
        "resource": grant.holder.resource,
        "namespace": grant.holder.namespace,
        "pod": grant.holder.pod,
        "container": grant.holder.container,
        "claim": grant.holder.claim,
        "uid": grant.holder.uid,
        "pod_uids": list(grant.pod_uids),
        "confirmed": grant.confirmed,
        "ids": list(grant.ids),
        "cpus": str(grant.cpus),
        "hugepages": [
            {"size": format_size(one.page_bytes), "numa_node": one.node, "pages": one.pages} for one in grant.hugepages
        ],
        "memory": [{"bytes": size, "numa_node": node} for node, size in grant.memory],
        "devices": [*grant.devices, *grant.shares],
        "shares": list(grant.shares),
        "amounts": [{"device": id, "capacity": name, "amount": size} for id, name, size in grant.amounts],
        "limits": enforcement([grant]) if grant.amounts else "",
        "things": [list(one) for one in grant.things],
        "granted_at": grant.granted_at,
        "result": _result(grant.result) if grant.result is not None else None,
        "settings": grant.settings,
    }


def _result(result: Result) -> dict[str, Any]:
    """Return what the scheduler allocated to a claim, in plain types."""
    return {
        "request": result.request,
        "pool": result.pool,
        "device": result.device,
        "share_id": result.share_id,
        "admin": result.admin,
        "consumed": dict(result.consumed),
    }


def _by_part(grants: Iterable[Grant]) -> dict[str, Grant]:
    """Return the grant that holds each whole device or CPU, whichever API it came through."""
    found = {}
    for grant in grants:
        found.update(dict.fromkeys((*grant.devices, *(f"cpu{cpu}" for cpu in grant.cpus)), grant))
    return found


def _documented(read: Callable[[], Any]) -> Callable[[], Awaitable[HttpAnswer]]:
    """Return a page that shows what `read` returns."""

    async def page() -> HttpAnswer:
        return _document(read())

    return page


async def _asset(path: str) -> HttpAnswer:
    from nodeagent.admin.web.page import asset

    return asset(path)


def _document(value: Any) -> HttpAnswer:
    return HttpAnswer(200, json.dumps(value).encode() + b"\n")
