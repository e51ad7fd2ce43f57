"""A ledger that was lost, over both APIs: what is in use is put back exactly, what is not known is held back, and until
then no pod is given anything that may be in use.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import tempfile
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nodeagent.core.dra.device_pool import label
from nodeagent.core.ledger.witness import Sight, Sighting, Witnesses
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import NodeagentError, PeerError, Refused
from nodeagent.host.cdi import CdiFolder, ClaimFiles
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.pods_alive import PodCgroups
from nodeagent.host.devices import all_kinds
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.kubelet.pod_resources import CHECKPOINT, NO_LISTING, Listing
from nodeagent.kube.kubelet_files.claim_state import STATE_FILE
from nodeagent.managers.ledger_recovery import LedgerRecovery
from nodeagent.managers.pinning.containers import ContainerTable as Containers
from nodeagent.managers.pod_witness import PodWitness
from nodeagent.resources.offer import Offer, offers
from nodeagent.state import layout as ledgerlayout
from nodeagent.state.layout import LedgerLayout, migrate
from nodeagent.state.store import FILE
from tests.support.claim_node import Room, claim_room, config_of
from tests.support.dra_node import CPUS, DRIVER, SERIAL, consumed, result
from tests.support.long_form import share_of

STEPS_IN_ALL, HISTORIES = share_of(100_000, 0.2), 16
BOTH = ({**CPUS, "serve": "both"}, {**SERIAL, "serve": "both"})


@dataclass
class Pod:
    """A device-plugin pod that runs."""

    uid: str
    resource: str
    ids: tuple[str, ...]


@dataclass
class Node:
    """A node whose ledger may be lost at any moment, and what is really in use on it."""

    room: Room
    kubelet: Path
    silent: bool = False
    """Whether kubelet's socket does not answer."""
    pods: dict[str, Pod] = field(default_factory=dict)
    claims: dict[str, tuple[ClaimRef, CpuSet, str]] = field(default_factory=dict)
    """What each claim was answered with: CPUs, and a port or ""."""
    copies: list[Path] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        (self.kubelet / "device-plugins").mkdir(parents=True)
        self.offers: Sequence[Offer] = tuple(offers(config_of(*BOTH), all_kinds.builtin_kinds()))
        self.write()

    @property
    def file(self) -> Path:
        return self.room.folder / "state" / FILE

    def recovery(self) -> LedgerRecovery:
        sysfs, plugins, containers = (
            SysFs(self.room.folder / "none"),
            self.kubelet / "device-plugins",
            Containers(layouts()),
        )
        witness = PodWitness(PodCgroups(sysfs), containers, plugins, frozenset({"n"}))
        cdi, readable = CdiFolder(self.room.cdi, DRIVER, sysfs), ClaimFiles(self.room.readable)
        by_plugin = lambda: [one.by_device_plugin_alone() for one in self.offers]  # noqa: E731
        return LedgerRecovery(
            self.room.agent, self, witness, containers, self.kubelet, plugins, cdi, readable, DRIVER, by_plugin
        )  # type: ignore[arg-type]

    async def listing(self) -> Listing:
        """In place of PodResources."""
        if self.silent:
            raise PeerError("cannot list pod resources: on purpose")
        return NO_LISTING

    def write(self) -> None:
        """What kubelet has on disk."""
        entries = [
            {"PodUID": one.uid, "ContainerName": "c", "ResourceName": one.resource, "DeviceIDs": {"-1": list(one.ids)}}
            for one in self.pods.values()
        ]
        checkpoint = self.kubelet / "device-plugins" / CHECKPOINT
        checkpoint.write_text(json.dumps({"Data": {"PodDeviceEntries": entries}}))
        state = [
            {"ClaimUID": uid, "ClaimName": ref.name, "Namespace": ref.namespace, "DriverState": {DRIVER: {}}}
            for uid, (ref, _, _) in self.claims.items()
        ]
        data = json.dumps({"kind": "DRACheckpoint", "ClaimInfoStateList": state})
        (self.kubelet / STATE_FILE).write_text(json.dumps({"Data": data, "Checksum": 0}))

    async def look(self) -> dict[str, str]:
        return dict(await self.recovery().look())

    async def lost(self, lose: Callable[[Node], None]) -> None:
        """The agent is killed, something happens to the ledger's file, and an agent starts."""
        await self.room.agent.close()
        lose(self)
        await self.room.restart()

    # ---------------------------------------------------------------- what must hold

    def in_use(self) -> list[tuple[str, CpuSet, frozenset[str]]]:
        """(whose, CPUs, ports) of all that runs."""
        found = [(uid, cpus, frozenset({port} - {""})) for uid, (_, cpus, port) in self.claims.items()]
        for pod in self.pods.values():
            numbers = [int(one[3:]) for one in pod.ids if one.startswith("cpu")]
            ports = frozenset(label(one) for one in pod.ids if not one.startswith("cpu"))
            found.append((pod.uid, CpuSet(numbers), ports))
        return found

    def check(self) -> None:
        """Nothing is used twice; of a whole ledger, what is used is in it."""
        cpus = Counter(cpu for _, some, _ in self.in_use() for cpu in some)
        ports = Counter(port for _, _, some in self.in_use() for port in some)
        assert max([*cpus.values(), *ports.values(), 0]) <= 1, f"used twice: {cpus} {ports}"
        if not self.room.agent.loss:
            held = self.room.agent.ledger
            assert CpuSet(cpus) <= held.cpus_held, f"{CpuSet(cpus) - held.cpus_held} are used and not held"
            assert set(ports) <= {label(one) for one in held.devices_held}, f"{set(ports)} are used and not held"


