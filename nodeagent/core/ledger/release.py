"""When a device-plugin grant that kubelet does not list may be released. Pure; all rules are in this file.

The device-plugin API has no call for returning devices, so a release has to be inferred. Absence from kubelet's list is
not enough: a kubelet that has just started lists nothing until it reaches its API server, while its containers keep
running. Release needs proof. For a grant that is not listed, the first rule that applies decides:

    a process of its pod runs                                        held, disputed, whatever lists say
    it was never listed, the checkpoint has it, kubelet has not
      cleared its pod away (see below), and kubelet lists another
      grant of its pod, or cgroup and runtime are silent             held
    this kubelet listed it before, and
      the pod's cgroup is removed                                    released at once
      nothing of the pod runs                                        released after confirmed_s
      cgroup and runtime are silent                                  released after unobserved_s
    kubelet has cleared the pod away: its folder or cgroup was there
      and is not, or nothing of it runs and the checkpoint lacks
      its devices; or it was listed in this boot, kubelet has the
      API server's pods, and the pod has neither folder nor cgroup   released after confirmed_s; unconfirmed_s
                                                                     if it was never listed; unobserved_s
                                                                     if its pod is unknown and it is older
                                                                     than this kubelet
    its pod has no folder on the node, which kubelet makes as soon
      as it has admitted a pod, and nothing of it runs               released after unobserved_s
    kubelet is known to have received the API server's pods          released after unobserved_s
    otherwise                                                        held

A container that runs to completion before others start (an init container) is never listed, but is in the checkpoint.

Sources: pkg/kubelet/cm/devicemanager (the checkpoint keeps a pod's devices until an admission after "sources ready"),
pkg/kubelet/kubelet_pods.go HandlePodCleanups (folders and cgroups are removed only then), k8s.io/kubernetes 1.34-1.37.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.witness import Sight, Witnesses
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant

NEVER = float("inf")
_NO_TIMES: Mapping[str, float] = MappingProxyType({})


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long a grant may be missing from kubelet's list before it is released, in seconds."""

    unconfirmed_s: float = 60.0
    """It was never listed: its pod may still be in admission."""
    confirmed_s: float = 5.0
    """It was listed before, and there is proof that its pod has ended."""
    unobserved_s: float = 600.0
    """Neither the runtime nor a cgroup can confirm that its pod ended."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What earlier lists and observations of pods have shown.

    A new process starts with an empty memory. Whatever it has not seen itself can only delay a release.
    """

    kubelet: Hashable = None
    listed: frozenset[str] = frozenset()
    """Ids of the grants that this kubelet has listed."""
    knows_since: float | None = None
    """Since when this kubelet is known to have received the API server's pods."""
    missing: Mapping[str, float] = msgspec.field(default_factory=lambda: _NO_TIMES)
    """Since when each unlisted grant has been missing, by grant id."""
    inherited: frozenset[str] = frozenset()
    """Ids of the grants that existed before this kubelet was first seen: a previous kubelet may have requested them."""
    had_cgroup: frozenset[str] = frozenset()
    had_folder: frozenset[str] = frozenset()
    """UIDs of the pods whose cgroup, or whose folder, has been seen."""


class Absences(msgspec.Struct, frozen=True, kw_only=True):
    """Conclusions from one list."""

    memory: Memory
    released: tuple[Grant, ...] = ()
    why: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why each of them is released, by grant id."""
    held: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why each grant that is missing from kubelet's list is not released yet, by grant id."""
    disputed: frozenset[str] = frozenset()
    """Ids of those grants that this kubelet has stopped listing although their pods are alive."""
    due_s: float | None = None
    """Seconds until the next release if nothing changes, or None if none is due."""


