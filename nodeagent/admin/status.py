"""What admins see: the status socket. It reads the frozen values on which the agent decides; changes need root.

GET /v1/status /v1/inventory /v1/grants /v1/devices /v1/health /healthz /readyz /metrics
DELETE /v1/grants/ID releases a grant by hand; DELETE /v1/health/DEVICE clears latched causes; POST /v1/reload reads
the configuration again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote

from nodeagent.admin.http import HttpAnswer, Peer
from nodeagent.admin.http import problem as _problem
from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.model.grant import KUBELET, OTHER_PLUGIN, Grant
from nodeagent.core.model.health import HEALTHY
from nodeagent.core.model.inventory_json import to_document
from nodeagent.core.model.quantity import format_size
from nodeagent.errors import ConfigError
from nodeagent.kube.kubelet.registration import Registration
from nodeagent.resources.offer import Offer
from nodeagent.state.agent import Agent
from nodeagent.telemetry import metrics
from nodeagent.telemetry.log import new_op
from nodeagent.version import VERSION


class Watched(Protocol):
    """What the daemon reports about itself."""

    agent: Agent
    started_at: float
    config_error: str

    @property
    def notes(self) -> list[str]: ...
    @property
    def refused(self) -> Mapping[str, str]: ...

    def offers(self) -> Sequence[Offer]: ...
    def registrations(self) -> Sequence[Registration]: ...
    def kubelet_document(self) -> dict[str, Any]:
        """Return kubelet's configuration, as far as it concerns the agent."""
        ...

    def dra_document(self) -> dict[str, Any]:
        """Return the state of DRA, or {} if nothing is served through it."""
        ...

    def pinning_document(self) -> dict[str, Any]:
        """Return how containers are confined to what they hold."""
        ...

    def health_readings(self) -> Mapping[tuple[str, str], Mapping[str, int]]:
        """Return the numbers that were read of the devices, by device and source."""
        ...

    async def clear_health(self, device: str) -> bool:
        """Clear the latched causes of a device. Return whether it had any."""
        ...

    def not_ready(self) -> Sequence[str]:
        """Return why the agent is not ready, one sentence each; empty if it is."""
        ...

    async def reload(self) -> list[str]:
        """Read the configuration again and return what changed. On ConfigError the old one stays."""
        ...


