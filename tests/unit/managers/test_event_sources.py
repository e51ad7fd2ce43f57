"""Which parts of the agent report what: each with the pods that it can be proven to concern."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nodeagent.core.dra.device_pool import label
from nodeagent.core.events.happenings import Happening, PodRef, Reason
from nodeagent.core.model.claim import ClaimRef
from nodeagent.errors import InputError
from nodeagent.kube.kubelet.pod_resources import CHECKPOINT
from nodeagent.managers.deviceplugin.adapter import OfferAdapter
from nodeagent.state.audit import DRIFT, AuditEntry, newest
from nodeagent.state.store import FILE
from tests.doubles.runtime import PluginRefusedError
from tests.support.claim_node import claim_room
from tests.support.dra_node import result
from tests.support.pin_node import PinNode, pin_node
from tests.support.until import until
from tests.unit.state.test_agent import CPU

PORT = label("/dev/ttyS0")
POD = PodRef("default", "pod", "pod-uid")
BOOK = PodRef("default", "db", "uid-db")


async def test_a_refused_claim_concerns_the_pods_for_which_it_is_reserved(folder: Path) -> None:
    """With the reason and what would admit it, as kubelet is answered."""
    async with claim_room(folder) as room:
        claim = room.claim("c", result("cpu", "nowhere"))
        (answer,) = await room.prepare(claim)
        (told,) = room.reported
        assert (told.reason, told.pods) == (Reason.CLAIM_REFUSED, (POD,))
        assert told.note == answer.error != ""


async def test_a_claim_that_cannot_be_read_is_reported_on_the_node(folder: Path) -> None:
    async with claim_room(folder) as room:
        room.away = True
        await room.prepare(ClaimRef(namespace="default", name="x", uid="8f2d2c1e"))
        (told,) = room.reported
        assert (told.reason, told.pods) == (Reason.CLAIM_REFUSED, ())


async def test_a_claim_that_is_prepared_is_not_reported(folder: Path) -> None:
    async with claim_room(folder) as room:
        (answer,) = await room.prepare(room.claim("c", result("char", PORT)))
        assert not answer.error and room.reported == []


async def test_a_refused_allocate_is_reported_on_the_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubelet does not say for which pod it asks."""
    async with pin_node(folder, monkeypatch) as node:
        adapter = OfferAdapter(node.agent, CPU, node.reported.append)
        await adapter.allocate([["cpu4"]], "op")
        with pytest.raises(InputError):
            await adapter.allocate([["cpu999"]], "op")
        (told,) = node.reported
        assert (told.reason, told.pods) == (Reason.ALLOCATION_REFUSED, ())
        assert "cpu999" in told.note


async def test_a_repaired_drift_is_reported_on_the_pod(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that cannot be repaired, with the reason."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        path = node.path("db", "main")
        node.tree.set(path, "cpuset.cpus", "6")
        # The kernel's double makes a set effective a moment after it has it: the agent may see a second change.
        repaired = await _reported(node, Reason.DRIFT_REPAIRED)
        node.tree.refuses[f"{path}/cpuset.cpus"] = errno.EBUSY
        node.tree.set(path, "cpuset.cpus", "6")
        not_repaired = await _reported(node, Reason.DRIFT_NOT_REPAIRED)
        node.tree.refuses.clear()
        assert (repaired.pods, not_repaired.pods) == ((BOOK,), (BOOK,))
        assert "of default/db/main; repaired" in repaired.note and "cannot write" in not_repaired.note
        for why in ("repaired", "cannot write"):
            await until(lambda why=why: any(why in one.why for one in drifts(folder)))
        assert all(one.what.startswith("default/db/main: cpuset.cpus") for one in drifts(folder))


async def _reported(node: PinNode, reason: Reason) -> Happening:
    """The first report with a reason, as soon as there is one."""
    await node.until(lambda: any(one.reason is reason for one in node.reported))
    return next(one for one in node.reported if one.reason is reason)


def drifts(folder: Path) -> list[AuditEntry]:
    """What of them is in the audit."""
    (path,) = folder.rglob(FILE)
    return [one for one in newest(path, -1) if one.action == DRIFT]


async def test_a_container_that_is_not_started_is_reported_on_its_pod(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        (grant,) = node.agent.ledger.grants
        (folder / CHECKPOINT).write_text("{")
        with pytest.raises(PluginRefusedError):
            await node.create("db", "main", env=[f"NODEAGENT_CPU_GRANT={grant}"])
        told = node.reported[0]
        assert (told.reason, told.pods) == (Reason.CONTAINER_REFUSED, (BOOK,))
        assert told.note.startswith("cannot start container default/db/main: ")
