"""The audit: who or what released a grant and by which rule, and what was refused to whom."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.core.ledger.witness import Sight
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, Evidence
from nodeagent.errors import InputError, Refused, StateError
from nodeagent.managers.deviceplugin.adapter import OfferAdapter
from nodeagent.state import audit
from nodeagent.state.audit import AuditEntry, Happening, Refusal, newest
from nodeagent.state.store import FILE, Store
from tests.support.claim_node import claim_room
from tests.support.dra_node import consumed
from tests.unit.managers.test_claim_garbage_collector import gone, looking
from tests.unit.state.test_agent import CPU, FUSE, holding, node
from tests.unit.state.test_store import granted

NEW = Refusal(holder="claim default/c", want="n/numa0 (cpu=2)", why="cannot prepare claim default/c: 1 free")


def entries(folder: Path, action: str) -> list[AuditEntry]:
    return [one for one in newest(folder / FILE, -1) if one.action == action]


def refused(store: Store, *refusals: Refusal, at: float) -> None:
    store.record_refusals(refusals, op="op", at=at)


# ---------------------------------------------------------------- releases


async def test_a_release_on_kubelets_word_names_the_rule_and_the_witness(folder: Path) -> None:
    """The list alone is never the reason: the second witness is named with it."""
    async with node(folder) as one:
        for cpu, pod in (("cpu1", "a"), ("cpu2", "b")):
            await one.grant(CPU, cpu)
            await one.reconcile(holding(pod, CPU, cpu))
            one.sight = Sight.ABSENT if pod == "a" else Sight.EMPTY
            await one.reconcile()
            await one.reconcile(after_s=6)
    assert [(one.holder, one.what, one.why) for one in entries(folder, "released")] == [
        ("ns/a/main", "CPUs 1", "kubelet no longer lists it; its pod's cgroup is removed"),
        ("ns/b/main", "CPUs 2", "kubelet no longer lists it; nothing of its pod runs"),
    ]


async def test_an_admin_and_another_container_are_named_as_those_who_took_a_grant(folder: Path) -> None:
    async with node(folder) as one:
        first = await one.grant(CPU, "cpu1")
        await one.grant(CPU, "cpu1", "cpu2")
        await one.agent.release([one.agent.ledger.by_id[CPU.name, "cpu1"].id], "op")
    assert [(line.grant == first.id, line.why) for line in entries(folder, "released")] == [
        (True, "kubelet allocated its ids again"),
        (False, "an admin released it"),
    ]


async def test_what_kubelet_lists_and_the_ledger_lacked_is_adopted_for_that_reason(folder: Path) -> None:
    async with node(folder) as one:
        await one.reconcile(holding("a", CPU, "cpu1"))
    assert [line.why for line in entries(folder, "adopted")] == ["kubelet lists it, and the ledger lacked it"]


async def test_a_claims_release_names_unprepare_a_new_allocation_or_the_garbage_collection(folder: Path) -> None:
    async with claim_room(folder / "a") as room:
        claim = room.claim("c", consumed("cpu", "numa0", cpus="2"))
        await room.prepare(claim)
        room.claim("c", consumed("cpu", "numa1", cpus="2"), uid=claim.uid)
        await room.prepare(claim)
        await room.unprepare(claim)
    async with looking(folder / "b", "c") as look:
        gone(look)
        assert [await look.look(), await look.look()] == [[], ["c"]]
    found = [*entries(folder / "a" / "state", "released"), *entries(folder / "b" / "state", "released")]
    assert list(dict.fromkeys(line.why for line in found)) == [
        "its claim was allocated something else",
        "kubelet unprepared its claim",
        "garbage collection: kubelet uses it no longer, and it is gone or reserved for no pod",
    ]


# ---------------------------------------------------------------- refusals


async def test_a_refused_allocate_is_in_the_audit_with_what_was_wanted(folder: Path) -> None:
    """Kubelet does not tell a device plugin for which pod it asks."""
    async with node(folder) as one:
        grant = await one.grant(CPU, "cpu1")
        one.alive.add("u")
        one.agent.ledger = replace(one.agent.ledger, grants={grant.id: replace(grant, pods=("u",))})
        with pytest.raises(Refused):
            await OfferAdapter(one.agent, CPU).allocate([["cpu1", "cpu2"], ["cpu3"]], "op7")
        one.agent.ledger = replace(one.agent.ledger, grants={grant.id: grant})
    (line,) = entries(folder, "refused")
    assert (line.op, line.times, line.grant) == ("op7", 1, "")
    assert (line.holder, line.what) == (f"a container not yet listed ({CPU.name})", "cpu1, cpu2; cpu3")
    assert line.why == (
        f"cannot grant cpu1 of {CPU.name}: held by a container not yet listed ({CPU.name}), and it runs"
    )


async def test_a_refused_prepare_is_in_the_audit_with_its_pod_and_what_was_allocated(folder: Path) -> None:
    """Repeated by kubelet, it is counted; a claim that cannot be read is refused too."""
    async with claim_room(folder) as room:
        claim, unknown = room.claim("c", consumed("cpu", "numa0", cpus="6")), room.claim("d")
        del room.objects["default", "d"]
        for _ in range(3):
            answers = [one.error for one in await room.prepare(claim, unknown)]
    found = {line.holder: line for line in entries(folder / "state", "refused")}
    assert list(found) == ["claim default/c of pod", "claim default/d"]
    assert [(one.times, one.why) for one in found.values()] == [(3, answers[0]), (3, answers[1])]
    assert [one.what for one in found.values()] == ["node-a/cpu/numa0 (cpus=6)", ""]


def test_equal_refusals_are_counted_and_others_are_not(folder: Path) -> None:
    """Also where the retries of two claims take turns; after an hour of silence an entry begins again."""
    other = replace(NEW, holder="claim default/d")
    with contextlib.closing(Store(folder)) as store:
        for second in range(5):
            refused(store, NEW, other, at=float(second))
        refused(store, NEW, at=4 + audit.REPEAT_S)
    counted = [(one.holder, one.times, one.first_at, one.at) for one in entries(folder, "refused")]
    assert counted == [
        (NEW.holder, 5, 0.0, 4.0),
        (other.holder, 5, 0.0, 4.0),
        (NEW.holder, 1, 3604.0, 3604.0),
    ]


def test_refusals_cannot_fill_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are limited in number and length, the newest stay, and old ones go with the rest of the audit."""
    monkeypatch.setattr(audit, "MOST_REFUSALS", 10)
    with contextlib.closing(Store(folder)) as store:
        for number in range(25):
            refused(store, replace(NEW, want=f"{number}", why="x" * 100_000), at=float(number))
        found = entries(folder, "refused")
        assert [one.what for one in found] == [str(number) for number in range(15, 25)]
        assert {len(one.why) for one in found} == {audit.MOST_CHARACTERS}
        store.prune(20.0)
    assert [one.what for one in entries(folder, "refused")] == ["20", "21", "22", "23", "24"]