@contextlib.asynccontextmanager
async def node(folder: Path) -> AsyncIterator[Node]:
    async with claim_room(folder, *BOTH, ports=3) as room:
        yield Node(room, folder / "kubelet")


# ---------------------------------------------------------------- ways to lose a ledger


def overwrite(node: Node) -> None:
    _without_journals(node)
    node.file.write_bytes(b"\xa5" * 20_000)


def truncate(node: Node) -> None:
    _without_journals(node)
    with node.file.open("r+b") as file:
        file.truncate(4096)


def remove(node: Node) -> None:
    _without_journals(node)
    node.file.unlink()


def replace_by_older(node: Node) -> None:
    """The oldest copy that there is."""
    _without_journals(node)
    if node.copies:
        shutil.copy(node.copies[0], node.file)


def upgrade_and_roll_back(node: Node) -> None:
    """The next version wrote it, and this one starts again."""
    layout = LedgerLayout("CREATE TABLE colours (name TEXT)", "DROP TABLE colours")
    with contextlib.closing(sqlite3.connect(node.file, isolation_level=None)) as db:
        migrate(db, (*ledgerlayout.LAYOUTS, layout))


LOSSES = (overwrite, truncate, remove, replace_by_older, upgrade_and_roll_back)


def _without_journals(node: Node) -> None:
    for name in ("-wal", "-shm"):
        node.file.with_name(FILE + name).unlink(missing_ok=True)


# ---------------------------------------------------------------- examples


async def prepared(one: Node, name: str = "c", cpus: int = 2) -> ClaimRef:
    claim = one.room.claim(name, consumed("cpu", "numa0", cpus=str(cpus)))
    (answer,) = await one.room.prepare(claim)
    assert answer.error == ""
    one.claims[claim.uid] = claim, one.room.cpus(claim), ""
    one.write()
    return claim


@pytest.mark.parametrize("lose", LOSSES)
async def test_a_prepared_claim_outlives_its_ledger(lose: Callable[[Node], None], folder: Path) -> None:
    """With the same CPUs, its CDI file and the same grant id; no pod gets them meanwhile or afterwards."""
    async with node(folder) as one:
        one.copies = [Path(shutil.copy(one.file, folder / "copy"))]
        claim = await prepared(one)
        before = one.room.agent.ledger.grants
        await one.lost(lose)
        await one.room.rendering.restore()
        assert one.room.spec_file(claim).exists()
        one.check()
        assert await one.look() == {}
        assert one.room.agent.loss == ""
        assert one.room.agent.ledger.grants == before
        await one.room.rendering.restore()
        assert one.room.spec_file(claim).exists()


async def test_until_kubelet_has_been_asked_nothing_new_is_granted(folder: Path) -> None:
    """Neither API; what is held already is answered again, and the reason is in the refusal."""
    async with node(folder) as one:
        claim = await prepared(one)
        await one.lost(overwrite)
        one.silent = True
        (one.kubelet / STATE_FILE).unlink()
        assert await one.look() == {"kubelet": "cannot list pod resources: on purpose"}
        offer = one.offers[0].by_device_plugin_alone()
        with pytest.raises(Refused, match=r"the ledger may lack decisions \(.*\): cannot list pod resources"):
            await one.room.agent.allocate(offer.resource, [["cpu1"]], offer.edits, "op")
        assert not [shown for shown in one.room.agent.advertised(offer.resource) if shown.healthy]
        (new,) = await one.room.prepare(one.room.claim("new", consumed("cpu", "numa1", cpus="1")))
        assert "the ledger may lack decisions" in new.error
        assert [answer.error for answer in await one.room.prepare(claim)] == [""]
        one.silent = False
        one.write()
        assert await one.look() == {}
        await one.room.agent.allocate(offer.resource, [["cpu1"]], offer.edits, "op")


