"""NVML, queried through a helper process: a deadline per question; killed when late; restarted later.

Promises: every call returns by its deadline, with a value or the reason why there is none; the daemon never loads NVML
or its bindings; a missing or hanging library costs one process per back-off and nothing else. A Failure of a request
that changes something says nothing of its effect: it may have been carried out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator, Iterable, Mapping

import msgspec

from nodeagent.host.nvml.values import (
    LENGTH,
    Completed,
    Create,
    Destroy,
    Failure,
    Made,
    Mig,
    MigState,
    NvGpu,
    Question,
    RefusedByDriver,
    Reply,
    SetMode,
    Snapshot,
    Xid,
)
from nodeagent.host.pci import NVIDIA, Function

__all__ = ["Failure", "Mig", "NvGpu", "Probe", "Snapshot", "Xid", "has_nvidia"]
REQUEST_S = 10.0
"""Time limit of a request that changes something. Kubelet waits 45 s for a claim."""

_EVENTS_KEPT = 1000
_COMMAND = (sys.executable, "-m", "nodeagent.host.nvml.helper")


def has_nvidia(functions: Iterable[Function]) -> bool:
    """Return whether asking NVML makes sense: a display or 3D controller of NVIDIA exists."""
    return any(function.vendor == NVIDIA and function.is_class("03") for function in functions)


class _Helper(msgspec.Struct):
    """One running process, its unanswered questions, and the task that reads its answers."""

    process: asyncio.subprocess.Process
    waiting: dict[int, asyncio.Future[Reply]] = msgspec.field(default_factory=dict)
    reading: asyncio.Task[None] | None = None


class Probe:
    """The only client of NVML. Nothing starts before the first question; `close` ends the process. root: below which
    the library is searched if the loader does not find it, or is not to be asked (library.py)."""

    def __init__(
        self,
        *,
        env: Mapping[str, str] | None = None,
        root: str = "/",
        by_loader: bool = True,
        backoff_s: float = 1.0,
        longest_backoff_s: float = 60.0,
    ) -> None:
        self._env = {**os.environ, **(env or {})}
        self._command = (*_COMMAND, root, *([] if by_loader else ["--only-root"]))
        self._first_s, self._longest_s = backoff_s, longest_backoff_s
        self._backoff_s = backoff_s
        self._not_before = 0.0
        self._failure: Failure | None = None
        self._helper: _Helper | None = None
        self._asked = 0
        self._turn = asyncio.Lock()
        self._events: asyncio.Queue[Xid] = asyncio.Queue(_EVENTS_KEPT)

    @property
    def pid(self) -> int | None:
        """The helper's process id, or None while there is no helper."""
        return self._helper.process.pid if self._helper is not None else None

    async def snapshot(self, deadline_s: float = 5.0) -> Snapshot | Failure:
        """Return what NVML shows now, within the deadline. During a back-off, return the failure that started it."""
        reply = await self._answered(Question(ask=0), deadline_s)
        return reply.snapshot or _failure(reply)

    async def mig_state(self, gpu: str, deadline_s: float = 5.0) -> MigState | RefusedByDriver | Failure:
        """Return the instances of one GPU, given by its UUID."""
        reply = await self._answered(Question(ask=0, look=gpu), deadline_s)
        return reply.state or reply.refused or _failure(reply)

    async def create(self, one: Create, deadline_s: float = REQUEST_S) -> Made | RefusedByDriver | Failure:
        """Make a MIG instance, or complete one."""
        reply = await self._answered(Question(ask=0, create=one), deadline_s)
        return reply.made or reply.refused or _failure(reply)

    async def destroy(self, one: Destroy, deadline_s: float = REQUEST_S) -> Completed | RefusedByDriver | Failure:
        """Destroy a MIG instance; one that does not exist is no error."""
        reply = await self._answered(Question(ask=0, destroy=one), deadline_s)
        return reply.completed or reply.refused or _failure(reply)

    async def set_mode(self, one: SetMode, deadline_s: float = REQUEST_S) -> Completed | RefusedByDriver | Failure:
        """Switch a GPU into or out of MIG mode."""
        reply = await self._answered(Question(ask=0, mode=one), deadline_s)
        return reply.completed or reply.refused or _failure(reply)

    async def _answered(self, question: Question, deadline_s: float) -> Reply:
        async with self._turn:
            if self._failure is not None and asyncio.get_running_loop().time() < self._not_before:
                return Reply(failure=self._failure)
            reply = await self._ask(question, deadline_s)
            await self._judge(reply.failure)
            return reply

    async def events(self) -> AsyncGenerator[Xid, None]:
        """Yield each Xid as it happens, across restarts of the helper, from the first snapshot on. If nothing reads
        them, the oldest are dropped."""
        while True:
            yield await self._events.get()

    async def close(self) -> None:
        """Kill the helper and wait for its end. A later question starts a new one."""
        helper, self._helper = self._helper, None
        if helper is None:
            return
        with contextlib.suppress(ProcessLookupError):
            helper.process.kill()
        if helper.reading is not None:
            await helper.reading
        if helper.process.stdin is not None:
            helper.process.stdin.close()
        await helper.process.wait()

    async def _ask(self, question: Question, deadline_s: float) -> Reply:
        try:
            async with asyncio.timeout(deadline_s):
                return await self._question(question)
        except TimeoutError:
            return Reply(failure=Failure(absent=False, reason=f"NVML did not answer within {deadline_s:g} s"))
        except OSError as error:
            return Reply(failure=Failure(absent=False, reason=f"cannot start the NVML helper: {error}"))

    async def _question(self, question: Question) -> Reply:
        helper = self._helper = self._helper or await self._start()
        self._asked += 1
        answer = helper.waiting[self._asked] = asyncio.get_running_loop().create_future()
        frame = msgspec.json.encode(msgspec.structs.replace(question, ask=self._asked))
        assert helper.process.stdin is not None
        helper.process.stdin.write(LENGTH.pack(len(frame)) + frame)
        reply: Reply = await answer
        return reply

    async def _start(self) -> _Helper:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, env=self._env)
        helper = _Helper(process)
        helper.reading = asyncio.create_task(self._read(helper), name="nvml-answers")
        return helper

    async def _read(self, helper: _Helper) -> None:
        """Deliver answers and events until the process ends; then answer all pending questions with a failure."""
        assert helper.process.stdout is not None
        try:
            while True:
                (length,) = LENGTH.unpack(await helper.process.stdout.readexactly(LENGTH.size))
                frame = await helper.process.stdout.readexactly(length)
                self._hand_out(helper, msgspec.json.decode(frame, type=Reply))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            ended = Reply(failure=Failure(absent=False, reason="the NVML helper ended without an answer"))
            for answer in helper.waiting.values():
                if not answer.done():
                    answer.set_result(ended)

    def _hand_out(self, helper: _Helper, reply: Reply) -> None:
        if reply.xid is not None:
            if self._events.full():
                self._events.get_nowait()
            self._events.put_nowait(reply.xid)
            return
        answer = helper.waiting.pop(reply.to, None)
        if answer is not None and not answer.done():
            answer.set_result(reply)

    async def _judge(self, failure: Failure | None) -> None:
        """Record the outcome and the back-off. After a failure the process is killed: it may hang, or hold a library
        that is being replaced."""
        if failure is None:
            self._failure, self._backoff_s = None, self._first_s
            return
        await self.close()
        if failure.absent:
            self._backoff_s = self._longest_s
        self._failure = failure
        self._not_before = asyncio.get_running_loop().time() + self._backoff_s
        self._backoff_s = min(self._backoff_s * 2, self._longest_s)


def _failure(reply: Reply) -> Failure:
    return reply.failure or Failure(absent=False, reason="the NVML helper gave an empty answer")
