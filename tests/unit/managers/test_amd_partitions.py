"""Partitions of AMD's GPUs from the configuration, on a double of the driver: never changed under a holder or a user,
given back, and requested where the driver has to be loaded again."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.config.schema import Config
from nodeagent.core.model.claim import ClaimRef
from nodeagent.errors import HostError
from nodeagent.host.amd.modes import AmdGpus
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut
from nodeagent.managers.partitions.amd import AmdPartitionsManager
from nodeagent.resources.catalog import dra_of
from tests.doubles.amd_kernel import AmdKernel
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import NODE, result
from tests.support.long_form import LONG

GPU, OTHER = "0000:05:00.0", "0000:15:00.0"
RESOURCE = {"name": "gpu", "kind": "gpu", "serve": "both"}
RELOAD = "it takes effect when the driver is loaded again (modprobe -r amdgpu && modprobe amdgpu)"


class KilledError(Exception):
    """The agent is gone."""


class _Direct(TimedPut):
    def __call__(self, path: str, text: str) -> None:
        try:
            self._put(path, text)
        except OSError as error:
            raise HostError(f"cannot write {text} to {path}: {error.strerror}") from None


class Node:
    """Two GPUs, and what partitions them."""

    def __init__(self, room: Room, kernel: AmdKernel) -> None:
        self.room, self.kernel = room, kernel
        self.now, self.boot = 0.0, "boot"
        self.put: Any = _Direct(kernel.put)
        self.configure()
        self.open()

    def configure(self, *partitions: dict[str, Any]) -> None:
        self.config = msgspec.convert({"resources": [RESOURCE], "amd": {"partitions": partitions}}, Config)

    def open(self) -> None:
        """As after kill -9."""
        sysfs = SysFs(self.room.tree.root)

        async def rescan() -> None:
            self.room.rescan()

        self.amd = AmdPartitionsManager(
            self.room.agent,
            sysfs,
            self.room.folder / "state",
            lambda: self.config,
            rescan,
            gpus=AmdGpus(sysfs, self.put),
            clock=lambda: self.now,
        )

    @property
    def computes(self) -> tuple[str, str]:
        return self.kernel.gpus[GPU].compute, self.kernel.gpus[OTHER].compute

    @property
    def record(self) -> bool:
        return (self.room.folder / "state/amd-partitions.json").exists()

    def parts(self, gpu: str = GPU) -> list[str]:
        return [one.id.partition("/")[2] for one in self.room.agent.inventory.devices if one.parent == gpu]

    async def settle(self, *partitions: dict[str, Any]) -> list[str]:
        """Settle, with this configuration from now on; return the notes."""
        if partitions:
            self.configure(*partitions)
        self.room.rescan()
        await self.amd.settle()
        return self.amd.notes()

    async def claim(self, device: str) -> ClaimRef:
        name = device.replace(":", "-").replace(".", "-").replace("/", "-")
        ref = self.room.claim(f"c-{name}", result("gpu", name))
        (answer,) = await self.room.prepare(ref)
        assert answer.error == ""
        return ref

    async def restart(self, boot_id: str = "") -> None:
        self.boot = boot_id or self.boot
        await self.amd.close()
        await self.room.restart(self.boot)
        self.open()


@contextlib.asynccontextmanager
async def node(folder: Path, *, hive: str = "", **options: Any) -> AsyncIterator[Node]:
    async with claim_room(folder, RESOURCE) as room:
        room.dra = dra_of(room.config, builtin_kinds(), NODE)
        kernel = AmdKernel(room.tree)
        for address in (GPU, OTHER):
            kernel.gpu(address, hive=hive, **options)
        room.rescan()
        made = Node(room, kernel)
        try:
            yield made
        finally:
            await made.amd.close()


def of(compute: str | None = None, memory: str | None = None, gpu: str = GPU) -> dict[str, Any]:
    return {"gpus": [gpu], "compute": compute, "memory": memory}


async def test_a_gpu_is_partitioned_as_configured_and_others_are_left_alone(tmp_path: Path) -> None:
    """The parts are there at once: the driver sends no event."""
    async with node(tmp_path) as one:
        assert await one.settle(of("CPX")) == []
        assert one.computes == ("CPX", "SPX")
        assert one.parts() == [f"xcp-{number}" for number in range(8)] and one.parts(OTHER) == []
        renders = [device.attributes["drm_render"] for device in one.room.agent.inventory.devices if device.parent]
        assert renders == [f"renderD{129 + number}" for number in range(8)]
        written = list(one.kernel.written)
        assert await one.settle() == [] and one.kernel.written == written
        assert await one.settle(of("DPX")) == [] and one.parts() == ["xcp-0", "xcp-1"]


@pytest.mark.parametrize("pattern", ["0000:05:*", f"{0x1001:016x}", "*1001"])
async def test_a_gpu_is_named_by_patterns_of_its_address_or_its_uuid_and_the_first_rule_counts(
    tmp_path: Path, pattern: str
) -> None:
    """The UUID of the PCI function, which is the same in every partition mode."""
    async with node(tmp_path) as one:
        await one.settle(of("QPX", gpu=pattern), of("CPX", gpu="*"))
        assert one.computes == ("QPX", "CPX")
        assert await one.settle() == [] and one.computes == ("QPX", "CPX")


async def test_what_an_admin_has_partitioned_stays(tmp_path: Path) -> None:
    """Also one that then is configured as it is, and no longer afterwards."""
    async with node(tmp_path) as one:
        for gpu, mode in ((GPU, "QPX"), (OTHER, "CPX")):
            one.kernel.put(str(one.room.tree.root / f"sys/bus/pci/devices/{gpu}/current_compute_partition"), mode)
        await one.settle(of("CPX", gpu=OTHER))
        one.configure()
        assert await one.settle() == []
        assert one.computes == ("QPX", "CPX") and not one.record


async def test_what_is_configured_no_longer_is_as_it_was_before(tmp_path: Path) -> None:
    """Also after several changes, and a restart."""
    async with node(tmp_path) as one:
        await one.settle(of("CPX"))
        await one.settle(of("QPX"))
        await one.restart()
        one.configure()
        assert await one.settle() == []
        assert one.computes == ("SPX", "SPX") and not one.record


async def test_what_an_admin_changed_since_is_no_longer_the_agents(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle(of("CPX"))
        one.configure()
        one.kernel.put(str(one.room.tree.root / f"sys/bus/pci/devices/{GPU}/current_compute_partition"), "DPX")
        assert await one.settle() == []
        assert one.computes == ("DPX", "SPX") and not one.record


@pytest.mark.parametrize("held", [GPU, f"{GPU}/xcp-1"])
async def test_no_holder_loses_its_gpu_or_partition(tmp_path: Path, held: str) -> None:
    """Once it is released, the GPU is partitioned."""
    async with node(tmp_path) as one:
        if held != GPU:
            await one.settle(of("DPX"))
        before, ref = one.computes, await one.claim(held)
        found = before[0]
        assert await one.settle(of("CPX")) == [
            f"amd.partitions: GPU {GPU}: compute partition CPX wanted, {found} there: it or a part of it is held"
        ]
        assert one.computes == before
        await one.room.unprepare(ref)
        assert await one.settle() == [] and one.computes[0] == "CPX"


async def test_no_process_loses_its_gpu(tmp_path: Path) -> None:
    """One that computes, and one that has a node open, which the driver itself does not look at."""
    async with node(tmp_path) as one:
        one.kernel.computes(4711, GPU)
        (note,) = await one.settle(of("CPX"))
        assert note.endswith("SPX there: in use through KFD by process 4711")
        one.kernel.ends(4711)
        one.kernel.opens(4712, "/dev/dri/renderD129")
        one.kernel.opens(4713, "/dev/dri/card1")
        one.kernel.opens(4714, "/dev/dri/renderD145")
        (note,) = await one.settle()
        assert note.endswith("its DRM nodes are open in processes 4712, 4713")
        assert one.kernel.written == [] and one.computes == ("SPX", "SPX")
        one.kernel.ends(4712)
        one.kernel.ends(4713)
        assert await one.settle() == [] and one.computes == ("CPX", "SPX")


async def test_a_process_in_another_context_counts_too(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        number = (one.room.tree.root / "sys/class/kfd/kfd/topology/nodes/1/gpu_id").read_text().strip()
        (folder := one.room.tree.root / "sys/class/kfd/kfd/proc/77/context_1").mkdir(parents=True)
        (folder / f"vram_{number}").write_text("0\n")
        (note,) = await one.settle(of("CPX"))
        assert note.endswith("in use through KFD by process 77")


async def test_a_program_on_another_gpu_forbids_nothing_but_to_an_older_kernel(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        one.kernel.computes(4711, OTHER)
        assert await one.settle(of("CPX")) == [] and one.computes == ("CPX", "SPX")
        one.kernel.older = True
        (note,) = await one.settle(of("QPX"))
        assert "cannot write QPX to" in note and "Device or resource busy (older kernels change none" in note
        assert note.endswith("while any program uses KFD: process 4711)")
        written = len(one.kernel.written)
        assert await one.settle() == [note] and len(one.kernel.written) == written
        one.kernel.ends(4711)
        one.now += 61
        assert await one.settle() == [] and one.computes == ("QPX", "SPX")


@pytest.mark.parametrize("how", ["hidden", "namespace"])
async def test_processes_that_cannot_be_seen_may_use_it(tmp_path: Path, how: str) -> None:
    async with node(tmp_path) as one:
        if how == "hidden":
            (one.room.tree.root / "proc/1/fd").rmdir()
        else:
            (one.room.tree.root / "proc/self/ns").mkdir(parents=True)
            (one.room.tree.root / "proc/self/ns/pid").symlink_to("pid:[4026532000]")
        (note,) = await one.settle(of("CPX"))
        assert "cannot see which processes have its DRM nodes open" in note
        assert one.kernel.written == []


async def test_a_mode_that_is_not_possible_is_not_tried(tmp_path: Path) -> None:
    async with node(tmp_path, memories=("NPS1", "NPS2", "NPS4")) as one:
        one.kernel.gpus[GPU].memory = one.kernel.gpus[GPU].requested = "NPS4"
        one.kernel.reload()
        there = f"amd.partitions: GPU {GPU}: compute partition {{}} wanted, CPX there: "
        assert await one.settle(of("SPX")) == [
            there.format("SPX") + "not possible with memory partition NPS4: QPX, CPX",
        ]
        assert await one.settle(of("TPX")) == [
            there.format("TPX") + "not possible with memory partition NPS4: QPX, CPX",
        ]
        assert one.kernel.written == []


async def test_a_gpu_that_cannot_be_partitioned_is_a_note(tmp_path: Path) -> None:
    async with node(tmp_path, memories=("NPS1",)) as one:
        for name in ("current", "available"):
            (one.room.tree.root / f"sys/bus/pci/devices/{GPU}/{name}_compute_partition").unlink()
        notes = await one.settle(of("CPX", "NPS4"))
        assert [note.rpartition("there: ")[2] for note in notes] == [
            "its driver does not partition it",
            "its driver cannot change it",
        ]


async def test_a_memory_partition_is_requested_once_and_pending_until_the_driver_is_loaded_again(
    tmp_path: Path,
) -> None:
    """Which then has chosen another compute partition, and the agent sets that again."""
    async with node(tmp_path) as one:
        pending = f"amd.partitions: GPU {GPU}: memory partition NPS4 wanted, NPS1 there: requested; {RELOAD}"
        assert await one.settle(of("QPX", "NPS4")) == [pending]
        assert one.kernel.gpus[GPU].requested == "NPS4" and one.computes == ("QPX", "SPX")
        for _ in range(2):
            await one.restart()
            assert await one.settle() == [pending]
        assert [file for _, file, _ in one.kernel.written].count("current_memory_partition") == 1
        one.kernel.reload()
        assert await one.settle() == []
        assert (one.computes[0], one.kernel.gpus[GPU].memory) == ("QPX", "NPS4")
        one.configure()
        await one.settle()
        assert (one.computes[0], one.kernel.gpus[GPU].memory) == ("CPX", "NPS4") and not one.record


async def test_a_request_that_a_reboot_or_the_driver_lost_is_made_again(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle(of(memory="NPS4"))
        one.kernel.reboot()
        await one.restart("another boot")
        await one.settle()
        assert one.kernel.gpus[GPU].requested == "NPS4"
        one.kernel.gpus[GPU].requested = ""  # the firmware refused
        one.kernel.reload()
        await one.settle()
        assert one.kernel.gpus[GPU].requested == "NPS4"


async def test_a_request_that_is_configured_no_longer_cannot_be_taken_back_and_a_note_says_so(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle(of(memory="NPS4"))
        note = (
            f"amd.partitions: GPU {GPU}: memory partition NPS4 wanted, NPS1 there: it was requested, which cannot be "
            f"taken back; {RELOAD}"
        )
        one.configure()
        assert await one.settle() == [note]
        assert await one.settle(of(memory="NPS1")) == [note]
        one.kernel.reload()
        one.configure()
        assert await one.settle() == [] and not one.record


async def test_nothing_is_requested_of_a_gpu_that_is_held_or_used(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        ref = await one.claim(GPU)
        (note,) = await one.settle(of(memory="NPS4"))
        assert note.endswith("NPS1 there: it or a part of it is held")
        await one.room.unprepare(ref)
        one.kernel.computes(5)
        (note,) = await one.settle()
        assert note.endswith("in use through KFD by process 5") and one.kernel.written == []


async def test_the_gpus_of_a_hive_get_one_memory_partition(tmp_path: Path) -> None:
    """A request for one is a request for all."""
    async with node(tmp_path, hive="a") as one:
        (note,) = await one.settle(of(memory="NPS4"))
        assert note.endswith(f"{OTHER}, which is in the same XGMI hive and changes with it, is to have NPS1")
        assert one.kernel.written == []
        notes = await one.settle(of(memory="NPS4", gpu="*"))
        assert len(notes) == 2 and all(f"requested; {RELOAD}" in note for note in notes)
        one.kernel.reload()
        assert await one.settle() == []
        assert {gpu.memory for gpu in one.kernel.gpus.values()} == {"NPS4"}


async def test_a_gpu_during_a_reset_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node(tmp_path) as one:
        text = SysFs.text

        def refused(self: SysFs, path: str, *default: Any) -> Any:
            if path.endswith("current_memory_partition"):
                raise HostError(f"cannot read {path}: Operation not permitted")
            return text(self, path, *default)

        monkeypatch.setattr(SysFs, "text", refused)
        (note,) = await one.settle(of("CPX"))
        assert note.endswith(
            "unknown there: cannot read sys/bus/pci/devices/" + GPU + "/current_memory_partition: "
            "Operation not permitted"
        )
        monkeypatch.undo()
        assert await one.settle() == [] and one.computes == ("CPX", "SPX")


@pytest.mark.parametrize("error", [errno.EIO, errno.EPERM])
async def test_a_driver_that_refuses_is_a_note_and_what_an_admin_sets_then_is_not_the_agents(
    tmp_path: Path, error: int
) -> None:
    async with node(tmp_path) as one:
        one.kernel.refusals[GPU] = error
        (note,) = await one.settle(of("CPX"))
        assert "cannot write CPX to" in note and not one.record
        one.kernel.refusals.clear()
        one.kernel.put(str(one.room.tree.root / f"sys/bus/pci/devices/{GPU}/current_compute_partition"), "CPX")
        assert await one.settle() == []
        one.configure()
        assert await one.settle() == [] and one.computes == ("CPX", "SPX")


async def test_a_write_that_hangs_has_a_deadline_and_is_not_repeated_before_it_ends(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        release = threading.Event()
        one.kernel.before = lambda address, text: _wait(release)
        one.put = TimedPut(one.kernel.put, deadline_s=0.05)
        await one.amd.close()
        one.open()
        (note,) = await one.settle(of("CPX"))
        assert "it did not end within 0.05 s" in note and one.record
        one.now += 61
        (note,) = await one.settle()
        assert "an earlier write has not ended" in note
        release.set()
        for thread in threading.enumerate():
            if thread.name == "vfio":
                thread.join(10)
        one.now += 61
        assert await one.settle() == [] and one.computes == ("CPX", "SPX")
        one.configure()
        assert await one.settle() == [] and one.computes == ("SPX", "SPX")


def _wait(event: threading.Event) -> None:
    assert event.wait(20)


async def test_a_grant_in_the_last_moment_keeps_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the ledger and the write."""
    async with node(tmp_path) as one:
        refresh = one.room.agent.refresh

        async def grant_first() -> None:
            monkeypatch.setattr(one.room.agent, "refresh", refresh)
            await one.claim(GPU)

        monkeypatch.setattr(one.room.agent, "refresh", grant_first)
        await one.settle(of("CPX"))
        assert one.computes == ("SPX", "SPX")