def judge(
    ledger: Ledger,
    listed: Container[str],
    young: Container[str],
    memory: Memory,
    witnesses: Witnesses,
    now: float,
    patience: Patience,
) -> Absences:
    """Decide which of the device plugin's grants to release.

    listed: ids of the grants that kubelet lists. young: ids of grants that are newer than the list; they are left
    alone. memory: Absences.memory of the previous list. now: when kubelet was asked, in seconds of any steady clock.
    """
    mine = [one for one in ledger.grants.values() if one.holder.api == DEVICE_PLUGIN]
    memory = _remember(memory, mine, listed, young, witnesses, now)
    away = [one for one in mine if one.id not in listed and one.id not in young]
    present = {uid for one in mine if one.id in listed for uid in _pods(one, witnesses)}
    away = [one for one in away if not _is_unlisted_part(one, present, memory, witnesses)]
    memory = replace(memory, missing={one.id: memory.missing.get(one.id, now) for one in away})
    verdicts = {one.id: _verdict(one, memory, witnesses, now, patience) for one in away}
    held = {one.id: verdicts[one.id] for one in away if verdicts[one.id].due_s > 0}
    released = tuple(one for one in away if one.id not in held)
    return Absences(
        memory=memory,
        released=released,
        why=MappingProxyType({one.id: verdicts[one.id].why for one in released}),
        held=MappingProxyType({one: verdict.why for one, verdict in held.items()}),
        disputed=frozenset(one for one, verdict in held.items() if verdict.disputed),
        due_s=min((verdict.due_s for verdict in held.values() if verdict.due_s < NEVER), default=None),
    )


def lives(grant: Grant, witnesses: Witnesses) -> str:
    """Return the evidence that a process of a grant's pods is running, as a clause, or "" if there is none."""
    found = witnesses.sighting(_pods(grant, witnesses))
    return found.evidence if found.sight is Sight.LIVES else ""


# ---------------------------------------------------------------- one grant


class _Verdict(msgspec.Struct, frozen=True):
    """The verdict on one grant. `due_s` is the number of seconds until its release; 0 or less means now."""

    due_s: float
    why: str = ""
    disputed: bool = False


def _verdict(grant: Grant, memory: Memory, witnesses: Witnesses, now: float, patience: Patience) -> _Verdict:
    dropped = grant.id in memory.listed
    if evidence := lives(grant, witnesses):
        return _Verdict(NEVER, f"{_UNLISTED[dropped]}, and {evidence}", disputed=dropped)
    absent_s = now - memory.missing[grant.id]
    if dropped:
        limit_s, why = _after_drop(witnesses.sighting(_pods(grant, witnesses)).sight, patience)
        return _Verdict(limit_s - absent_s, f"{_UNLISTED[dropped]}; {why}")
    if cleared := _cleared_away(grant, memory, witnesses):
        limit_s = patience.confirmed_s if grant.confirmed else patience.unconfirmed_s
        if not _pods(grant, witnesses) and grant.id in memory.inherited:
            limit_s = patience.unobserved_s
        return _Verdict(limit_s - absent_s, f"{_UNLISTED[dropped]}; {cleared}")
    if _has_no_folder(grant, witnesses):
        return _Verdict(patience.unobserved_s - absent_s, f"{_UNLISTED[dropped]}; its pod has no folder on the node")
    if memory.knows_since is not None:
        known_s = min(absent_s, now - memory.knows_since)
        return _Verdict(patience.unobserved_s - known_s, f"{_UNLISTED[dropped]}; nothing shows that its pod ended")
    return _Verdict(NEVER, "kubelet has listed no pod of the API server since it started")


_UNLISTED = {True: "kubelet no longer lists it", False: "kubelet does not list it"}


def _is_unlisted_part(grant: Grant, present: Container[str], memory: Memory, witnesses: Witnesses) -> bool:
    """Return whether a grant is of a container that kubelet has but never lists: an init container of an existing pod.

    present: UIDs of the pods of listed grants.
    """
    if grant.confirmed or not _in_checkpoint(grant, witnesses) or _cleared_away(grant, memory, witnesses):
        return False
    pods = _pods(grant, witnesses)
    return any(one in present for one in pods) or witnesses.sighting(pods).sight in (Sight.LIVES, Sight.UNSEEN)


def _after_drop(sight: Sight, patience: Patience) -> tuple[float, str]:
    """Return how long to wait for a grant that this kubelet used to list and no longer does, and the reason."""
    match sight:
        case Sight.ABSENT:
            return 0.0, "its pod's cgroup is removed"
        case Sight.EMPTY | Sight.STOPPED:
            return patience.confirmed_s, "nothing of its pod runs"
        case _:
            return patience.unobserved_s, "neither its cgroup nor the runtime could be asked"


