"""The grants that the status socket shows, read back: what is decided with them is what the agent decides."""

from __future__ import annotations

import json
from types import MappingProxyType

from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.admin.status import grant_document
from nodeagent.cli.shared.held import grants_of
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import Result
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.core.model.request import Pages
from tests.builders.inventories import GIB, even_rows, inventory_of

MIB2 = 2 << 20
NAMES = st.sampled_from(["", "a", "b", "c"])
IDS = st.lists(st.sampled_from(["gpu0", "gpu1", "/dev/x"]), unique=True).map(tuple)
PAGES = st.lists(st.tuples(st.integers(0, 8), st.sampled_from([MIB2, GIB]), st.integers(0, 99)))
RESULTS = st.builds(
    Result,
    request=NAMES,
    driver=st.just("nodeagent.dev"),
    pool=NAMES,
    device=NAMES,
    share_id=NAMES,
    admin=st.booleans(),
    consumed=st.dictionaries(NAMES, st.integers(0, 1 << 50)),
)


@st.composite
def grants(draw: st.DrawFn) -> Grant:
    """Any grant, as far as the page shows it."""
    shares, claim = draw(IDS), draw(st.booleans())
    named = {name: draw(NAMES) for name in ("namespace", "pod", "container", "claim", "uid")}
    sizes = st.tuples(st.sampled_from(["memory", "cores"]), st.integers(0, 1 << 50))
    pages = [Pages(node=node, page_bytes=size, pages=count) for node, size, count in draw(PAGES)]
    return Grant(
        id="g",
        holder=Holder(api=CLAIM if claim else DEVICE_PLUGIN, resource="gpu.nodeagent.dev", **named),
        ids=draw(IDS),
        cpus=CpuSet(draw(st.sets(st.integers(0, 200)))),
        hugepages=tuple(pages),
        memory=tuple(draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1 << 50))))),
        devices=tuple(one for one in draw(IDS) if one not in shares),
        shares=shares,
        amounts=tuple(sorted((one, *draw(sizes)) for one in shares)),
        things=tuple((one, draw(NAMES)) for one in shares),
        granted_at=draw(st.floats(0, 2e9)),
        confirmed=draw(st.booleans()),
        result=draw(RESULTS) if claim else None,
        settings=draw(NAMES),
        pods=draw(IDS),
    )


@settings(deadline=None)
@given(grants())
def test_a_grant_that_is_shown_is_read_back_as_it_was(grant: Grant) -> None:
    assert grants_of(json.dumps([grant_document(grant)]).encode()) == (grant,)


def test_the_amounts_of_shares_are_read_back() -> None:
    """A claim has three quarters of a GPU's memory as one of its four shares: one more share is free, not three."""
    gpu = Device(kind="gpu", id="gpu0", paths=("/dev/nvidia0",), attributes={"memory_bytes": 16 * GIB})
    machine = inventory_of(even_rows(1, 1, 1, 2, 1), devices=[gpu])
    shares = DeviceResource(name="nodeagent.dev/gpu", kind="gpu", replicas=4)
    claim = Grant(
        id="c",
        holder=Holder(api=CLAIM, resource="gpu.nodeagent.dev", claim="c", uid="u"),
        shares=("gpu0",),
        amounts=(("gpu0", "cores", 25), ("gpu0", "memory", 12 * GIB)),
        result=Result(request="r", driver="nodeagent.dev", pool="n/gpu", device="gpu0", consumed={"shares": 1}),
    )
    (read,) = grants_of(json.dumps([grant_document(claim)]).encode())
    for one in (claim, read):
        shown = shares.advertised(machine, Ledger(grants=MappingProxyType({one.id: one})), NO_HEALTH)
        assert [ad.healthy for ad in shown] == [True, False, False, False]
