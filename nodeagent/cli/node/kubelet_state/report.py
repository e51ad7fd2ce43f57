"""The report of `nodeagent import kubelet-state`: what is taken over, what is not and why, and the next steps."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.output import forms
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.kubelet.assigned import Assigned, Said, assigned
from nodeagent.core.kubelet.imports import ImportPlan
from nodeagent.core.ledger.free import MEMORY
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.quantity import format_size
from nodeagent.kube.kubelet_files import cpu_state as kubelet_state
from nodeagent.kube.kubelet_files import memory_state
from nodeagent.kube.kubelet_files.config import DEFAULT_PLACE
from nodeagent.kube.kubelet_files.cpu_state import KubeletState
from nodeagent.kube.kubelet_files.memory_state import MemoryState

NEW, TAKEN, KNOWN, RELEASED, ENDED, REFUSED = "new", "taken", "held", "released", "ended", "refused"
"""What happens to each: it would be taken over; it was; it had been before; kubelet has it differently now, so what was
taken over is released; its pod has ended, so it is left alone; it cannot be taken over."""


class Managers(msgspec.Struct, frozen=True, kw_only=True):
    """Kubelet's managers according to its configuration and files."""

    folder: Path
    cpus: KubeletState
    memory: MemoryState
    places: Mapping[str, str]
    """The file or flag that sets each key of kubelet's configuration."""

    @property
    def said(self) -> Said:
        """Return what both managers assigned, and whether each uses the static policy."""
        return Said(
            assigned=assigned(self.cpus.assigned, self.cpus.pods, self.memory.assigned, self.memory.pods),
            unnamed=tuple(Assigned(uid="", containers=(one,), cpus=cpus) for one, cpus in self.cpus.unnamed.items()),
            cpus=self.cpus.static,
            memory=self.memory.static,
        )


class Report(msgspec.Struct, frozen=True):
    """One run. applied: the plan is now in the ledger."""

    kubelet: Managers
    plan: ImportPlan
    applied: bool

    def show(self, args: argparse.Namespace) -> None:
        """Print the report in the form that was asked for."""
        document = {**self._policies(), "applied": self.applied, "entries": [*self._rows()], "next": self.next()}
        forms.write(args, document, lambda shown: self._print(shown["entries"], whole=args.no_trunc))

    def _print(self, rows: list[dict[str, Any]], *, whole: bool) -> None:
        print_table(
            ("STATE", "POD UID", "CONTAINER", "CPUS", "HUGEPAGES", "MEMORY", "WHY"),
            [
                (
                    row["state"],
                    row["pod_uid"],
                    row["container"],
                    row["cpus"],
                    " ".join(f"{one['pages']}x{one['size']}@{_nodes(one)}" for one in row["hugepages"]),
                    " ".join(f"{format_size(one['bytes'])}@{_nodes(one)}" for one in row["memory"]),
                    row["why"],
                )
                for row in rows
            ],
            whole=whole,
        )
        for step in self.next():
            print(f"next: {step}")

    def _policies(self) -> dict[str, str]:
        return {
            "kubelet_dir": str(self.kubelet.folder),
            "cpu_manager": self.kubelet.cpus.policy,
            "memory_manager": self.kubelet.memory.policy,
        }

    def _rows(self) -> Iterator[dict[str, Any]]:
        for grant in self.plan.taken:
            yield _of_grant(grant, TAKEN if self.applied else NEW)
        for grant in self.plan.known:
            yield _of_grant(grant, KNOWN)
        for grant in self.plan.released:
            yield _of_grant(grant, RELEASED, "kubelet has it otherwise now")
        for one in self.plan.ended:
            yield _of_state(one, ENDED, "its pod no longer has a folder: left alone")
        for one, why in self.plan.refused:
            yield _of_state(one, REFUSED, why)

    def next(self) -> list[str]:
        """Return the next steps, in order."""
        if self.plan.refused:
            return [
                "nothing is taken over while any of it is refused: drain these pods or make way for them, run it again"
            ]
        if self.plan.changes and not self.applied:
            return ["run it again with --apply"]
        on = [*self._managing()]
        if not on:
            return []
        settings = ", ".join(f"{key}: {policy} {self._where(key)}" for key, policy, _ in on)
        return [
            "stop kubelet",
            f"set {settings}",
            f"remove {', '.join(str(self.kubelet.folder / file) for _, _, file in on)}",
            "start kubelet: the agent serves these kinds then, and running pods keep what they have",
        ]

    def _where(self, key: str) -> str:
        place = self.kubelet.places.get(key, DEFAULT_PLACE)
        return f"in {place}" if place != DEFAULT_PLACE else "wherever it is set"

    def _managing(self) -> Iterator[tuple[str, str, str]]:
        """Yield (configuration key, required value, state file) for each manager that is active."""
        if self.kubelet.cpus.static:
            yield kubelet_state.POLICY, kubelet_state.NONE, kubelet_state.STATE_FILE
        if self.kubelet.memory.static:
            yield memory_state.POLICY, memory_state.NONE, memory_state.STATE_FILE


def _of_grant(grant: Grant, state: str, why: str = "") -> dict[str, Any]:
    pages = [
        {"size": format_size(one.page_bytes), "pages": one.pages, "numa_nodes": [one.node]} for one in grant.hugepages
    ]
    memory = [{"bytes": size, "numa_nodes": [node]} for node, size in grant.memory]
    row = _row(state, grant.holder.uid, grant.holder.container, str(grant.cpus), why)
    return {**row, "grant": grant.id, "hugepages": pages, "memory": memory}


def _of_state(one: Assigned, state: str, why: str) -> dict[str, Any]:
    pages = [
        {"size": format_size(it.page_bytes), "pages": it.size_bytes // it.page_bytes, "numa_nodes": list(it.nodes)}
        for it in one.blocks
        if it.page_bytes != MEMORY
    ]
    memory = [{"bytes": it.size_bytes, "numa_nodes": list(it.nodes)} for it in one.blocks if it.page_bytes == MEMORY]
    row = _row(state, one.uid, one.container, str(one.cpus), why)
    return {**row, "grant": "", "hugepages": pages, "memory": memory}


def _row(state: str, uid: str, container: str, cpus: str, why: str) -> dict[str, Any]:
    return {"state": state, "pod_uid": uid, "container": container, "cpus": cpus, "why": why}


def _nodes(one: dict[str, Any]) -> str:
    return "node" + ",".join(str(node) for node in one["numa_nodes"])
