"""What admins see of the health of devices is what kubelet and the scheduler get: one cause, wherever it comes from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from nodeagent.core.deviceplugin.causes import DEVICE_NODE, MEMBERS, WHOLE, known_health
from nodeagent.core.deviceplugin.devices import DeviceResource, illness
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, NO_HEALTH, UNHEALTHY, UNKNOWN, Evidence, observe
from nodeagent.core.model.inventory import Inventory

GPUS = DeviceResource(name="nodeagent.dev/gpu", kind="gpu")


@some.composite
def machines(draw: some.DrawFn) -> Inventory:
    """GPUs and adapters, some of them parts, some without a device node; and a set of GPUs."""
    found: list[Device] = []
    for number in range(draw(some.integers(1, 6))):
        parent = draw(some.none() | some.sampled_from([one.id for one in found])) if found else None
        kind, paths = draw(some.sampled_from(["gpu", "nic"])), draw(some.sampled_from([(), (f"/dev/d{number}",)]))
        found.append(Device(kind=kind, id=f"d{number}", parent=parent, paths=paths))
    group = {"group": "2", "members": ",".join(one.id for one in found[:2])}
    return Inventory(devices=(*found, Device(kind="gpu", id="set", paths=("/dev/a",), attributes=group)))


@given(some.data(), machines())
def test_every_cause_that_kubelet_gets_is_known_in_the_same_words(data: some.DataObject, inventory: Inventory) -> None:
    """Of all that is served; and of the rest what sources report."""
    states = some.sampled_from([HEALTHY, UNHEALTHY, UNKNOWN])
    evidence = [
        Evidence(device=one.id, source="s", state=data.draw(states), reason=f"why {one.id}")
        for one in inventory.devices
        if data.draw(some.booleans())
    ]
    health = observe(NO_HEALTH, evidence, 0.0)
    known = known_health(inventory, health, [GPUS, object()])
    for one in GPUS.advertised(inventory, Ledger(), health):
        said = known.get(one.id)
        assert one.reason == (said.reason if said is not None and said.state != HEALTHY else "")
    for device in inventory.devices:
        ill, said = illness(device, health), known.get(device.id)
        if said is None:
            assert device.id not in health and (ill is None or (device.lacks_node and not GPUS.serves(device)))
            continue
        assert (said.state, said.reason) == ((ill.state, ill.reason) if ill is not None else (HEALTHY, ""))
        assert said.state == HEALTHY or (said.state, said.reason) in {one[:2] for one in said.seen.values()}
        assert set(said.seen) <= {"s", WHOLE, MEMBERS, DEVICE_NODE}
        if device.id in health:
            assert said.seen["s"] == health[device.id].seen["s"]
    assert list(known) == sorted(known)


def test_what_no_resource_serves_needs_no_device_node() -> None:
    """A crypto function without a driver for user space is a normal part of many machines."""
    inventory = Inventory(devices=(Device(kind="gpu", id="g"), Device(kind="qat", id="q")))
    known = known_health(inventory, NO_HEALTH, [GPUS])
    assert {id: (one.state, one.reason, [*one.seen]) for id, one in known.items()} == {
        "g": (UNKNOWN, "there is no device node to hand over", [DEVICE_NODE])
    }


def test_what_was_said_of_a_device_that_is_gone_is_still_known() -> None:
    health = observe(NO_HEALTH, [Evidence(device="d", source="s", state=UNHEALTHY, reason="why")], 0.0)
    assert known_health(Inventory(), health, []) == health
