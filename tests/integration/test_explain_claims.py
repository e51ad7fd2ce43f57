"""`nodeagent explain claim` against a running agent: what was granted, and what was refused and why."""

from __future__ import annotations

from pathlib import Path

from tests.integration.test_explain import nodeagent
from tests.integration.test_forecast import tree
from tests.support.dra_node import CPU, CPUS, consumed, dra_node


async def test_a_refused_claim_names_the_pod_in_the_way(folder: Path, tmp_path: Path) -> None:
    """The refusal comes from the audit with its time; who stands in the way is asked of the ledger as it is now."""
    async with dra_node(folder, tree(tmp_path), [CPUS]) as node:
        await node.published("cpu")
        await node.kubelet.wait_allocatable(CPU, 8)
        for pod, cpus in (("wide", 4), ("narrow", 2)):
            await node.kubelet.admit_pod("ns", pod, {"main": {CPU: cpus}})
            await node.agent.until("/v1/grants", lambda found, pod=pod: any(one["pod"] == pod for one in found))
        held = {one["pod"]: one["cpus"] for one in await node.grants()}
        where = "numa0" if held["narrow"] in ("0-1", "1-2", "2-3") else "numa1"
        (refused,) = await node.prepare(node.claim("c", consumed("cpu", where, cpus="3")))
        assert "2 of 8 are free" in refused.error or "held there by ns/narrow/main" in refused.error

        async def explained(*words: str) -> str:
            said = await nodeagent(node.agent, "explain", *words)
            assert (said.code, said.err) == (0, ""), said
            return said.out

        out = await explained("claim", "default/c")
        assert "claim default/c: holds nothing" in out and "refused at 20" in out
        assert "now: the end of ns/narrow would admit it" in out
        await node.kubelet.delete_pod("ns", "narrow")
        await node.agent.until("/v1/grants", lambda found: all(one["pod"] != "narrow" for one in found))
        assert "now: nothing stands in the way, it would fit" in await explained("claim", "c")
        (granted,) = await node.prepare(node.claim("d", consumed("cpu", where, cpus="3")))
        assert not granted.error
        out = await explained("claim", "default/d")
        assert f"the scheduler allocated node-a/cpu/{where} (cpus=3)" in out
        assert "it lies as close together as on the empty machine" in out