async def test_nothing_of_a_gpu_is_granted_while_it_changes(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        seen, agent = list[bool](), one.room.agent
        one.kernel.before = lambda address, text: seen.append(GPU in agent.ledger.devices_taken)
        await one.settle(of("CPX"))
        assert seen == [True]
        assert GPU not in agent.ledger.devices_taken
        await one.claim(f"{GPU}/xcp-7")


async def test_a_device_that_is_held_back_for_that_moment_is_refused(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        one.amd._hold_back(GPU)
        ref = one.room.claim("c", result("gpu", "0000-05-00-0"))
        (answer,) = await one.room.prepare(ref)
        assert "a GPU whose partitions are about to change" in answer.error
        one.amd._hold_back("")
        (answer,) = await one.room.prepare(ref)
        assert answer.error == ""


async def test_an_unreadable_record_changes_nothing_back(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.settle(of("CPX"))
        (tmp_path / "state/amd-partitions.json").write_text("{")
        one.configure()
        assert await one.settle() == [] and one.computes == ("CPX", "SPX")


async def test_admins_see_what_is_and_what_waits(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        assert one.amd.document() == {}
        await one.settle(of("CPX", "NPS4"))
        compute = {"now": "CPX", "configured": "CPX", "waits": ""}
        memory = {"now": "NPS1", "configured": "NPS4", "waits": f"requested; {RELOAD}"}
        assert one.amd.document() == {"partitions": [{"gpu": GPU, "compute": compute, "memory": memory}]}


# ---------------------------------------------------------------- kill -9


def _steps(kernel: AmdKernel, at: int) -> Iterator[None]:
    """Kill before the write number `at`, or after it if `at` is odd."""
    count = 0

    def step(address: str, text: str) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise KilledError

    kernel.before = kernel.after = step
    yield
    kernel.before = kernel.after = lambda address, text: None


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("then", ["CPX", "QPX", ""])
async def test_after_a_kill_at_each_step_the_next_agent_completes_or_gives_back(
    tmp_path: Path, at: int, then: str
) -> None:
    """Before and after the write of the compute partition, and of the request."""
    async with node(tmp_path) as one:
        kill = _steps(one.kernel, at)
        next(kill)
        with contextlib.suppress(KilledError):
            await one.settle(of("CPX", "NPS4"))
        next(kill, None)
        await one.restart()
        one.configure(*([of(then, "NPS4")] if then else []))
        await one.settle()
        assert one.computes == (then or "SPX", "SPX")
        if then:
            assert one.kernel.gpus[GPU].requested == "NPS4"
        one.configure()
        await one.settle()
        assert one.computes == ("SPX", "SPX")
        one.kernel.reload()
        assert await one.settle() == [] and not one.record


@pytest.mark.parametrize("seed", range(1000 if LONG else 20))
async def test_an_agent_that_is_killed_at_any_step_is_followed_by_one_that_completes_it(
    tmp_path: Path, seed: int
) -> None:
    """Random configurations, holders, kills, reloads and reboots: no holder loses its partition, and in the end all is
    as configured, or as before."""
    chance = random.Random(seed)
    async with node(tmp_path) as one:
        held: dict[str, ClaimRef] = {}
        for _ in range(6):
            kill = _steps(one.kernel, chance.randint(0, 5))
            next(kill)
            rule = of(chance.choice(["SPX", "DPX", "QPX", "CPX", None]), chance.choice(["NPS1", "NPS4", None]))
            one.configure(*([rule] if rule["compute"] or rule["memory"] else []))
            with contextlib.suppress(KilledError):
                await one.settle()
            next(kill, None)
            one.room.rescan()
            assert held.keys() <= {GPU, *(f"{GPU}/{part}" for part in one.parts())}
            await one.restart()
            if not held and chance.random() < 0.4:
                one.kernel.reload() if chance.random() < 0.5 else one.kernel.reboot()
                await one.restart(f"boot {chance.random()}")
            one.room.rescan()
            if not held:
                device = chance.choice([GPU, *(f"{GPU}/{part}" for part in one.parts())])
                held[device] = await one.claim(device)
            elif chance.random() < 0.6:
                await one.room.unprepare(held.popitem()[1])
        for ref in held.values():
            await one.room.unprepare(ref)
        one.now += 61
        await one.settle(of("CPX", "NPS4"))
        one.kernel.reload()
        assert await one.settle() == []
        assert (one.computes[0], one.kernel.gpus[GPU].memory) == ("CPX", "NPS4")
        one.configure()
        await one.settle()
        assert not one.record and one.computes[0] in ("CPX", "QPX")
