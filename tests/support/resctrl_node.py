"""A machine whose caches are divided: rounds over a made-up resctrl, by an agent that can be begun again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.config.isolation import ResctrlConfig
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.opaque.settings import OpaqueConfig, to_json
from nodeagent.host.resctrl import write
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.resctrl.rounds import ResctrlReport, ResctrlRounds
from tests.doubles.resctrl import FakeResctrl

TWO = {0: range(4), 1: range(4, 8)}
"""The CPUs of two L3 caches."""


def grant(uid: str, cpus: str, index: int = 0, **settings: Any) -> Grant:
    """What a claim holds, with settings of OpaqueConfig."""
    holder = Holder(api=CLAIM, namespace="default", claim=uid, uid=uid)
    return Grant(
        id=f"{uid}-{index}", holder=holder, cpus=CpuSet.parse(cpus), settings=to_json(OpaqueConfig(**settings))
    )


def configured(**config: Any) -> ResctrlConfig:
    return msgspec.convert(config, ResctrlConfig)


class ResctrlNode:
    """Rounds with an agent's record in state/resctrl.json."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, **machine: Any) -> None:
        self.kernel = FakeResctrl(root, **{"domains": TWO, **machine})
        for name in ("put", "mkdir", "rmdir"):
            monkeypatch.setattr(write, name, getattr(self.kernel, name))
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/cgroup.controllers").write_text("cpuset\n")
        self.root, self.memory = root, root / "state/resctrl.json"
        self.grants: dict[str, Grant] = {}
        self.config: ResctrlConfig | None = configured(exclusiveWays=4)
        self.containers: dict[str, str] = {}
        self.ended = True
        self.before = self.kernel.state()
        self.begin()

    def begin(self) -> None:
        """Another agent on the same folders."""
        self.rounds = ResctrlRounds(SysFs(self.root), self.memory)

    def hold(self, *grants: Grant) -> None:
        self.grants |= {one.id: one for one in grants}

    def release(self, uid: str) -> None:
        self.grants = {id: one for id, one in self.grants.items() if one.holder.uid != uid}

    def round(self, **config: Any) -> ResctrlReport:
        if config:
            self.config = configured(**config)
        return self.rounds.keep(self.config, list(self.grants.values()), self.containers, ended=self.ended)

    def masks(self, group: str = "") -> dict[int, int]:
        return self.kernel.schemata(group)["L3"]

    def own(self) -> set[str]:
        """The groups of the agent that there are."""
        return {name for name in self.kernel.groups if name.startswith("nodeagent-")}
