"""The pods' names of claims that were made from a template: kubelet does not pass them on, and the claim has them in an
annotation only. They are known from the claim when it is prepared, and afterwards from its own metadata file."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from nodeagent.errors import HostError
from nodeagent.host.cdi import ClaimFiles


class PodClaimNames:
    """The pod's name of each claim, by UID; "" for a claim that was not made from a template."""

    def __init__(self, files: ClaimFiles) -> None:
        self._files = files
        self._names: dict[str, str] = {}

    def learn(self, names: Mapping[str, str]) -> None:
        """Take the names of claims that were read from the API server."""
        self._names.update(names)

    def of(self, uid: str) -> str:
        """Return a claim's name in its pod, or "" if it has none or it is not known. Reads a file unless the claim was
        read: another agent may have prepared it and write its file only now."""
        return self._names[uid] if uid in self._names else self._recorded(uid)

    def forget(self, uid: str) -> None:
        self._names.pop(uid, None)

    def _recorded(self, uid: str) -> str:
        with contextlib.suppress(HostError):
            match self._files.read(uid):
                case {"claim": {"podClaimName": str(name)}}:
                    return name
        return ""
