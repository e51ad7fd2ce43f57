"""One node on which both APIs want the same few things, and what each of them was answered.

Holdings are counted alike for pods and claims: how much of each unit (a CPU, pages of a node, a device, a share) a
holder has, read from what the answer gives the container. Nothing here believes the agent: the sums are made from the
answers, and the ledger that the agent shows is compared with them.
"""

from __future__ import annotations

import json
import random
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nodeagent.core.model.cpuset import CpuSet
from tests.builders.devices import DeviceTree
from tests.builders.machines import MIB, machine
from tests.doubles.api_server import FakeApiServer
from tests.doubles.dra_kubelet import ClaimId, FakeDraKubelet, Outcome
from tests.doubles.kubelet import FakeKubelet, Pod
from tests.support.dra_node import DRIVER, NODE, consumed, result

CPU, PAGES, PORT, SHARED = (f"nodeagent.dev/{name}" for name in ("cpu", "pages", "port", "shared"))
CPUS, PAGES_PER_NODE, PORTS, SHARES, BLOCK = 8, 16, 4, 4, 2
UNLISTED_S = 0.5
"""How long a pod may take from its first answer until kubelet lists it."""
NEW, ASKED, HELD, LEAVING, GONE = "new", "asked", "held", "leaving", "gone"
"""Never asked for; asked, perhaps granted; answered; given back, perhaps received; gone for sure."""

Unit = tuple[str, int | str]
LIMITS: Mapping[Unit, int] = {
    **{("cpu", one): 1 for one in range(CPUS)},
    **{("pages", node): PAGES_PER_NODE for node in (0, 1)},
    **{("device", f"/dev/ttyS{one}"): 1 for one in range(PORTS)},
    ("device", "/dev/null"): SHARES,
}


@dataclass(eq=False)
class Bid:
    """A claim, and what is known of it."""

    claim: ClaimId
    results: Sequence[Mapping[str, Any]]
    state: str = NEW
    answer: tuple[Outcome, str] | None = None
    """What kubelet was told and what lay in the CDI file, since it was last given back."""
    there: bool = True
    """Whether the API server has it."""

    @property
    def shares(self) -> int:
        return sum(one["pool"].endswith("/char") and "shareID" in one for one in self.results)


