"""What kubelet, the kernel and the container runtime report about pods at one moment. Values; release.py decides.

Any witness may be silent, and silence is not an answer: None means that it could not be asked, an empty value that it
was asked and has nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant

Given = Mapping[tuple[str, str], frozenset[tuple[str, str]]]
"""Kubelet's device checkpoint: the (resource, id) pairs given to each container, by (pod UID, container name)."""
NO_NAMES: Mapping[str, str] = MappingProxyType({})


class Sight(enum.StrEnum):
    """What the kernel or the runtime shows of one pod."""

    LIVES = "lives"
    """Processes of a container or of its sandbox are running."""
    EMPTY = "empty"
    """Its cgroup exists but has no process: kubelet has not cleared the pod away yet."""
    STOPPED = "stopped"
    """The runtime has no running container of it, and its cgroup cannot be read."""
    ABSENT = "absent"
    """Its cgroup does not exist: kubelet has not made it yet, or removed it after the pod ended."""
    UNSEEN = "unseen"
    """No witness could be asked."""


class Sighting(msgspec.Struct, frozen=True):
    """A sight and the evidence for it."""

    sight: Sight
    evidence: str = ""
    """For LIVES, a clause for status and log: "processes run in /sys/fs/cgroup/…"."""


NOT_SEEN = Sighting(Sight.UNSEEN)


class Witnesses(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was asked in one round in addition to kubelet's list of devices.

    Ask kubelet for its list first and the witnesses afterwards: a pod that was alive just before the list was taken
    must not be called gone on the basis of an older sight.
    """

    kubelet: Hashable = None
    """Identity of the kubelet that returned the list; a different value means a different process."""
    knows_pods: bool = False
    """Whether the list shows that kubelet has received the API server's pods ("sources ready" in kubelet): it contains
    a pod that is not a static pod."""
    boot_id: str = ""
    """Boot id of the host; "" if unknown."""
    given: Given | None = None
    """None if there is no checkpoint or it cannot be read."""
    folders: frozenset[str] | None = None
    """UIDs of the pods for which kubelet has a folder, or None if they cannot be listed."""
    sights: Mapping[str, Sighting] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By pod UID; a pod that is missing here is UNSEEN."""
    pods_of: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """UIDs of the pods that hold each grant, by grant id; only grants for which any pod is known."""

    def sighting(self, uids: tuple[str, ...]) -> Sighting:
        """Return the strongest sight of some pods: LIVES first, then UNSEEN, and so on down to ABSENT."""
        found = [self.sights.get(uid, NOT_SEEN) for uid in uids] or [NOT_SEEN]
        return min(found, key=lambda one: _STRENGTH[one.sight])


NO_WITNESSES = Witnesses()
"""No witness was asked."""
_STRENGTH = {Sight.LIVES: 0, Sight.UNSEEN: 1, Sight.STOPPED: 2, Sight.EMPTY: 3, Sight.ABSENT: 4}


def pods_by_checkpoint(grants: Iterable[Grant], given: Given | None) -> dict[str, tuple[str, ...]]:
    """Return the UIDs of the pods that hold each grant, by grant id.

    For the device plugin's grants these come from kubelet's checkpoint, or from the grant itself if the checkpoint has
    none of its ids. There is more than one if the checkpoint still has an ended pod: kubelet clears those when it next
    admits one.
    """
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
