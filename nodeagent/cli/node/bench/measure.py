"""Measures a plan within a number of seconds, on its CPUs alone: the affinity of each thread is read back.

Before each step it is asked again who holds the CPUs: what is granted meanwhile ends the measurement.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import NamedTuple, TypeVar

import msgspec

from nodeagent.cli.agent.top.sample import meminfo
from nodeagent.cli.node.bench.plan import Plan, jittered
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.topology import NodeId
from nodeagent.errors import HostError, PeerError, cause_of
from nodeagent.host.sysfs.sysfs import SysFs

T = TypeVar("T")
INTERVAL_NS = 1_000_000
ANYWHERE = -1
FREE_TIMES = 4
"""A node needs so many times as much free memory as is measured: the pods on it must not run short."""
START_S = 20.0
"""How long the threads of one step wait for each other."""


class NodeMeasure(NamedTuple):
    """Memory of one NUMA node from the CPUs of the plan."""

    node: NodeId
    latency_ns: float | None = None
    bytes_per_s: float | None = None
    why_not: str = ""
    """Why it was not measured."""


class Jitter(NamedTuple):
    """How late threads of one CPU were woken, in nanoseconds."""

    cpu: int
    wakeups: int
    median_ns: int
    p99_ns: int
    worst_ns: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    plan: Plan
    seconds: float
    nodes: tuple[NodeMeasure, ...]
    jitter: tuple[Jitter, ...]


class Bench:
    """Carries out a plan."""

    def __init__(self, plan: Plan, sysfs: SysFs, held: Callable[[], CpuSet], say: Callable[[str], None]) -> None:
        """held: asks which CPUs others hold now; raises if that is not known. say: is called before each step."""
        self._plan = plan
        self._sysfs = sysfs
        self._held = held
        self._say = say
        self._bound = len(plan.nodes) > 1
        """Whether memory is bound to its node: with one there is no other, and a kernel without NUMA binds none."""

    def run(self, seconds: float) -> Measured:
        """Measure for about so many seconds. Raise HostError if the kernel does not let this process run on these CPUs,
        PeerError if they are granted to others meanwhile."""
        share_s = seconds / (2 * len(self._plan.nodes) + 1)
        nodes = [self._node(node, share_s) for node in self._plan.nodes]
        nodes += [NodeMeasure(node, why_not=why) for node, why in self._plan.skipped.items()]
        self._check("wake-ups")
        jitter = tuple(self._together(lambda cpu: _jitter(cpu, share_s)))
        return Measured(plan=self._plan, seconds=seconds, nodes=tuple(sorted(nodes)), jitter=jitter)

    def _check(self, what: str) -> None:
        self._say(f"measuring {what} from CPUs {self._plan.cpus}")
        if taken := self._plan.cpus & self._held():
            raise PeerError(f"cannot go on with CPUs {self._plan.cpus}: others have been granted {taken}")

    def _node(self, node: NodeId, share_s: float) -> NodeMeasure:
        from nodeagent.cli.node.bench._probe import Memory

        size = self._plan.bytes_per_node
        if why := self._lack(node, size):
            return NodeMeasure(node, why_not=why)
        self._check(f"NUMA node {node}")
        with on_cpu(min(self._plan.cpus)):
            try:
                memory = Memory(size, node if self._bound else ANYWHERE)
                where = memory.nodes() if self._bound else [node]
            except OSError as error:
                return NodeMeasure(node, why_not=f"no memory can be bound to it: {cause_of(error)}")
            if where != [node]:
                return NodeMeasure(node, why_not=f"the kernel has put the memory on {CpuSet(max(0, n) for n in where)}")
            latency_ns = memory.latency_ns(share_s)
        self._check(f"NUMA node {node}")
        return NodeMeasure(node, latency_ns, sum(self._together(lambda _: memory.bytes_per_s(share_s))))

    def _lack(self, node: NodeId, size: int) -> str:
        free = dict(meminfo(self._sysfs, node)).get("MemFree")
        if free is None or free >= FREE_TIMES * size:
            return ""
        return f"only {free >> 20} MiB of it are free, and {FREE_TIMES * size >> 20} MiB are wanted"

    def _together(self, work: Callable[[int], T]) -> list[T]:
        """Return what `work` returns on each CPU, all at once."""
        cpus = list(self._plan.cpus)
        barrier = Barrier(len(cpus))

        def pinned(cpu: int) -> T:
            try:
                with on_cpu(cpu):
                    barrier.wait(START_S)
                    return work(cpu)
            except HostError:
                barrier.abort()  # the others need not wait
                raise

        with ThreadPoolExecutor(len(cpus)) as pool:
            every = [pool.submit(pinned, cpu) for cpu in cpus]
        _raise_first([one.exception() for one in every], self._plan.cpus)
        return [one.result() for one in every]


def _raise_first(errors: Iterable[BaseException | None], cpus: CpuSet) -> None:
    """Raise what has gone wrong in threads, rather than that the others have not met it."""
    found = [one for one in errors if one is not None]
    if causes := [one for one in found if not isinstance(one, BrokenBarrierError)]:
        raise causes[0]
    if found:
        raise HostError(f"cannot measure on CPUs {cpus}: not all of them are free within {START_S:g} s")


def _jitter(cpu: int, share_s: float) -> Jitter:
    from nodeagent.cli.node.bench._probe import wakeups_ns

    late = wakeups_ns(share_s, INTERVAL_NS)
    return Jitter(cpu, len(late), *jittered(late))


@contextlib.contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """Have this thread run on one CPU alone, and as before afterwards. Raise HostError if the kernel does not do so."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError as error:
        why = f"{cause_of(error)} (is it in a cpuset partition, or outside this process's cgroup?)"
        raise HostError(f"cannot run on CPU {cpu}: {why}") from None
    try:
        if (now := os.sched_getaffinity(0)) != {cpu}:
            raise HostError(f"cannot run on CPU {cpu} alone: the kernel allows {CpuSet(now)}")
        yield
        if (now := os.sched_getaffinity(0)) != {cpu}:
            raise HostError(
                f"cannot use what was measured on CPU {cpu}: meanwhile the kernel has allowed {CpuSet(now)}"
            )
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)
