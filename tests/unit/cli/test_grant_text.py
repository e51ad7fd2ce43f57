"""What tables show of grants."""

from __future__ import annotations

from typing import Any

import pytest

from nodeagent.admin.status import grant_document
from nodeagent.cli.node import release
from nodeagent.cli.shared import grant_text
from nodeagent.core.model import grant as model
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.request import Pages


def document(**holder: Any) -> dict[str, Any]:
    """A grant as /v1/grants has it."""
    return grant_document(
        Grant(
            id="g-1",
            holder=Holder(**{"api": model.DEVICE_PLUGIN, "resource": "n/cpu", **holder}),
            cpus=CpuSet([4, 5, 9]),
            hugepages=(Pages(node=2, page_bytes=1 << 30, pages=4),),
            memory=((3, 2 << 30),),
            devices=("0000:41:00.0",),
        )
    )


def test_the_words_for_apis_are_those_of_the_ledger() -> None:
    """They are repeated where importing the ledger's model would take longer than the rest of a command."""
    assert (grant_text.CLAIM, grant_text.KUBELET) == (model.CLAIM, model.KUBELET)
    assert release.OTHER_PLUGIN == model.OTHER_PLUGIN


@pytest.mark.parametrize(
    "holder",
    [
        {"namespace": "shop", "pod": "till", "container": "main"},
        {"api": model.CLAIM, "namespace": "shop", "claim": "db", "uid": "u-1"},
        {"api": model.KUBELET, "uid": "u-2", "container": "main"},
    ],
)
def test_a_holder_is_called_as_errors_call_it(holder: dict[str, str]) -> None:
    assert grant_text.holder(document(**holder)) == str(Holder(**{"api": model.DEVICE_PLUGIN, **holder}))


def test_a_container_that_kubelet_has_not_listed_is_called_so() -> None:
    assert grant_text.holder(document()) == "a container not yet listed"


def test_memory_and_nodes_of_a_grant() -> None:
    one = document()
    assert grant_text.memory(one) == "4x1Gi@node2 2Gi@node3"
    assert str(grant_text.nodes_of(one, {"cpu4": 0, "cpu9": 1, "0000:41:00.0": 5, "cpu63": 7})) == "0-3,5"