async def test_a_refusal_that_cannot_be_recorded_is_still_answered(folder: Path) -> None:
    """The disk is full; the caller does not wait for the audit."""
    async with node(folder) as one:
        one.agent._store._db.execute("DROP TABLE refusals")
        with pytest.raises(InputError):
            await OfferAdapter(one.agent, FUSE).allocate([["/dev/fuse", "/dev/fuse::1"], ["/dev/fuse::1"]], "op")
        await one.agent.refresh()
        await one.grant(CPU, "cpu1")


# ---------------------------------------------------------------- what else happened


async def test_the_health_of_a_device_is_in_the_audit_whenever_it_changes(folder: Path) -> None:
    """Equal changes within an hour are one entry; what stays as it is makes none."""
    async with node(folder) as one:
        for state in (UNHEALTHY, UNHEALTHY, HEALTHY, UNHEALTHY):
            one.agent.observe(
                [Evidence(device="gpu0", source="s", state=state, reason="" if state == HEALTHY else "hot")]
            )
            one.now_s += 1000
            one.agent.recover_due()
        await one.agent.refresh()
        await one.grant(CPU, "cpu1")
    found = [(line.what, line.why, line.times) for line in entries(folder, "health")]
    assert sorted(found) == [("gpu0 healthy", "", 1), ("gpu0 unhealthy", "hot", 2)]


def test_what_happened_is_limited_in_number_and_goes_with_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MOST_HAPPENINGS", 3)
    with contextlib.closing(Store(folder)) as store:
        for number in range(5):
            store.record_happenings([Happening(action="configuration", what=f"applied: {number}")], at=float(number))
        assert [one.what for one in entries(folder, "configuration")] == ["applied: 2", "applied: 3", "applied: 4"]
        store.prune(4.0)
    assert [one.what for one in entries(folder, "configuration")] == ["applied: 4"]


# ---------------------------------------------------------------- reading


def test_a_file_of_an_older_build_is_read_without_reasons(folder: Path) -> None:
    """Reading changes nothing of it."""
    with contextlib.closing(Store(folder)) as store:
        store.save(granted(1), op="a", at=1e9)
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        db.executescript("DROP TABLE refusals; DROP TABLE audit_reasons; DROP TABLE happenings;")
        before = db.execute("SELECT name FROM sqlite_schema").fetchall()
        assert [one.why for one in newest(folder / FILE, -1)] == [""]
        assert db.execute("SELECT name FROM sqlite_schema").fetchall() == before


def test_an_audit_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(StateError, match=rf"cannot read {folder}/ledger.db: unable to open database file"):
        newest(folder / FILE, -1)


def test_a_ledger_that_was_found_whole_says_so(folder: Path) -> None:
    with contextlib.closing(Store(folder)) as store:
        store.save(granted(1), op="a", at=1e9)
    (folder / FILE).unlink()
    with contextlib.closing(Store(folder)) as store:
        store.found_whole()
    assert [(one.action, one.why) for one in newest(folder / FILE, -1)] == [
        ("ledger", "it was found to have every decision in force")
    ]


def test_an_older_build_beside_this_one_leaves_reasons_and_refusals_alone(folder: Path) -> None:
    """It knows the layout, and nothing else of the file: it decides, and this build goes on."""
    with contextlib.closing(Store(folder)) as store:
        refused(store, NEW, at=1.0)
        with contextlib.closing(sqlite3.connect(folder / FILE, isolation_level=None)) as older:
            older.execute(
                "INSERT INTO audit SELECT 9, 1.5, 'released', 'o', 'g', 'h', '{\"id\": \"g\", \"api\": \"claim\"}'"
            )
            older.execute("DELETE FROM audit WHERE seq < 9")
        store.save(granted(2), op="b", at=2.0)
        assert store.note == ""
    assert [one.action for one in newest(folder / FILE, -1)] == ["refused", "released", "granted"]
