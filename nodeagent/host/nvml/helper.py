"""The process that calls NVML. NVML can hang in the driver, where no thread can be stopped. So the daemon
never loads it but asks this process over two pipes, and kills it when it is late. The process ends with its
standard input, and with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from nodeagent.host.nvml.condition import ConditionReader
from nodeagent.host.nvml.library import load
from nodeagent.host.nvml.mig import MigControl, mig_state
from nodeagent.host.nvml.values import (
    LENGTH,
    Failure,
    Mig,
    NvGpu,
    Question,
    RefusedByDriver,
    Reply,
    Snapshot,
    Xid,
    read_frame,
    sysfs_address,
)

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1
_EVENT_WAIT_MS = 5_000
_EVENT_RETRY_S = 5.0
_NVLINKS = 36
_NO_INSTANCE = 0xFFFFFFFF
"""In place of an instance's number: the event is not of one."""


class Nvml:
    """NVML's functions on one initialised library, returning our values."""

    def __init__(self, nvml: Any) -> None:  # the module pynvml, which has no types
        self._nvml = nvml
        self._mig_control = MigControl(nvml)
        self._condition = ConditionReader(nvml)
        nvml.nvmlInit()

    def answer(self, question: Question) -> Reply:
        """Answer one question. Raise NVMLError if NVML fails as a whole."""
        to, mig = question.ask, self._mig_control
        try:
            if question.create is not None:
                return Reply(to=to, made=mig.create(question.create))
            if question.destroy is not None:
                return Reply(to=to, completed=mig.destroy(question.destroy))
            if question.mode is not None:
                return Reply(to=to, completed=mig.set_mode(question.mode))
            if question.look:
                return Reply(to=to, state=mig_state(mig, self._migs, question.look))
        except self._nvml.NVMLError as error:
            in_use = isinstance(error, self._nvml.NVMLError_InUse)
            return Reply(to=to, refused=RefusedByDriver(reason=str(error), in_use=in_use))
        return Reply(to=to, snapshot=self.snapshot())

    def snapshot(self) -> Snapshot:
        """Read everything; a GPU that fails becomes an error message."""
        driver = self._nvml.nvmlSystemGetDriverVersion()
        handles, errors = self.handles()
        gpus = []
        for address, handle in handles.items():
            try:
                gpus.append(self._gpu(address, handle))
            except self._nvml.NVMLError as error:
                errors.append(f"cannot read GPU {address} through NVML: {error}")
        return Snapshot(driver_version=driver, gpus=tuple(gpus), errors=tuple(errors))

    def handles(self) -> tuple[dict[str, Any], list[str]]:
        """Return a handle for each GPU that answers, by PCI address, and an error message for each that does not."""
        found, errors = {}, []
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                found[self._address(handle)] = handle
            except self._nvml.NVMLError as error:
                errors.append(f"cannot read GPU number {index} through NVML: {error}")
        return found, errors

    def watch(self, tell: Callable[[Xid], None]) -> None:
        """Report each Xid through the callback; only an exception ends this."""
        events = self._nvml.nvmlEventSetCreate()
        try:
            for handle in self.handles()[0].values():
                self._if_supported(self._register, handle, events)
            while True:
                event = self._next_event(events)
                if event is not None:
                    tell(event)
        finally:
            self._nvml.nvmlEventSetFree(events)

    def _register(self, handle: Any, events: Any) -> None:
        supported = self._nvml.nvmlDeviceGetSupportedEventTypes(handle)
        self._nvml.nvmlDeviceRegisterEvents(handle, supported & self._nvml.nvmlEventTypeXidCriticalError, events)

    def _next_event(self, events: Any) -> Xid | None:
        try:
            data = self._nvml.nvmlEventSetWait_v2(events, _EVENT_WAIT_MS)
        except self._nvml.NVMLError_Timeout:
            return None
        if data.eventType != self._nvml.nvmlEventTypeXidCriticalError:
            return None
        instance = data.gpuInstanceId, data.computeInstanceId
        whole = _NO_INSTANCE in instance
        return Xid(pci_address=self._address(data.device), code=data.eventData, instance=None if whole else instance)

    def _gpu(self, address: str, handle: Any) -> NvGpu:
        nvml, optional = self._nvml, self._if_supported
        memory = optional(nvml.nvmlDeviceGetMemoryInfo, handle)
        mode = optional(nvml.nvmlDeviceGetMigMode, handle)
        ecc = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        links = self._links(handle)
        rows = optional(nvml.nvmlDeviceGetRemappedRows, handle)  # corrected, uncorrected, pending, failed
        uuid = nvml.nvmlDeviceGetUUID(handle)
        fabric, probe = self._condition.fabric(handle)
        profiles = self._mig_control.profiles(uuid, handle) if mode and mode[0] else ()
        return NvGpu(
            pci_address=address,
            uuid=uuid,
            name=nvml.nvmlDeviceGetName(handle),
            minor=optional(nvml.nvmlDeviceGetMinorNumber, handle),
            memory_bytes=memory.total if memory is not None else None,
            mig_enabled=bool(mode and mode[0]),
            migs=self._migs(handle) if mode and mode[0] else (),
            mig_pending=bool(mode[1]) if mode else None,
            profiles=profiles,
            instances=self._mig_control.instances(handle, profiles) if mode and mode[0] else (),
            processes=self._mig_control.processes(handle) if mode else None,
            nvlinks=self._peers(handle, links),
            nvlinks_active=tuple(link for link, active in links.items() if active),
            nvlinks_inactive=tuple(link for link, active in links.items() if not active),
            fabric=fabric,
            ecc_uncorrected=optional(nvml.nvmlDeviceGetTotalEccErrors, handle, *ecc),
            rows_pending=bool(rows[2]) if rows is not None else None,
            rows_failed=bool(rows[3]) if rows is not None else None,
            condition=msgspec.structs.replace(self._condition.read(handle, rows), fabric=probe),
        )

    def _migs(self, handle: Any) -> tuple[Mig, ...]:
        found = []
        for index in range(self._nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                found.append(self._mig(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)))
            except self._nvml.NVMLError_NotFound:
                continue  # slots of instances that have not been created
        return tuple(found)

    def _mig(self, handle: Any) -> Mig:
        name = self._nvml.nvmlDeviceGetName(handle)
        profile = re.search(r"MIG (\S+)$", name)
        return Mig(
            uuid=self._nvml.nvmlDeviceGetUUID(handle),
            profile=profile[1] if profile else name,
            memory_bytes=self._nvml.nvmlDeviceGetMemoryInfo(handle).total,
            gpu_instance=self._nvml.nvmlDeviceGetGpuInstanceId(handle),
            compute_instance=self._nvml.nvmlDeviceGetComputeInstanceId(handle),
            ecc_uncorrected=self._condition.instance_errors(handle),
        )

    def _links(self, handle: Any) -> dict[int, bool]:
        """Return whether each link is active. The numbering has gaps where a link is not wired."""
        found: dict[int, bool] = {}
        for link in range(_NVLINKS):
            try:
                found[link] = bool(self._nvml.nvmlDeviceGetNvLinkState(handle, link))
            except self._nvml.NVMLError_InvalidArgument:
                break  # beyond the last link of this GPU
            except self._nvml.NVMLError_NotSupported:
                continue
        return found

    def _peers(self, handle: Any, links: Mapping[int, bool]) -> dict[str, int]:
        """Return the number of active links by remote PCI address."""
        counts: Counter[str] = Counter()
        for link in (link for link, active in links.items() if active):
            remote = self._if_supported(self._nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
            if remote is not None:
                counts[sysfs_address(_text(remote.busId))] += 1
        return dict(counts)

    def _address(self, handle: Any) -> str:
        return sysfs_address(_text(self._nvml.nvmlDeviceGetPciInfo(handle).busId))

    def _if_supported(self, ask: Callable[..., T], *args: object) -> T | None:
        try:
            return ask(*args)
        except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_FunctionNotFound):
            return None