class Status:
    """Answers requests on the status socket."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    async def handle(self, method: str, target: str, peer: Peer) -> HttpAnswer:
        """Answer one request: 403 if the peer lacks permission, 404 and 405 as usual, never 500 without a reason."""
        path = target.partition("?")[0]
        if method not in ("GET", "HEAD") and peer.uid not in (0, os.geteuid()):
            return _problem(403, f"cannot {method} {path}: only root may, uid {peer.uid} asks")
        if method == "DELETE" and path.startswith("/v1/grants/"):
            return await self._release(path.removeprefix("/v1/grants/"))
        if method == "DELETE" and path.startswith("/v1/health/"):
            return await self._clear_health(unquote(path.removeprefix("/v1/health/"), errors="surrogateescape"))
        if method == "POST" and path == "/v1/reload":
            return await self._reload()
        page = self._pages().get(path)
        if page is None:
            return _problem(404, f"cannot find {path}: expected one of {', '.join(self._pages())}")
        if method not in ("GET", "HEAD"):
            return _problem(405, f"cannot {method} {path}: it can only be read")
        return page()

    def _pages(self) -> Mapping[str, Callable[[], HttpAnswer]]:
        return {
            "/v1/status": lambda: _document(self.status()),
            "/v1/inventory": lambda: _document(to_document(self._watched.agent.inventory)),
            "/v1/grants": lambda: _document(self.grants()),
            "/v1/health": lambda: _document(self.health()),
            "/v1/devices": lambda: _document(self.devices()),
            "/healthz": lambda: HttpAnswer(200, b"ok\n", "text/plain"),
            "/readyz": self._readyz,
            "/metrics": self._metrics,
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
            "resources": [self._resource(offer) for offer in self._watched.offers()],
            "grants": len(agent.ledger.grants),
            "ledger": {"whole": not agent.loss, "loss": agent.loss, "missing": dict(agent.unaccounted)},
            "listed_at": agent.listed_at,
            "conflicts": list(agent.conflicts),
            "disputed": [f"{agent.ledger.grants[one].holder}: {agent.held_back[one]}" for one in self._disputed()],
            "notes": list(self._watched.notes),
            "config_error": self._watched.config_error,
        }

    def _resource(self, offer: Offer) -> dict[str, Any]:
        shown = self._watched.agent.advertised(offer.resource)
        held = sum(1 for resource, _ in self._watched.agent.ledger.by_id if resource == offer.name)
        known = next((one for one in self._watched.registrations() if one.resource == offer.name), None)
        return {
            "name": offer.name,
            "kind": offer.resource.kind,
            "devices": len(shown),
            "healthy": sum(1 for one in shown if one.healthy),
            "held_elsewhere": sum(1 for one in shown if one.held and not one.healthy),
            "held": held,
            "registered": known.ready if known else False,
            "registration": known.state if known else "",
            "reason": known.reason if known else "",
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

    def _disputed(self) -> list[str]:
        """Return the ids of the grants that kubelet has stopped listing although their pods are alive."""
        agent = self._watched.agent
        return sorted(one for one in agent.disputed if one in agent.ledger.grants)

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
        """Return every device that has evidence, with all of its causes, in order of id."""
        return [
            {
                "device": device,
                "state": state.state,
                "reason": state.reason,
                "causes": [{"source": source, **one._asdict()} for source, one in sorted(state.seen.items())],
            }
            for device, state in sorted(self._watched.agent.health.items())
        ]

    def _readyz(self) -> HttpAnswer:
        reasons = self._watched.not_ready()
        text = "\n".join(reasons) if reasons else "ok"
        return HttpAnswer(503 if reasons else 200, f"{text}\n".encode(), "text/plain")

    def _metrics(self) -> HttpAnswer:
        agent = self._watched.agent
        for gauge in (metrics.DEVICES, metrics.HELD, metrics.REGISTERED, metrics.HOLDER):
            gauge.clear()
        for one in (self._resource(offer) for offer in self._watched.offers()):
            metrics.DEVICES.labels(one["name"], "healthy").set(one["healthy"])
            metrics.DEVICES.labels(one["name"], "held").set(one["held_elsewhere"])
            unhealthy = one["devices"] - one["healthy"] - one["held_elsewhere"]
            metrics.DEVICES.labels(one["name"], "unhealthy").set(unhealthy)
            metrics.HELD.labels(one["name"]).set(one["held"])
            metrics.REGISTERED.labels(one["name"]).set(one["registered"])
        for grant in agent.ledger.grants.values():
            holder = grant.holder
            pod = holder.uid if holder.api == KUBELET else holder.pod
            names = holder.namespace, pod, holder.container, holder.claim
            metrics.HOLDER.labels(holder.resource, *names).set(1)
        metrics.LEDGER_WHOLE.set(not agent.loss)
        metrics.CONFIG_REFUSED.set(bool(self._watched.config_error))
        metrics.CONFLICTS.set(len(agent.conflicts))
        metrics.DISPUTED.set(len(self._disputed()))
        self._health_metrics()
        self._dra_metrics()
        self._page_metrics()
        self._pinning_metrics()
        metrics.GENERATION.set(agent.inventory.generation)
        metrics.WARNINGS.set(len(agent.inventory.warnings))
        metrics.READY.set(not self._watched.not_ready())
        return HttpAnswer(200, metrics.render(), "text/plain; version=0.0.4; charset=utf-8")

    def _health_metrics(self) -> None:
        for gauge in (metrics.DEVICE_ILL, metrics.DEVICE_READING):
            gauge.clear()
        for device, state in self._watched.agent.health.items():
            if state.state != HEALTHY:
                metrics.DEVICE_ILL.labels(device, state.state, state.reason).set(1)
        for (device, source), readings in self._watched.health_readings().items():
            for reading, number in readings.items():
                metrics.DEVICE_READING.labels(device, source, reading).set(number)

    def _dra_metrics(self) -> None:
        dra = self._watched.dra_document()
        metrics.DRA_REGISTERED.set(dra.get("registered", False))
        metrics.DRA_CLAIMS.set(dra.get("claims", 0))
        metrics.SLICES.clear()
        for pool in dra.get("slices", {}).get("pools", ()):
            metrics.SLICES.labels(pool["name"], pool["state"]).set(pool["slices"])
        metrics.SLICE_WRITES.set(dra.get("slices", {}).get("writes", 0))

    def _page_metrics(self) -> None:
        metrics.HUGEPAGES.clear()
        for pool in (pool for node in self._watched.agent.inventory.numa_nodes for pool in node.hugepages):
            states = {"total": pool.total_pages, "free": pool.free_pages, "reserved": pool.reserved_pages}
            states |= {"foreign": pool.foreign_pages} if pool.foreign_pages is not None else {}
            for state, pages in states.items():
                metrics.HUGEPAGES.labels(str(pool.node), format_size(pool.page_bytes), state).set(pages)

    def _pinning_metrics(self) -> None:
        pinning = self._watched.pinning_document()
        metrics.PINNED.set(len(pinning["pinned"]))
        metrics.UNCONFINED.set(len(pinning["errors"]))
        metrics.THROTTLED.set(sum(one["quota_cpus"] is not None for one in pinning["pinned"]))
        metrics.RUNTIME_CONNECTED.set(pinning["connected"])

    async def _release(self, grant_id: str) -> HttpAnswer:
        gone = await self._watched.agent.release([grant_id], new_op())
        if not gone:
            return _problem(404, f"cannot release {grant_id}: there is no such grant")
        return _document([grant_document(one) for one in gone])

    async def _clear_health(self, device: str) -> HttpAnswer:
        if not await self._watched.clear_health(device):
            return _problem(404, f"cannot clear {device}: no cause has latched")
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
        "things": [list(one) for one in grant.things],
        "granted_at": grant.granted_at,
    }


def _by_part(grants: Iterable[Grant]) -> dict[str, Grant]:
    """Return the grant that holds each whole device or CPU, whichever API it came through."""
    found = {}
    for grant in grants:
        found.update(dict.fromkeys((*grant.devices, *(f"cpu{cpu}" for cpu in grant.cpus)), grant))
    return found


def _document(value: Any) -> HttpAnswer:
    return HttpAnswer(200, json.dumps(value).encode() + b"\n")
