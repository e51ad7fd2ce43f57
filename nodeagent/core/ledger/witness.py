"""What kubelet, the kernel and the container runtime say about pods at one moment. Values; release.py decides.

Each witness may be silent, and silence is not an answer: None stands for "could not be asked", an empty value for
"asked, and there is nothing".
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant

Given = Mapping[tuple[str, str], frozenset[tuple[str, str]]]
"""Kubelet's device checkpoint: by (pod UID, container name), the (resource, id) that the container was given."""
NO_NAMES: Mapping[str, str] = MappingProxyType({})


class Sight(enum.StrEnum):
    """What the kernel or the runtime shows of one pod."""

    LIVES = "lives"
    """Processes of it run: a container or its sandbox."""
    EMPTY = "empty"
    """Its cgroup is there without any process: kubelet has not cleared the pod away."""
    STOPPED = "stopped"
    """The runtime runs no container of it; its cgroup cannot be read."""
    ABSENT = "absent"
    """Its cgroup does not exist: kubelet has not made it yet, or has removed it after the pod's end."""
    UNSEEN = "unseen"
    """Nobody could be asked."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A sight and what it rests on."""

    sight: Sight
    evidence: str = ""
    """For LIVES, a clause for status and log: "processes run in /sys/fs/cgroup/…"."""


NOT_SEEN = Sighting(Sight.UNSEEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnesses:
    """Everything that was asked in addition to kubelet's list of devices, in one round.

    Ask kubelet for its list first and for these afterwards: what lived a moment before the list must not be called
    gone by a sight that is older than the list.
    """

    kubelet: Hashable = None
    """Identity of the kubelet that gave the list; another value is another process."""
    knows_pods: bool = False
    """Whether the list shows that the API server's pods have reached kubelet, which calls that "sources ready": a pod
    that is not a static one is in it."""
    boot_id: str = ""
    """Of the host; "": not known."""
    given: Given | None = None
    """None: there is no checkpoint, or it cannot be read."""
    folders: frozenset[str] | None = None
    """UIDs of the pods that kubelet keeps a folder for; None: they cannot be listed."""
    sights: Mapping[str, Sighting] = field(default_factory=lambda: MappingProxyType({}))
    """By pod UID; a pod that is not in it is UNSEEN."""
    pods_of: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """By grant id: UIDs of the pods that hold it, for each grant where any is known."""

    def sighting(self, uids: tuple[str, ...]) -> Sighting:
        """The strongest sight of some pods: one that lives, else one that no witness can speak for, and so on down
        to ABSENT."""
        found = [self.sights.get(uid, NOT_SEEN) for uid in uids] or [NOT_SEEN]
        return min(found, key=lambda one: _STRENGTH[one.sight])


NO_WITNESSES = Witnesses()
"""Nobody was asked."""
_STRENGTH = {Sight.LIVES: 0, Sight.UNSEEN: 1, Sight.STOPPED: 2, Sight.EMPTY: 3, Sight.ABSENT: 4}


def pods_by_checkpoint(grants: Iterable[Grant], given: Given | None) -> dict[str, tuple[str, ...]]:
    """UIDs of the pods that hold each of the device plugin's grants, by grant id: by kubelet's checkpoint, or as
    recorded where that does not have any of its ids.

    More than one where the checkpoint still has an ended pod: kubelet clears those away when it next admits one."""
    of_part: dict[tuple[str, str], set[str]] = {}
    for (uid, _), parts in (given or {}).items():
        for one in parts:
            of_part.setdefault(one, set()).add(uid)
    return {one.id: _pods(one, of_part) for one in grants}


def _pods(grant: Grant, of_part: Mapping[tuple[str, str], set[str]]) -> tuple[str, ...]:
    if grant.holder.api != DEVICE_PLUGIN:
        return grant.pod_uids
    found = {uid for one in grant.ids for uid in of_part.get((grant.holder.resource, one), ())}
    return tuple(sorted(found)) or grant.pods
