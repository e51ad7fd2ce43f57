"""A refusal reads the same, whatever the order in which the grants that it names were made or read from disk."""

from __future__ import annotations

import itertools
from types import MappingProxyType

import pytest

from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.errors import Refused


def held(name: str, device: str) -> Grant:
    return Grant(id=name, holder=Holder(api=CLAIM, namespace="ns", claim=name), devices=(device,))


def test_the_holder_that_is_named_does_not_depend_on_the_order_of_the_ledger() -> None:
    every = [held("a", "x"), held("b", "y"), held("c", "z")]
    wanted = Grant(id="d", holder=Holder(api=CLAIM), devices=("y", "z"))
    said = set()
    for order in itertools.permutations(every):
        with pytest.raises(Refused) as refusal:
            grant(Ledger(grants=MappingProxyType({one.id: one for one in order})), wanted)
        said.add(str(refusal.value))
    assert said == {"cannot grant y: held by claim ns/b"}
