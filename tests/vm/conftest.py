"""One guest for all tests of pinning: booting and installing takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm import vmruntime
from tests.vm.vmguest import Guest
from tests.vm.vmnode import CONFIG, started
from tests.vm.vmpods import until_connected

LIFE_S = 2400.0
PAGES = [{"pageSize": "2Mi", "node": 1, "pages": 16}, {"pageSize": "1Gi", "node": 2, "pages": 1}]
"""Provided by the agent."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The guest of all tests of pods lives to the end, and there is one guest at a time: others come first."""
    items.sort(key=lambda item: "pods_guest" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def pods_guest() -> Iterator[Guest]:
    """A node with a runtime that asks the agent, quick to notice that a pod is gone."""
    reason = vmruntime.missing()
    if reason is not None:
        pytest.skip(reason)
    resources = [*CONFIG["resources"], {"name": "hugepages-1Gi", "kind": "hugepages", "pageSize": "1Gi"}]
    with started(
        life_s=LIFE_S,
        release={"pollSeconds": 1, "unconfirmedSeconds": 3, "confirmedSeconds": 1},
        pinning={"memory": "local", "intrudersSeconds": 3600},
        hugepages=PAGES,
        resources=resources,
    ) as booted:
        vmruntime.CHOSEN.prepare(booted)
        until_connected(booted)
        yield booted