@dataclass
class World:
    """A node, who wants what, and what they were answered."""

    folder: Path
    seed: int
    kubelet: FakeKubelet
    dra: FakeDraKubelet
    api: FakeApiServer
    random: random.Random
    bids: list[Bid] = field(default_factory=list)
    names: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Devices that were published while nothing was held, by kind/name."""
    counts: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)

    @property
    def status(self) -> Path:
        return self.folder / "run" / "status.sock"

    def some(self, *states: str, there: Collection[bool] = (True, False)) -> list[Bid]:
        return [bid for bid in self.bids if bid.state in states and bid.there in there]

    def note(self, what: str, *about: object) -> None:
        """Count a step, and keep it for an engineer who has to find out what happened."""
        self.counts[what] += 1
        self.counts["steps"] += 1
        self.trace.append(f"{what} {' '.join(map(str, about))}")

    # Claims

    def bid(self, results: Sequence[Mapping[str, Any]]) -> Bid:
        """A fresh claim in the API server, allocated."""
        name, uid = f"c{self.counts['claims made']}", self.new_uid()
        self.counts["claims made"] += 1
        self.api.add_claim(name, results=[dict(one) for one in results], uid=uid)
        bid = Bid(ClaimId("default", name, uid), results)
        self.bids.append(bid)
        return bid

    def new_uid(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def cdi_file(self, bid: Bid) -> str:
        return (self.folder / "cdi" / f"{DRIVER}-claim_{bid.claim.uid}.json").read_text()

    # What must hold at every moment

    def check(self, alongside: Mapping[str, Counter[Unit]] = MappingProxyType({})) -> None:
        """Of all that was answered and not given back, nothing is held twice."""
        holders = dict(alongside) | {f"pod {pod.name}": of_pod(pod) for pod in self.kubelet.pods.values()}
        holders |= {f"claim {bid.claim.name}": of_claim(bid) for bid in self.some(HELD)}
        total = sum(holders.values(), Counter[Unit]())
        for unit, amount in total.items():
            who = [name for name, held in holders.items() if held[unit]]
            assert amount <= LIMITS[unit], f"{amount} of {unit} held by {who}"

    def check_ledger(self, grants: Sequence[Mapping[str, Any]]) -> None:
        """The ledger has every answer as it was given, nothing that was given back, and nothing twice."""
        by_id = {grant["id"]: grant for grant in grants}
        shares = {bid.claim.uid: bid for bid in self.bids}
        total = sum((of_grant(grant) for grant in grants), Counter[Unit]())
        assert all(amount <= LIMITS[unit] for unit, amount in total.items()), f"held twice: {total}"
        for pod in self.kubelet.pods.values():
            check_pod(pod, by_id)
        for bid in self.some(HELD, GONE, NEW):
            mine = [grant for grant in grants if grant["uid"] == bid.claim.uid]
            held = sum((of_grant(grant) for grant in mine), Counter[Unit]())
            wanted = of_claim(bid) if bid.state == HELD else Counter[Unit]()
            assert held == wanted, f"claim {bid.claim.name} is {bid.state}: the ledger has {held}, expected {wanted}"
        strangers = {grant["uid"] for grant in grants if grant["api"] == "claim"} - shares.keys()
        assert not strangers, f"held by claims that were never made: {strangers}"


def check_pod(pod: Pod, by_id: Mapping[str, Mapping[str, Any]]) -> None:
    for resource, answer in pod.responses["main"].items():
        word = resource.partition("/")[2].upper()
        grant = by_id.get(answer.envs[f"NODEAGENT_{word}_GRANT"])
        assert grant is not None, f"{resource} of pod {pod.name} was answered and is lost"
        assert (grant["resource"], set(grant["ids"])) == (resource, pod.held(resource)), pod.name
        assert of_grant(grant) == of_answer(answer, pod.held(resource)), pod.name


# ---------------------------------------------------------------- holdings


def of_pod(pod: Pod) -> Counter[Unit]:
    answers = pod.responses["main"]
    return sum((of_answer(answer, pod.held(one)) for one, answer in answers.items()), Counter[Unit]())


def of_answer(answer: Any, ids: Collection[str]) -> Counter[Unit]:
    """What a container was given that asked for some ids."""
    paths = [one.host_path for one in answer.devices]
    held = Counter[Unit]({("device", path): len(ids) if path == "/dev/null" else 1 for path in paths})
    held.update(of_cpus(answer.envs.get("NODEAGENT_CPUS", "")))
    blocks = Counter(int(one.partition("-")[0].removeprefix("node")) for one in ids if one.startswith("node"))
    held.update({("pages", node): BLOCK * count for node, count in blocks.items()})
    assert int(answer.envs.get("NODEAGENT_HUGEPAGES_2MI", 0)) == BLOCK * blocks.total()
    return held


def of_claim(bid: Bid) -> Counter[Unit]:
    """What the CDI file of a claim gives its containers."""
    assert bid.answer is not None
    edits = [one["containerEdits"] for one in json.loads(bid.answer[1])["devices"]]
    held = Counter[Unit]()
    for one in edits:
        env = dict(line.split("=", 1) for line in one.get("env", ()))
        held.update(of_cpus(env.get("NODEAGENT_CPUS", "")))
        held.update(("device", node["path"]) for node in one.get("deviceNodes", ()))
        if pages := int(env.get("NODEAGENT_HUGEPAGES_2MI", 0)):
            held["pages", int(env["NODEAGENT_HUGEPAGES_2MI_NUMA_NODES"])] += pages
    return held


def of_grant(grant: Mapping[str, Any]) -> Counter[Unit]:
    """What the ledger has under one id. Of a shared device a claim's grant is one share."""
    held = of_cpus(grant["cpus"])
    shares = len(grant["ids"]) if grant["api"] == "device-plugin" else 1
    held.update({("device", one): shares if one == "/dev/null" else 1 for one in grant["devices"]})
    for one in grant["hugepages"]:
        held["pages", one["numa_node"]] += one["pages"]
    return held


def of_cpus(text: str) -> Counter[Unit]:
    return Counter[Unit](("cpu", one) for one in CpuSet.parse(text))


# ---------------------------------------------------------------- what a scheduler allocates


def draw_results(world: World) -> list[dict[str, Any]]:
    """One to three devices of a claim: as a scheduler gives them that sees the slices, or that has seen them too
    long ago."""
    seen = published(world) if world.random.random() < 0.6 else {}
    taken = Counter[str]()
    if seen:
        for bid in world.some(NEW, ASKED, HELD, LEAVING):
            taken.update(amounts(bid.results))
    found: list[dict[str, Any]] = []
    for number in range(world.random.randint(1, 3)):
        one = draw_result(world, seen or world.names, taken, f"r{number}")
        if one is not None:
            found.append(one)
            taken.update(amounts([one]))
    return found


