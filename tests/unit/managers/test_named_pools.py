"""Named pools in force: members and others on control groups that answer as the kernel does."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.core.dra.cpu_pool import CpuPool
from nodeagent.core.dra.prepare import Catalog, grants_of
from nodeagent.core.model.claim import Claim
from nodeagent.core.pinning.plan import variable
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pools import DRIVER, NODE, claim, result
from tests.support.pin_node import PinNode, pin_node

node_of = functools.partial(pin_node, request_timeout_s=20.0)
"""How long the runtime waits is of no interest here."""
CATALOG = Catalog(driver=DRIVER, node_name=NODE, kinds={"cpu": CpuPool()})


def asked(name: str, pool: str, count: int, on: str = "numa0") -> Claim:
    """A claim for a pod of the same name; without a pool its CPUs are exclusive."""
    config = {"kind": "CpuConfig", "namedPool": pool}
    return replace(claim(name, result("cpu", on, share=name, cpus=count), config=config), reserved_for=(f"uid-{name}",))


async def give(node: PinNode, *claims: Claim) -> None:
    batch = await node.agent.prepare(CATALOG, claims, "op")
    assert not batch.errors


async def release(node: PinNode, name: str) -> None:
    await node.agent.release([one.id for one in grants_of(node.agent.ledger, f"uid-{name}")], "op")


def env(node: PinNode, names: Iterable[str]) -> list[str]:
    found = [one.id for name in names for one in grants_of(node.agent.ledger, f"uid-{name}")]
    return [f"{variable(id)}={id}" for id in found]


async def run(node: PinNode, *names: str) -> str:
    """A pod's container that uses these claims is created and started; where it runs by then."""
    await node.run(names[0], "main", env=env(node, names))
    return where(node, names[0])


def where(node: PinNode, name: str) -> str:
    return node.tree.effective(node.path(name, "main"))


def held(node: PinNode, name: str) -> str:
    return ",".join(str(one.cpus) for one in grants_of(node.agent.ledger, f"uid-{name}"))


async def test_the_members_of_a_pool_are_moved_when_others_come_and_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 CPUs without siblings, CPU 0 reserved. By the time an exclusive container is created, the pool has left its
    CPUs."""
    async with node_of(folder, monkeypatch) as node:
        await give(node, asked("a", "web", 2))
        assert await run(node, "a") == "1-7"
        await node.run("plain", "main")
        assert where(node, "plain") == "3-15" and held(node, "a") == "1-2"
        await give(node, asked("x", "", 4))
        await node.create("x", "main", env=env(node, ["x"]))
        assert (where(node, "x"), where(node, "a")) == ("3-6", "1-2,7")
        await give(node, asked("b", "web", 1))
        assert await run(node, "b") == "1-2,7" == where(node, "a")
        assert where(node, "plain") == "8-15"
        await node.remove("x", "main")
        await release(node, "x")
        await node.until(lambda: (where(node, "a"), where(node, "plain")) == ("1-7", "3-6,8-15"))
        await node.remove("a", "main")
        await release(node, "a")
        await node.until(lambda: (where(node, "b"), where(node, "plain")) == ("1-7", "1-6,8-15"))


async def test_a_member_s_status_names_its_pool_and_where_it_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node_of(folder, monkeypatch) as node:
        await give(node, asked("a", "web", 2))
        await run(node, "a")
        (shown,) = node.pins.document()["pinned"]
        assert (shown["granted_cpus"], shown["pools"], shown["pool_cpus"]) == ("1-2", ["web"], "1-7")
        assert (shown["effective_cpus"], shown["quota_cpus"]) == ("1-7", None)


async def test_a_member_is_no_partition_and_one_with_exclusive_cpus_beside_is_none_either(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node_of(folder, monkeypatch, partition="isolated") as node:
        await give(node, asked("a", "web", 2))
        assert await run(node, "a") == "1-7"
        file = node.tree.mount / node.path("a", "main") / "cpuset.cpus.partition"
        assert file.read_text().strip() in ("", "member")
        assert not node.pins.reconciler.errors


async def test_a_drift_of_a_member_is_repaired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node_of(folder, monkeypatch) as node:
        await give(node, asked("a", "web", 2))
        await run(node, "a")
        node.tree.put(f"{node.tree.mount}/{node.path('a', 'main')}/cpuset.cpus", "1-3")
        await node.until(lambda: where(node, "a") == "1-7")


async def test_a_restarted_agent_leaves_a_pool_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node_of(folder, monkeypatch) as node:
        await give(node, asked("a", "web", 2), asked("x", "", 2, "numa1"))
        await run(node, "a")
        await run(node, "x")
        before: Any = where(node, "a"), where(node, "x")
        await node.end()
        node.begin()
        await node.runtime.connected(2)
        assert (where(node, "a"), where(node, "x")) == before
        assert node.pins.document()["drifts"] == 0


async def test_where_control_groups_cannot_be_written_the_runtime_moves_the_members(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node_of(folder, monkeypatch, writable=False) as node:
        await give(node, asked("a", "web", 2))
        await node.create("a", "main", env=env(node, ["a"]))
        assert node.runtime.cpus("a_main") == "1-7"
        await give(node, asked("x", "", 4))
        await node.create("x", "main", env=env(node, ["x"]))
        assert (node.runtime.cpus("x_main"), node.runtime.cpus("a_main")) == ("3-6", "1-2,7")


async def test_a_container_that_hides_hyperthreads_has_one_thread_of_each_core(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU n and n + 8 are siblings. As much CPU time as threads that run is no limit worth a note."""
    inventory = inventory_of(even_rows(1, 1, 1, 8, 2))
    async with node_of(folder, monkeypatch, inventory=inventory) as node:
        config = {"kind": "CpuConfig", "hideHyperthreads": True}
        one = claim("a", result("cpu", "numa0", share="a", cpus=4), config=config)
        await give(node, replace(one, reserved_for=("uid-a",)))
        assert await run(node, "a") == "1-2" and held(node, "a") == "1-2,9-10"
        await node.run("plain", "main")
        assert where(node, "plain") == "3-8,11-15"
        node.tree.put(f"{node.tree.mount}/{node.path('a', 'main')}/cpuset.cpus", "1-2,9-10")
        await node.until(lambda: where(node, "a") == "1-2")
        for limit, noted in (("200000 100000", None), ("150000 100000", 1.5)):
            node.tree.set(node.path("a", "main"), "cpu.max", limit)
            await node.pins.reconciler.look_at_quotas()
            (shown,) = node.pins.document()["pinned"]
            assert (shown["granted_cpus"], shown["hidden_cpus"], shown["quota_cpus"]) == ("1-2,9-10", "9-10", noted)