async def test_a_claim_whose_files_are_lost_too_holds_everything_back_while_it_runs(folder: Path) -> None:
    """Its CPUs are not known. Prepared again after its end, or given back, it is accounted for."""
    async with node(folder) as one:
        claim = await prepared(one)
        shutil.rmtree(one.room.readable / claim.uid)
        await one.lost(overwrite)
        one.room.alive.add("pod-uid")
        assert set(await one.look()) == {claim.uid}
        (answer,) = await one.room.prepare(claim)
        assert "the ledger may lack decisions" in answer.error
        one.room.alive.clear()
        (answer,) = await one.room.prepare(claim)
        assert answer.error == ""
        assert await one.look() == {}
        await one.room.unprepare(claim)


async def test_devices_of_kubelets_checkpoint_are_adopted_before_kubelet_lists_them(folder: Path) -> None:
    """Also those of init containers, which it never lists."""
    async with node(folder) as one:
        offer = one.offers[0].by_device_plugin_alone()
        await one.room.agent.allocate(offer.resource, [["cpu2", "cpu3"]], offer.edits, "op")
        one.pods["u"] = Pod("u", offer.name, ("cpu2", "cpu3"))
        one.write()
        await one.lost(remove)
        one.silent = True
        assert await one.look() == {}
        (grant,) = one.room.agent.ledger.grants.values()
        assert (grant.ids, grant.pods, grant.confirmed) == (("cpu2", "cpu3"), ("u",), False)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"grants": []}', b'{"grants": [{"id": "x"}]}', b"\xff"])
async def test_a_claims_file_that_cannot_be_read_is_named_and_nothing_is_invented(content: bytes, folder: Path) -> None:
    """The claim is in use all the same."""
    async with node(folder) as one:
        claim = await prepared(one)
        (one.room.readable / claim.uid / "metadata.json").write_bytes(content)
        await one.lost(overwrite)
        missing = await one.look()
        assert set(missing) == {claim.uid}
        assert one.room.agent.ledger.grants == {}


async def test_a_claims_file_that_carries_another_claims_grants_is_not_believed(folder: Path) -> None:
    """Two files with one grant would be one part twice."""
    async with node(folder) as one:
        claim, other = await prepared(one, "c"), await prepared(one, "d")
        shutil.copy(one.room.readable / other.uid / "metadata.json", one.room.readable / claim.uid / "metadata.json")
        await one.lost(overwrite)
        assert "it carries grants of another claim" in (await one.look())[claim.uid] or set(await one.look()) == {
            claim.uid
        }
        assert {grant.holder.uid for grant in one.room.agent.ledger.grants.values()} == {other.uid}


# ---------------------------------------------------------------- random histories


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder that costs no disk: thousands of decisions are made in it, and no power is cut."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="na-", dir=memory) as folder:
        yield Path(folder)