def _cleared_away(grant: Grant, memory: Memory, witnesses: Witnesses) -> str:
    """Return the evidence that kubelet is done with a grant's pod or never admitted it, or "" if there is none."""
    pods = _pods(grant, witnesses)
    if pods and witnesses.folders is not None and all(_gone(one, memory.had_folder, witnesses.folders) for one in pods):
        return "kubelet has removed its pod's folder"
    if pods and all(one in memory.had_cgroup and _sight(one, witnesses) is Sight.ABSENT for one in pods):
        return "its pod's cgroup is removed"
    knows = memory.knows_since is not None and _was_listed_in_this_boot(grant, witnesses)
    if pods and knows and _has_no_trace(pods, witnesses):
        return "its pod has neither a cgroup nor a folder"
    # A lost checkpoint also lacks the devices of pods that are running: another witness has to confirm that none is. A
    # grant that was never listed and whose pod is not known by UID was never recorded by kubelet at all.
    asked = witnesses.sighting(pods).sight is not Sight.UNSEEN if pods else not grant.confirmed
    if asked and witnesses.given is not None and not _in_checkpoint(grant, witnesses):
        return "kubelet's checkpoint lacks its devices"
    return ""


def _was_listed_in_this_boot(grant: Grant, witnesses: Witnesses) -> bool:
    return grant.confirmed and bool(witnesses.boot_id) and grant.boot_id == witnesses.boot_id


def _has_no_trace(pods: tuple[str, ...], witnesses: Witnesses) -> bool:
    """Return whether all pods have neither a cgroup nor a folder.

    A missing cgroup alone is no proof: kubelet lists a pod as soon as it has admitted it.
    """
    absent = all(_sight(one, witnesses) is Sight.ABSENT for one in pods)
    return absent and witnesses.folders is not None and witnesses.folders.isdisjoint(pods)


def _has_no_folder(grant: Grant, witnesses: Witnesses) -> bool:
    """Return whether kubelet has no folder for a grant's pods, and the cgroup or runtime agrees that none of them runs.

    Missing folders alone are no proof: they are elsewhere if kubelet has another --root-dir.
    """
    pods = _pods(grant, witnesses)
    if not pods or witnesses.folders is None or witnesses.sighting(pods).sight is Sight.UNSEEN:
        return False
    return witnesses.folders.isdisjoint(pods)


def _gone(uid: str, before: Container[str], now: Container[str]) -> bool:
    return uid in before and uid not in now


def _sight(uid: str, witnesses: Witnesses) -> Sight:
    return witnesses.sighting((uid,)).sight


def _in_checkpoint(grant: Grant, witnesses: Witnesses) -> bool:
    mine = {(grant.holder.resource, one) for one in grant.ids}
    return any(not mine.isdisjoint(ids) for ids in (witnesses.given or {}).values())


def _pods(grant: Grant, witnesses: Witnesses) -> tuple[str, ...]:
    return witnesses.pods_of.get(grant.id) or grant.pods


# ---------------------------------------------------------------- memory


def _remember(
    memory: Memory,
    grants: Iterable[Grant],
    listed: Container[str],
    young: Container[str],
    witnesses: Witnesses,
    now: float,
) -> Memory:
    """Return the memory after one more round. A new kubelet has listed nothing yet. A list that is older than a grant
    has at most an earlier holder of the same ids, and does not count as having listed it."""
    every = list(grants)
    ids = frozenset(one.id for one in every)
    if witnesses.kubelet != memory.kubelet:
        inherited = frozenset(one for one in ids if one not in young)
        memory = Memory(
            kubelet=witnesses.kubelet,
            inherited=inherited,
            had_cgroup=memory.had_cgroup,
            had_folder=memory.had_folder,
        )
    uids = {uid for one in every for uid in _pods(one, witnesses)}
    seen = {one.id for one in every if one.id in listed and one.id not in young}
    knows_since = now if memory.knows_since is None and witnesses.knows_pods else memory.knows_since
    shown = {uid for uid in uids if _sight(uid, witnesses) in (Sight.LIVES, Sight.EMPTY)}
    return replace(
        memory,
        listed=memory.listed & ids | seen,
        inherited=memory.inherited & ids,
        knows_since=knows_since,
        had_cgroup=memory.had_cgroup & uids | shown,
        had_folder=memory.had_folder & uids | (uids & (witnesses.folders or frozenset())),
    )