def draw_result(world: World, seen: Mapping[str, Any], taken: Mapping[str, int], request: str) -> dict[str, Any] | None:
    """A device with something left; None where there is none."""
    choices = [name for name in seen if left(seen[name], taken.get(name, 0)) > 0]
    if not choices:
        return None
    kind, _, device = world.random.choice(choices).partition("/")
    most = left(seen[f"{kind}/{device}"], taken.get(f"{kind}/{device}", 0))
    if not seen[f"{kind}/{device}"].get("allowMultipleAllocations"):
        return result(kind, device, request)
    amount = world.random.randint(1, min(3, most))
    capacity = {"cpu": {"cpus": str(amount)}, "hugepages": {"size": f"{2 * amount}Mi"}, "char": {"shares": "1"}}[kind]
    return consumed(kind, device, request, world.new_uid(), **capacity)


def left(device: Mapping[str, Any], taken: int) -> int:
    """How much of a device can still be had: CPUs, pages, shares, or the whole."""
    capacity = {name: one["value"] for name, one in device.get("capacity", {}).items()}
    if not device.get("allowMultipleAllocations"):
        return 1 - taken
    size = capacity.get("size")
    if size is None:
        return int(capacity.get("cpus") or capacity.get("shares", 0)) - taken
    return int(size[:-2]) // 2 * {"Mi": 1, "Gi": 1024}[size[-2:]] - taken if size != "0" else 0


def amounts(results: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Each device as often as something of it is taken."""
    for one in results:
        name = f"{one['pool'].rpartition('/')[2]}/{one['device']}"
        consumes = one.get("consumedCapacity", {})
        size = int(consumes["size"][:-2]) // 2 if "size" in consumes else int(consumes.get("cpus", 1))
        yield from [name] * size


def published(world: World) -> dict[str, dict[str, Any]]:
    """Untainted devices of complete pools, by kind/name."""
    slices = [one["spec"] for one in world.api.slices(node=NODE)]
    newest = {one["pool"]["name"]: 0 for one in slices}
    for one in slices:
        newest[one["pool"]["name"]] = max(newest[one["pool"]["name"]], one["pool"]["generation"])
    return {
        f"{one['pool']['name'].rpartition('/')[2]}/{device['name']}": device
        for one in slices
        if one["pool"]["generation"] == newest[one["pool"]["name"]]
        for device in one.get("devices", ())
        if not device.get("taints")
    }


# ---------------------------------------------------------------- the node


def write_node(folder: Path, api: FakeApiServer) -> list[str]:
    """The machine and the configuration; the words of the command."""
    root = machine(folder / "root", "1s2n8c", hugepages={(n, 2 * MIB): (PAGES_PER_NODE,) * 2 + (0,) for n in (0, 1)})
    # Kubelet has cleared every pod's cgroup away: what it no longer lists is seen to have ended.
    (root / "sys/fs/cgroup/pids/kubepods").mkdir(parents=True)
    tree = DeviceTree(root)
    for path in (*(f"/dev/ttyS{one}" for one in range(PORTS)), "/dev/null"):
        tree.node(path)
    resources = [
        {"name": "cpu", "kind": "cpu"},
        {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "pagesPerBlock": BLOCK},
        {"name": "port", "kind": "char", "paths": ["/dev/ttyS*"]},
        {"name": "shared", "kind": "char", "paths": ["/dev/null"], "replicas": SHARES},
    ]
    config = {
        "stateDir": str(folder / "state"),
        "runtimeDir": str(folder / "run"),
        "reservedCpus": "",
        "resources": [{**one, "serve": "both"} for one in resources],
        "release": {
            "pollSeconds": 0.2,
            "unconfirmedSeconds": UNLISTED_S,
            "confirmedSeconds": 0.1,
            # As long as an admission may take: a pod that is admitted right after a list has no other witness.
            "unobservedSeconds": UNLISTED_S,
        },
        "dra": {
            "kubeconfig": api.kubeconfig(folder),
            "nodeName": NODE,
            "cdiDir": str(folder / "cdi"),
            "spreadSeconds": 0,
        },
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    options = {"--config": folder / "config.yaml", "--root": root, "--kubelet-dir": folder / "kubelet"}
    return ["run", *(str(word) for option in options.items() for word in option)]