class History:
    """Kubelet, its pods and claims, and a ledger that is lost now and then."""

    def __init__(self, one: Node, seed: int) -> None:
        self.node = one
        self.draw = random.Random(seed)

    async def admit(self) -> None:
        node = self.node
        offer = self.draw.choice(node.offers).by_device_plugin_alone()
        taken = {one for pod in node.pods.values() if pod.resource == offer.name for one in pod.ids}
        healthy = [one.id for one in node.room.agent.advertised(offer.resource) if one.healthy and one.id not in taken]
        if not healthy:
            return
        ids = tuple(self.draw.sample(healthy, min(len(healthy), self.draw.choice((1, 1, 2)))))
        try:
            await node.room.agent.allocate(offer.resource, [ids], offer.edits, "op")
        except NodeagentError:
            node.counts["refused"] += 1
            return
        uid = str(uuid.UUID(int=self.draw.getrandbits(128)))
        node.pods[uid] = Pod(uid, offer.name, ids)
        node.write()
        await self.reconcile()

    async def delete(self) -> None:
        if self.node.pods:
            del self.node.pods[self.draw.choice(list(self.node.pods))]
            self.node.write()
            await self.reconcile()

    async def reconcile(self) -> None:
        """Kubelet's list; the cgroups of ended pods are gone."""
        node, agent = self.node, self.node.room.agent
        given = {(one.uid, "c"): frozenset((one.resource, id) for id in one.ids) for one in node.pods.values()}
        uids = {uid for grant in agent.ledger.grants.values() for uid in grant.pods}
        sights = {uid: Sighting(Sight.LIVES if uid in node.pods else Sight.ABSENT, "it runs") for uid in uids}
        witnesses = Witnesses(kubelet=1, knows_pods=True, given=given, sights=sights)
        mine = [one.resource for one in node.offers]
        for after_s in (0.0, 100.0, 1000.0):
            await agent.reconcile([], mine, "op", asked_at=agent._clock() + after_s, witnesses=witnesses)

    async def prepare(self) -> None:
        node, room = self.node, self.node.room
        if self.draw.random() < 0.3:
            port = self.draw.choice(["/dev/ttyS0", "/dev/ttyS1", "/dev/ttyS2"])
            wanted = result("char", label(port), "port")
        else:
            wanted = consumed("cpu", self.draw.choice(("numa0", "numa1")), cpus=str(self.draw.choice((1, 1, 2))))
        claim = room.claim(f"c{self.draw.getrandbits(60)}", wanted)
        (answer,) = await room.prepare(claim)
        if answer.error:
            node.counts["refused"] += 1
            return
        held = [one for one in room.agent.ledger.grants.values() if one.holder.uid == claim.uid]
        node.claims[claim.uid] = claim, held[0].cpus, label(held[0].devices[0]) if held[0].devices else ""
        node.write()
        node.counts["prepared"] += 1

    async def prepare_again(self) -> None:
        """Kubelet restarted: the answer is the same."""
        if self.node.claims:
            claim, cpus, _ = self.node.claims[self.draw.choice(list(self.node.claims))]
            (answer,) = await self.node.room.prepare(claim)
            if not answer.error:
                held = [g for g in self.node.room.agent.ledger.grants.values() if g.holder.uid == claim.uid]
                assert held[0].cpus == cpus, "a claim was moved"

    async def unprepare(self) -> None:
        if self.node.claims:
            uid = self.draw.choice(list(self.node.claims))
            assert await self.node.room.unprepare(self.node.claims[uid][0]) == [""]
            del self.node.claims[uid]
            self.node.write()

    async def copy(self) -> None:
        """A backup of the ledger is made."""
        if len(self.node.copies) < 3:
            target = self.node.room.folder / f"copy{len(self.node.copies)}"
            with (
                contextlib.closing(sqlite3.connect(self.node.file)) as db,
                contextlib.closing(sqlite3.connect(target)) as copy,
            ):
                db.backup(copy)
            self.node.copies.append(target)

    async def lose(self) -> None:
        lose = self.draw.choice(LOSSES)
        await self.node.lost(lose)
        self.node.counts[lose.__name__] += 1
        self.node.silent = self.draw.random() < 0.3

    async def look(self) -> None:
        if self.node.room.agent.loss:
            await self.node.look()
        self.node.silent = self.draw.random() < 0.1

    async def render(self) -> None:
        await self.node.room.rendering.restore()

    async def restart(self) -> None:
        await self.node.room.agent.close()
        await self.node.room.restart()

    async def step(self) -> None:
        weights = {
            self.admit: 24, self.delete: 14, self.prepare: 20, self.prepare_again: 6, self.unprepare: 12,
            self.copy: 1, self.lose: 1.5, self.look: 12, self.render: 3, self.restart: 1.5,
        }  # fmt: skip
        (chosen,) = self.draw.choices(list(weights), list(weights.values()))
        await chosen()
        self.node.check()


@pytest.mark.parametrize("seed", range(HISTORIES))
async def test_whatever_happens_to_the_ledger_nothing_is_held_twice_and_nothing_in_use_is_lost(
    seed: int, memory_folder: Path
) -> None:
    """Over both APIs, with the ledger destroyed, truncated, removed, replaced by an older copy or rolled back at any
    moment; kubelet may be silent meanwhile."""
    async with node(memory_folder) as one:
        history = History(one, seed)
        for _ in range(STEPS_IN_ALL // HISTORIES):
            await history.step()
        one.silent = False
        await one.look()
        assert one.room.agent.loss == ""
        one.check()
        assert one.counts["prepared"] > 20 and sum(one.counts[lose.__name__] for lose in LOSSES) > 5
