"""Keeps the interfaces of claims' adapters in the network namespaces of their pods, and on the host otherwise.

A claim's life, in the order of kubelet's and the runtime's calls:

    NodePrepareResources   the claim is granted; its interface is on the host
    RunPodSandbox (NRI)    the pod's network exists, none of its containers does: the interface is moved and set up
    CreateContainer        looked at again: a pod that was started while the agent was away is completed here
    StopPodSandbox (NRI)   its containers have ended: the interface is given back
    NodeUnprepareResources what the runtime did not tell is given back, before the claim is released

What is recorded for claims that hold nothing, or for sandboxes that the runtime no longer has, is given back as soon as
that is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.core.dra.interfaces import interface_names, interface_of, rdma_of
from nodeagent.core.model.container import Pod
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.errors import HostError, InputError, NodeagentError, StateError
from nodeagent.host.netlink.namespaces import OWN, first_of
from nodeagent.host.netlink.rdma import Connect, connected
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.journal import recorded_claims, recorded_for_others
from nodeagent.managers.manager import Manager
from nodeagent.managers.network.interface_journal import InterfaceJournal, Moved
from nodeagent.managers.network.interface_mover import Asked, InterfaceMover, Sandbox, has_driver
from nodeagent.managers.network.rdma_mover import RdmaMover
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.telemetry.log import new_op
from nodeagent.telemetry.once import Once

LOCK = "interfaces.lock"
LOCK_S = 20.0
"""How long a call waits for another one to end; kubelet waits 45 s."""
LOOK_S = 30.0
"""How often what is recorded is compared with the ledger without any event."""
log = structlog.get_logger()


class InterfacesManager(Manager):
    """Moves interfaces for claims. `lead` is running where the runtime calls."""

    name = "interfaces"

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        state_dir: Path,
        is_called: Callable[[], bool],
        prepared_for: Callable[[str], Collection[str]],
        *,
        host: str = OWN,
        connect: Connect = connected,
    ) -> None:
        """Set up without changing anything. is_called: returns whether the runtime calls about pods. prepared_for:
        returns the UIDs of the pods for which kubelet has prepared a claim, by its UID; it blocks, and may raise
        InputError. host: path of the host's network namespace. connect: talks to the kernel about RDMA devices."""
        self._agent = agent
        journal = InterfaceJournal(state_dir, agent.settings.boot_id)
        self._mover = InterfaceMover(journal, has_driver(sysfs), RdmaMover(sysfs, connect), host)
        self._turns = Turns(state_dir / LOCK, "cannot move interfaces")
        self._is_called = is_called
        self._prepared_for = prepared_for
        self._pods: dict[str, Pod] = {}
        """The sandboxes that the runtime has and that may ask for something, by id."""
        self._knows_all = False
        """Whether the runtime has listed them."""
        self._listed = Revision()
        self._news = Revision(agent.revisions.ledger, self._listed)
        self._problems: Sequence[str] = ()
        self._failing = Once("interfaces-not-as-granted")

    async def close(self) -> None:
        await self._turns.close()

    def notes(self) -> list[str]:
        """Return which interfaces are not where they belong, and why."""
        return [f"interfaces: {why}" for why in self._problems]

    # ---------------------------------------------------------------- for claims

    async def bind(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Return, by UID, why the interfaces of some claims cannot be moved when their pods start."""
        errors = dict[str, str]()
        for uid, grants in claims.items():
            try:
                theirs = recorded_for_others(self._mover.records, uid, grants)
            except HostError as error:
                errors[uid] = str(error)
                continue
            if theirs:
                device, one = next(iter(theirs.items()))
                errors[uid] = f"the interface of {device} is not given back by {one.pod_name} yet"
            elif any(map(interface_of, grants)) and not self._is_called():
                errors[uid] = "its interface cannot be moved: the container runtime does not call the agent (NRI)"
        return errors

    def concerned(self, uids: Sequence[str]) -> list[str]:
        """Return those of some claims for which something is recorded. Raise HostError if that cannot be told for the
        moment."""
        return recorded_claims(self._mover.records(certain=True), uids)

    async def give_back(self, uids: Sequence[str]) -> dict[str, str]:
        """Give back the interfaces of some claims, which are about to be released. Return, by UID, why one is not on
        the host."""
        claims = {*uids}
        try:
            return await self._given_back(lambda one: one.claim in claims)
        except (HostError, StateError) as error:
            return {uid: str(error) for uid in uids}

    # ---------------------------------------------------------------- for pods

    async def started(self, pod: Pod) -> None:
        """Have in a pod what its claims want there. Raise HostError naming what cannot be had."""
        await self._agent.refresh()  # another agent may have granted it
        await self._hear_kubelet(pod)
        if not self._asked(pod):
            return
        self._pods[pod.id] = pod  # first, or what it gets would be taken for what is left of an earlier pod
        try:
            await run_to_end(self._have(pod))
        except BaseException:  # also if it took too long: of a sandbox that does not start the runtime tells no end
            self._pods.pop(pod.id, None)
            self._listed.bump()
            raise

    async def _hear_kubelet(self, pod: Pod) -> None:
        """Record which claims a pod uses that others use too: kubelet has a claim prepared for the first of them only,
        and writes down the others before it starts them."""
        for uid, pods in {one.holder.uid: one.pods for one in self._asking() if pod.uid not in one.pods}.items():
            with contextlib.suppress(InputError):
                if pod.uid in await asyncio.to_thread(self._prepared_for, uid):
                    await self._agent.record_reserved_for(uid, (*pods, pod.uid), new_op())

    async def creating(self, pod: Pod) -> None:
        """Look again before a container of a pod is created. Raise HostError naming what it has not."""
        if self._asked(pod):
            self._pods[pod.id] = pod  # the claim may have become the pod's since its sandbox started
            await run_to_end(self._have(pod))

    async def stopped(self, pod: Pod) -> None:
        """Give back what a pod has: its containers have ended."""
        self._pods.pop(pod.id, None)
        try:
            errors = await self._given_back(lambda one: one.sandbox == pod.id)
        except (HostError, StateError) as error:
            errors = {"": str(error)}
        if errors:  # `settle` tries again
            log.warning("interface-not-given-back", pod=str(pod), error="; ".join(errors.values()))

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take all sandboxes that the runtime has."""
        self._pods = {one.id: one for one in pods}
        self._knows_all = True
        self._listed.bump()

    def _asked(self, pod: Pod) -> list[Asked]:
        """Return the interfaces that the claims of a pod want in it, in order of their grants."""
        grants = [one for one in self._asking() if pod.uid in one.pods]
        records = self._mover.records() if grants else {}
        return [asked for one in sorted(grants, key=lambda one: one.id) if (asked := self._asked_by(one, records))]

    def _asking(self) -> list[Grant]:
        """Return all grants that want an interface in their pods."""
        return [one for one in self._agent.ledger.grants.values() if interface_of(one) is not None]

    def _asked_by(self, grant: Grant, records: Mapping[str, Moved]) -> Asked | None:
        wanted = interface_of(grant)
        if wanted is None:
            return None
        record = records.get(grant.devices[0])
        device = self._agent.inventory.device_by_id.get(grant.devices[0])
        seen = interface_names(device) if device is not None else []
        name = record.before.name if record is not None else next(iter(seen), "")
        return Asked(
            device=grant.devices[0],
            claim=grant.holder.uid,
            host_name=name,
            wanted=wanted,
            rdma=rdma_of(grant, device) if device is not None else (),
            nodes=device.paths if device is not None else (),
        )

    async def _have(self, pod: Pod) -> None:
        try:
            async with self._turns.alone(LOCK_S):
                await self._agent.refresh()
                for asked in self._asked(pod):
                    await self._turns.in_thread(self._hand_over, asked, pod)
        finally:
            if pod.id not in self._pods:  # it has ended meanwhile
                self._listed.bump()

    def _hand_over(self, asked: Asked, pod: Pod) -> None:
        if pod.on_host_network:
            what = f"cannot move interface {asked.host_name or asked.device} into pod {pod}"
            raise HostError(f"{what}: it uses the host's network (hostNetwork)")
        sandbox = Sandbox(id=pod.id, pod=pod.uid, pod_name=str(pod), namespaces=_namespaces(pod))
        self._mover.hand_over(asked, sandbox)

    # ---------------------------------------------------------------- giving back

    async def _given_back(self, which: Callable[[Moved], bool]) -> dict[str, str]:
        """Give back what `which` chooses of what is recorded, once no other call changes anything. Return, by the UID
        of its claim, why something is not on the host. Raise StateError if another call does not end, HostError if it
        cannot be told for the moment what is recorded."""
        if not any(map(which, self._mover.records(certain=True).values())):
            return {}
        return await run_to_end(self._give_back(which))

    async def _give_back(self, which: Callable[[Moved], bool]) -> dict[str, str]:
        async with self._turns.alone(LOCK_S):
            chosen = {one.device: one for one in self._mover.records(certain=True).values() if which(one)}
            failed = await self._turns.in_thread(self._mover.give_back, chosen)
            return {chosen[device].claim: why for device, why in failed.items()}

    # ---------------------------------------------------------------- between calls

    async def lead(self) -> None:
        """Compare what is recorded with the ledger and the runtime's pods: at the start, after each change, and
        periodically."""
        await after_each(self._news, self.settle, every_s=LOOK_S)

    async def settle(self) -> None:
        """Give back what no claim holds or whose pod has ended, and complete what a pod should have."""
        problems = list[str]()
        try:
            if not self._agent.loss:
                await self._agent.refresh()
                problems += (await self._given_back(self._is_left)).values()
            for pod in [*self._pods.values()] if self._asking() else ():
                if why := await self._completed(pod):
                    problems.append(why)
        except (HostError, StateError) as error:
            problems.append(str(error))
        self._problems = problems
        self._failing.report("; ".join(problems))

    def _is_left(self, record: Moved) -> bool:
        """Return whether no claim holds an interface in a pod, or its pod has ended."""
        held = any(
            record.device in one.devices and one.holder.api == CLAIM and one.holder.uid == record.claim
            for one in self._agent.newest.grants.values()
        )
        return not held or (self._knows_all and record.sandbox not in self._pods)

    async def _completed(self, pod: Pod) -> str:
        """Complete a pod that was started while the agent was away. Return why that is not possible."""
        if pod.on_host_network or not (asked := self._asked(pod)):
            return ""
        records = self._mover.records()
        if all(one.device in records and records[one.device].sandbox == pod.id for one in asked):
            return ""
        if not await self._turns.in_thread(_exists, pod):
            return ""  # it has ended
        try:
            await run_to_end(self._have(pod))
        except NodeagentError as error:
            return str(error)
        return ""


def _namespaces(pod: Pod) -> tuple[str, ...]:
    """Return the paths of a pod's network namespace: as the runtime names it, and the same as an agent in a container
    sees it. That of a process only if there is no other: once it has ended, its PID may be anybody's."""
    if pod.network:
        return pod.network, f"/proc/1/root{pod.network}"
    return (f"/proc/{pod.pid}/ns/net",) if pod.pid else ()


def _exists(pod: Pod) -> bool:
    """Return whether a pod's network namespace exists. Blocks."""
    try:
        first_of(_namespaces(pod)).close()
    except HostError:
        return False
    return True