class Helper:
    """One loop for questions, one thread for events."""

    def __init__(self, questions: BinaryIO, answers: BinaryIO, root: Path, *, by_loader: bool) -> None:
        self._questions, self._answers = questions, answers
        self._root, self._by_loader = root, by_loader
        self._one_at_a_time = threading.Lock()
        self._nvml: Nvml | None = None

    def run(self) -> None:
        """Answer until the questions end."""
        while (question := read_frame(self._questions)) is not None:
            self._send(self._answer(msgspec.json.decode(question, type=Question)))

    def _answer(self, question: Question) -> Reply:
        import pynvml

        to = question.ask
        try:
            if self._nvml is None:
                if failure := load(self._root, by_loader=self._by_loader):
                    return Reply(to=to, failure=failure)
                self._nvml = Nvml(pynvml)
                threading.Thread(target=self._events, args=(self._nvml,), daemon=True).start()
            return self._nvml.answer(question)
        except (pynvml.NVMLError, ValueError, UnicodeError) as error:
            return Reply(to=to, failure=Failure(absent=False, reason=f"NVML failed: {error}"))

    def _events(self, nvml: Nvml) -> None:
        """Watch for events. If the event set fails (a GPU was lost), create a new one with the remaining GPUs."""
        import pynvml

        pause = threading.Event()
        while True:
            try:
                nvml.watch(lambda xid: self._send(Reply(xid=xid)))
            except pynvml.NVMLError_NotSupported:
                return
            except pynvml.NVMLError:
                pause.wait(_EVENT_RETRY_S)

    def _send(self, reply: Reply) -> None:
        frame = msgspec.json.encode(reply)
        with self._one_at_a_time:
            self._answers.write(LENGTH.pack(len(frame)) + frame)
            self._answers.flush()


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def main() -> None:
    """Serve the parent, and die with it even inside a call that never returns. The argument is the root below which the
    library is searched if the loader does not find it; with --only-root the loader is not asked."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library's own output must not get between the frames
    with contextlib.suppress(BrokenPipeError):  # the parent is dead, and so is this process in a moment
        Helper(sys.stdin.buffer, answers, Path(sys.argv[1]), by_loader="--only-root" not in sys.argv).run()


if __name__ == "__main__":
    main()
