"""Device metadata where applications look for it: what they read, in which version, and where it is mounted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.core.dra.prepare import prepare
from nodeagent.core.model.claim import Result
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.cdi import ClaimFiles
from nodeagent.managers.dra import container_edits, device_metadata
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pools import DRIVER, NOBODY, claim, device, result, stamp
from tests.oracles import device_metadata as reader
from tests.unit.managers.test_container_edits import MIB, machine, served

WIDE = [(cpu, 0, 0, cpu // 2, cpu) for cpu in range(256)]


def granted(*results: Result, inventory: Inventory | None = None) -> tuple[Grant, ...]:
    one = claim("c", *results)
    batch = prepare(inventory or machine(), NOBODY, served().catalog, [one], stamp())
    assert not batch.errors
    return batch.grants[one.ref.uid]


def files(folder: Path, *results: Result, pod_claim: str = "", inventory: Inventory | None = None) -> dict[str, bytes]:
    """The files of a claim by request."""
    inventory = inventory or machine()
    grants = granted(*results, inventory=inventory)
    streams = device_metadata.streams(served(), inventory, grants, pod_claim)
    written = ClaimFiles(folder)
    written.write_requests("uid-c", streams)
    return {request: written.request_path("uid-c", request).read_bytes() for request in streams}


def one_device(stream: bytes) -> dict[str, Any]:
    (request,) = json.loads(stream.splitlines()[0])["requests"]
    (found,) = request["devices"]
    return found  # type: ignore[no-any-return]


def test_applications_find_one_file_for_each_request_that_every_version_can_read(tmp_path: Path) -> None:
    """The newest first; an alternative of a request is under the request, and named in full in the content."""
    found = files(tmp_path, result("cpu", "numa1", "near/small", cpus=2), result("nic", "n0", "net"))
    assert list(found) == ["near", "net"]
    for stream in found.values():
        assert [one["apiVersion"] for one in reader.objects(stream)] == list(reader.KNOWN)
        newest, older = reader.read(stream), reader.read(stream, reader.KNOWN[1:])
        assert (newest.metadata, newest.requests) == (older.metadata, older.requests)
        assert newest.metadata == reader.ObjectMeta(name="c", namespace="ns", uid="uid-c", generation=1)
    requests = reader.read(found["near"]).requests
    assert [(one.name, [it.name for it in one.devices or ()]) for one in requests or ()] == [("near/small", ["numa1"])]


def test_a_device_has_the_attributes_that_are_published_and_what_was_granted(tmp_path: Path) -> None:
    """Of a share only the claim itself can know that."""
    found = files(
        tmp_path,
        result("cpu", "numa1", "cpus", cpus=2),
        result("hugepages", "numa0-2mi", "pages", size=4 * MIB),
        result("memory", "numa1", "memory", size=4096),
        result("gpu", "g0", "gpu"),
        result("nic", "n0", "look", admin=True),
    )
    devices = {request: one_device(stream)["attributes"] for request, stream in found.items()}
    assert devices["cpus"]["grantedCpus"] == {"string": "4-5"}
    assert devices["cpus"]["resource.kubernetes.io/numaNode"] == {"int": 1}
    assert devices["pages"]["grantedBytes"] == {"int": 4 * MIB}
    assert devices["memory"]["grantedBytes"] == {"int": 4096}
    assert devices["gpu"]["uuid"] == {"string": "GPU-0"}
    assert devices["look"]["resource.kubernetes.io/pciBusID"] == {"string": "0000:41:00.0"}


def test_attributes_do_not_depend_on_who_holds_what_or_on_health(tmp_path: Path) -> None:
    """A claim that takes the last CPUs reads the same of its device as the first."""
    every = granted(result("cpu", "numa1", "cpus", cpus=4))
    (document, _) = device_metadata.streams(served(), machine(), every, "")["cpus"]
    assert document["requests"][0]["devices"][0]["attributes"]["numaNode"] == {"int": 1}


def test_a_list_of_cpus_that_is_too_long_for_an_attribute_is_left_out(tmp_path: Path) -> None:
    """The claim's own file and the environment have it whole."""
    wide = inventory_of(WIDE)
    grant = granted(result("cpu", "numa0", "cpus", cpus=60), inventory=wide)[0]
    odd = replace(grant, cpus=type(grant.cpus)(range(1, 256, 2)))
    (document, _) = device_metadata.streams(served(), wide, [odd], "")["cpus"]
    stream = json.dumps(document).encode()
    assert "grantedCpus" not in one_device(stream)["attributes"]
    assert reader.read(stream)


def test_an_adapter_has_the_data_of_its_interface(tmp_path: Path) -> None:
    nic = device("n0", attributes={"netdevs": "ens1,ens2", "mac": "02:00:00:00:00:01"})
    inventory = inventory_of(even_rows(1, 1, 1, 4, 1), devices=(nic,))
    found = files(tmp_path, result("nic", "n0", "net"), inventory=inventory)
    assert one_device(found["net"])["networkData"] == {
        "interfaceName": "ens1",
        "hardwareAddress": "02:00:00:00:00:01",
    }
    assert reader.read(found["net"])


def test_a_device_with_more_attributes_than_a_file_may_have_can_be_read(tmp_path: Path) -> None:
    """What goes beyond 32 is left out."""
    nic = device("n0", attributes={f"key_{number}": number for number in range(60)})
    inventory = inventory_of(even_rows(1, 1, 1, 4, 1), devices=(nic,))
    found = files(tmp_path, result("nic", "n0", "net"), inventory=inventory)
    assert len(one_device(found["net"])["attributes"]) <= 32
    assert reader.read(found["net"])


def test_a_kind_that_is_served_no_more_has_no_attributes() -> None:
    grants = granted(result("cpu", "numa1", "cpus", cpus=2))
    less = served({"name": "memory", "kind": "memory", "serve": "dra"})
    (document, _) = device_metadata.streams(less, machine(), grants, "")["cpus"]
    assert document["requests"][0]["devices"][0]["attributes"] == {"grantedCpus": {"string": "4-5"}}


# Where they are mounted


@pytest.mark.parametrize("pod_claim", ["", "mine"])
def test_each_file_is_mounted_alone_and_read_only_where_upstream_looks_for_it(pod_claim: str) -> None:
    """Once for each request of a container, however many devices it has; a folder would hide other drivers' files."""
    grants = granted(result("gpu", "g0", "gpus"), result("gpu", "g1", "gpus"), result("nic", "n0", "net/b"))
    paths = {"gpus": "/run/a", "net": "/run/b"}
    mounts = device_metadata.mounts(paths, DRIVER, "c", pod_claim)
    own = container_edits.edits(served(), machine(), grants, mounts["gpus"], mounts)
    where = reader.template_path if pod_claim else reader.claim_path
    name = pod_claim or "c"
    assert [(one.host_path, one.container_path, one.read_only) for one in mounts.values()] == [
        ("/run/a", where(DRIVER, name, "gpus"), True),
        ("/run/b", where(DRIVER, name, "net"), True),
    ]
    assert [[it.host_path for it in one.mounts[:-1]] for one in own] == [["/run/a"], [], ["/run/b"]]


def test_every_name_that_kubernetes_allows_fits_into_a_path() -> None:
    """253 characters of a claim, 63 of a request and of a driver; a component has 255 bytes at most, a path 4,095."""
    claim_name = ".".join(["c" * 62] * 4)[:253]
    (mount,) = device_metadata.mounts({"r" * 63: "/x"}, "d" * 63, claim_name, "").values()
    assert max(len(part) for part in mount.container_path.split("/")) <= 255
    assert len(mount.container_path) < 4096
