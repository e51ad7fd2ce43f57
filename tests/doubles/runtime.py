"""FakeRuntime: a container runtime's side of NRI, a real unix socket, as strict as containerd's own.

Written without the plugin's framing, so that what both got wrong alike would show. It reads as containerd does: into a
buffer of 4,096 bytes, failing where a frame does not fit. What a plugin does against the contract is kept as a
ContractViolation and raised when the runtime is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeVar

from google.protobuf.message import Message

from nodeagent.pb import nri_pb2 as pb
from nodeagent.pb import ttrpc_pb2
from tests.support.until import News

PLUGIN, RUNTIME = 1, 2
REQUEST, RESPONSE, DATA = 1, 2, 3
BUFFER_BYTES = 4096
LARGEST_BYTES = 4 << 20
VALID_EVENTS = (1 << (pb.LAST - 1)) - 1
_SERVICE = "nri.pkg.api.v1alpha1"
M = TypeVar("M", bound=Message)


class ContractViolation(AssertionError):  # noqa: N818
    """A plugin did what a runtime does not allow."""


class DroppedError(Exception):
    """The plugin is not connected, or was dropped while it was asked."""


class PluginRefusedError(Exception):
    """The plugin answered with an error: what keeps a container from being created."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Packet(NamedTuple):
    """One ttrpc message."""

    stream: int
    type: int
    flags: int
    data: bytes


def packed(connection: int, stream: int, kind: int, data: bytes = b"", flags: int = 0) -> bytes:
    """A ttrpc message in one frame."""
    whole = struct.pack(">IIBB", len(data), stream, kind, flags) + data
    return struct.pack(">II", connection, len(whole)) + whole


class Wire:
    """One end of a trunk: packets out, packets in by logical connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.broken: ContractViolation | None = None
        self._reader = reader
        self._frames: dict[int, asyncio.Queue[bytes | None]] = {one: asyncio.Queue() for one in (PLUGIN, RUNTIME)}
        self._rest = {PLUGIN: b"", RUNTIME: b""}
        self._demux = asyncio.create_task(self._read())

    def send(self, connection: int, stream: int, kind: int, data: bytes = b"", flags: int = 0) -> None:
        self.writer.write(packed(connection, stream, kind, data, flags))

    async def receive(self, connection: int) -> Packet:
        """The next packet; EOFError once the peer has closed."""
        length, stream, kind, flags = struct.unpack(">IIBB", await self._exactly(connection, 10))
        return Packet(stream, kind, flags, await self._exactly(connection, length))

    async def close(self) -> None:
        self._demux.cancel()
        await asyncio.gather(self._demux, return_exceptions=True)
        self.writer.transport.abort()
        for queue in self._frames.values():
            queue.put_nowait(None)

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                connection, length = struct.unpack(">II", await self._reader.readexactly(8))
                if connection not in self._frames or length > LARGEST_BYTES + 10:
                    self.broken = ContractViolation(f"a frame of {length} bytes for connection {connection}")
                    break
                self._frames[connection].put_nowait(await self._reader.readexactly(length))
        for queue in self._frames.values():
            queue.put_nowait(None)

    async def _exactly(self, connection: int, wanted: int) -> bytes:
        """What a buffered reader of BUFFER_BYTES gives: large reads go past the buffer."""
        found = b""
        while len(found) < wanted:
            missing = wanted - len(found)
            if not self._rest[connection]:
                room = max(missing, BUFFER_BYTES)
                frame = await self._frames[connection].get()
                if frame is None:
                    raise EOFError
                if len(frame) > room:
                    self.broken = ContractViolation(f"cannot allocate memory: {len(frame)} bytes, room for {room}")
                    raise EOFError
                self._rest[connection] = frame
            found += self._rest[connection][:missing]
            self._rest[connection] = self._rest[connection][missing:]
        return found


class _Plugin:
    """One connected plugin, as the runtime knows it."""

    def __init__(self, wire: Wire, runtime: FakeRuntime) -> None:
        self.wire = wire
        self.events = 0
        self.name = ""
        self.registered = asyncio.Event()
        self.gone = False
        self._runtime = runtime
        self._pending: dict[int, asyncio.Future[ttrpc_pb2.Response]] = {}
        self._next, self._last = 1, 0
        self.tasks = [asyncio.create_task(self._answers()), asyncio.create_task(self._requests())]

    async def call(self, method: str, request: Message, kind: type[M]) -> M:
        if self.gone:
            raise DroppedError(f"{method}: ttrpc: closed")
        timeout_s = self._runtime.request_timeout_s
        stream, self._next = self._next, self._next + 2
        answer = self._pending[stream] = asyncio.get_running_loop().create_future()
        call = ttrpc_pb2.Request(
            service=f"{_SERVICE}.Plugin",
            method=method,
            payload=request.SerializeToString(),
            timeout_nano=int(timeout_s * 1e9),
        )
        self.wire.send(PLUGIN, stream, REQUEST, call.SerializeToString())
        try:
            async with asyncio.timeout(self._runtime.gives_up_s.get(method, timeout_s)):
                response = await answer
        except TimeoutError:
            await self._runtime.late(self, method)
            raise DroppedError(f"{method}: deadline exceeded") from None
        if response.status.code:
            raise PluginRefusedError(response.status.code, response.status.message)
        return kind.FromString(response.payload)

    async def _answers(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                packet = await self.wire.receive(PLUGIN)
                answer = self._pending.pop(packet.stream, None)
                if packet.type != RESPONSE or packet.flags or answer is None:
                    self._runtime.violated(f"{packet} answers nothing")
                elif not answer.done():
                    answer.set_result(ttrpc_pb2.Response.FromString(packet.data))
        self._gone()

    async def _requests(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                packet = await self.wire.receive(RUNTIME)
                if packet.stream % 2 != 1 or packet.stream <= self._last or packet.type != REQUEST or packet.flags:
                    self._runtime.violated(f"{packet} is no call of a new stream")
                self._last = packet.stream
                request = ttrpc_pb2.Request.FromString(packet.data)
                response = await self._runtime.serve(self, request)
                self.wire.send(RUNTIME, packet.stream, RESPONSE, response.SerializeToString())
        self._gone()

    def _gone(self) -> None:
        self.gone = True
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(DroppedError("ttrpc: closed"))
                answer.exception()
        self._runtime.lost(self)


class FakeRuntime:
    """An async context manager: entered, it serves at `socket`; left, it stops and raises what the plugin did wrong."""

    def __init__(self, folder: Path, *, name: str = "containerd", request_timeout_s: float = 2.0) -> None:
        self.socket = folder / "nri.sock"
        self.name = name
        self.request_timeout_s = request_timeout_s
        self.old = False
        """Like containerd 1.7: what needs no answer comes as StateChange."""
        self.prefix = "id-"
        """Of containers' ids, before the name that they have here."""
        self.chunk = 10_000
        """Pods and containers in one part of a synchronization."""
        self.synchronize_after: asyncio.Event | None = None
        self.gives_up_s: dict[str, float] = {}
        """How long it really waits for the answer to a method, where that is not what it says."""
        self.starts_anyway = False
        """Whether it starts a container that the plugin refuses to have started, as CRI-O does."""
        self.forgives_late = False
        """Whether a late answer has its consequences without being held against the plugin."""
        self.forgotten: list[_Plugin] = []
        """Plugins that are not asked any longer while their connections stay open, as containerd 1.7 does with one that
        was late to answer Synchronize."""
        self.pods: dict[str, pb.PodSandbox] = {}
        self.containers: dict[str, pb.Container] = {}
        self.violations: list[ContractViolation] = []
        self.connections = 0
        self.plugin: _Plugin | None = None
        self._server: asyncio.Server | None = None
        self._starting: set[asyncio.Task[None]] = set()
        self._news = News()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        await self.stop()
        if self.violations and kind is None:
            raise self.violations[0]

    async def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, str(self.socket))

    async def stop(self) -> None:
        """As a runtime that is killed: its socket's file stays."""
        if self._server is not None:
            self._server.close()
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        await self.drop("")
        for plugin in self.forgotten:
            await plugin.wire.close()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return once `holds()`, which is asked after every change here."""
        await self._news.until(holds)

    async def connected(self, times: int = 1) -> None:
        """Return once a plugin is synchronized that is at least the `times`th to connect."""
        await self.until(lambda: self.plugin is not None and self.connections >= times)

    # What happens on the node

    def add(
        self,
        name: str,
        *,
        pod: str = "pod",
        cpus: str = "",
        env: Iterable[str] = (),
        cgroup: str = "",
        called: str = "",
        pages: Mapping[str, int] = MappingProxyType({}),
        **fields: Any,
    ) -> pb.Container:
        """A container that exists, or is to be created; its pod comes with it. pages: kubelet's limits in bytes, by
        size as the kernel names it, "2MB"."""
        uid = f"uid-{pod}"
        self.pods.setdefault(
            f"sandbox-{pod}", pb.PodSandbox(id=f"sandbox-{pod}", uid=uid, name=pod, namespace="default")
        )
        limits = [pb.HugepageLimit(page_size=size, limit=limit) for size, limit in pages.items()]
        resources = pb.LinuxResources(cpu=pb.LinuxCPU(cpus=cpus), hugepage_limits=limits)
        linux = pb.LinuxContainer(resources=resources, cgroups_path=cgroup or f"/kubepods/{uid}/{self.prefix}{name}")
        fields.setdefault("state", pb.CONTAINER_RUNNING)
        found = pb.Container(
            id=f"{self.prefix}{name}",
            name=called or name,
            pod_sandbox_id=f"sandbox-{pod}",
            env=list(env),
            linux=linux,
            **fields,
        )
        self.containers[found.id] = found
        return found

    def cpus(self, name: str) -> str:
        """What a container is confined to."""
        return self.containers[f"{self.prefix}{name}"].linux.resources.cpu.cpus

    async def create(self, name: str, **fields: Any) -> pb.CreateContainerResponse:
        """PluginRefusedError, with nothing created, where the plugin says so. Without a plugin none is asked."""
        container = self.add(name, state=pb.CONTAINER_CREATED, **fields)
        try:
            answer = await self.ask(
                pb.CREATE_CONTAINER, "CreateContainer", self._of(pb.CreateContainerRequest, container)
            )
        except PluginRefusedError:
            del self.containers[container.id]
            raise
        answer = answer or pb.CreateContainerResponse()
        container.linux.resources.cpu.MergeFrom(answer.adjust.linux.resources.cpu)
        self._apply(answer.update, created=container.id)
        return answer

    async def stop_container(self, name: str) -> None:
        container = self.containers[f"{self.prefix}{name}"]
        container.state = pb.CONTAINER_STOPPED
        answer = await self.ask(pb.STOP_CONTAINER, "StopContainer", self._of(pb.StopContainerRequest, container))
        self._apply(answer.update if answer else ())

    async def remove_container(self, name: str) -> None:
        container = self.containers.pop(f"{self.prefix}{name}")
        await self._tell(pb.REMOVE_CONTAINER, "RemoveContainer", self._of(pb.RemoveContainerRequest, container))

    async def start_container(self, name: str) -> None:
        """PluginRefusedError, and the container does not run, where the plugin says so before it does."""
        container = self.containers[f"{self.prefix}{name}"]
        container.state = pb.CONTAINER_CREATED
        ignored = (PluginRefusedError,) if self.starts_anyway else ()
        with contextlib.suppress(*ignored):
            await self._tell(pb.START_CONTAINER, "StartContainer", self._of(pb.StartContainerRequest, container))
        container.state = pb.CONTAINER_RUNNING
        await self.started(name)

    async def started(self, name: str) -> None:
        """Tell that a container runs."""
        container = self.containers[f"{self.prefix}{name}"]
        await self._tell(
            pb.POST_START_CONTAINER, "PostStartContainer", self._of(pb.PostStartContainerRequest, container)
        )

    async def pod_event(self, event: pb.Event, pod: str) -> None:
        names = {pb.RUN_POD_SANDBOX: "Run", pb.STOP_POD_SANDBOX: "Stop", pb.REMOVE_POD_SANDBOX: "Remove"}
        request = pb.RunPodSandboxRequest(pod=self.pods[f"sandbox-{pod}"])
        await self._tell(event, f"{names[event]}PodSandbox", request)

    async def resize(self, name: str, resources: pb.LinuxResources) -> None:
        """Kubelet's UpdateContainerResources: what the plugin says of the container itself comes on top."""
        container = self.containers[f"{self.prefix}{name}"]
        request = self._of(pb.UpdateContainerRequest, container)
        request.linux_resources.CopyFrom(resources)
        answer = await self.ask(pb.UPDATE_CONTAINER, "UpdateContainer", request)
        container.linux.resources.MergeFrom(resources)
        self._apply(answer.update if answer else ())

    async def ask(self, event: pb.Event, method: str, request: Message) -> Any:
        """What the plugin answers; None where there is none, it did not ask for the event, or it is forgiven for being
        late: a runtime goes on without an answer then."""
        plugin = self.plugin
        if plugin is None or not plugin.events & (1 << (event - 1)):
            return None
        try:
            return await plugin.call(method, request, getattr(pb, f"{method}Response"))
        except DroppedError:
            if not self.forgives_late:
                raise
        return None

    async def _tell(self, event: pb.Event, method: str, request: Any) -> None:
        if not self.old:
            await self.ask(event, method, request)
        elif self.plugin is not None and self.plugin.events & (1 << (event - 1)):
            container = getattr(request, "container", None)
            change = pb.StateChangeEvent(event=event, pod=request.pod, container=container)
            await self.plugin.call("StateChange", change, pb.Empty)

    def _of(self, kind: Any, container: pb.Container) -> Any:
        return kind(pod=self.pods[container.pod_sandbox_id], container=container)

    def _apply(self, updates: Iterable[pb.ContainerUpdate], created: str = "") -> None:
        """Containers that are not there are passed over."""
        for update in updates:
            if update.container_id == created:
                self.violated(f"update of {created} during its creation")
            elif update.container_id in self.containers:
                self.containers[update.container_id].linux.resources.cpu.MergeFrom(update.linux.resources.cpu)
        self._news.tell()

    # The plugin's connection

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._starting.add(task)
        self.connections += 1
        plugin = _Plugin(Wire(reader, writer), self)
        try:
            await self._introduce(plugin)
        except DroppedError:
            pass
        except (PluginRefusedError, TimeoutError) as error:
            self.violated(f"the plugin could not be started: {error!r}")
        finally:
            self._starting.discard(task)
            if self.plugin is not plugin and plugin not in self.forgotten:
                await plugin.wire.close()

    async def _introduce(self, plugin: _Plugin) -> None:
        async with asyncio.timeout(5):
            await plugin.registered.wait()
        request = pb.ConfigureRequest(
            runtime_name=self.name,
            runtime_version="2.0",
            registration_timeout=5000,
            request_timeout=int(self.request_timeout_s * 1e3),
        )
        answer = await plugin.call("Configure", request, pb.ConfigureResponse)
        plugin.events = answer.events or VALID_EVENTS
        if plugin.events & ~VALID_EVENTS:
            self.violated(f"invalid plugin events 0x{answer.events:x}")
        if self.synchronize_after is not None:
            await self.synchronize_after.wait()
        await self._synchronize(plugin)
        self.plugin = plugin
        self._news.tell()

    async def _synchronize(self, plugin: _Plugin) -> None:
        pods, containers = list(self.pods.values()), list(self.containers.values())
        while True:
            more = max(len(pods), len(containers)) > self.chunk
            request = pb.SynchronizeRequest(pods=pods[: self.chunk], containers=containers[: self.chunk], more=more)
            answer = await plugin.call("Synchronize", request, pb.SynchronizeResponse)
            if not more:
                self._apply(answer.update)
                return
            if answer.update or not answer.more:
                self.violated("the plugin does not take a list in parts")
            pods, containers = pods[self.chunk :], containers[self.chunk :]

    async def serve(self, plugin: _Plugin, request: ttrpc_pb2.Request) -> ttrpc_pb2.Response:
        """The Runtime service."""
        if request.service != f"{_SERVICE}.Runtime":
            return ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=12, message=f"service {request.service}"))
        if request.method == "RegisterPlugin":
            asked = pb.RegisterPluginRequest.FromString(request.payload)
            if not re.fullmatch(r"[a-zA-Z0-9_.+-]+", asked.plugin_name) or not re.fullmatch(
                "[0-9]{2}", asked.plugin_idx
            ):
                self.violated(f"invalid plugin {asked}")
            plugin.registered.set()
            return ttrpc_pb2.Response()
        return ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=12, message=f"method {request.method}"))

    def forget(self) -> None:
        """The plugin is asked no more, and its connection stays open."""
        if self.plugin is not None:
            self.forgotten.append(self.plugin)
        self.plugin = None

    async def drop(self, why: str) -> None:
        """Close the plugin's connection; `why`, if it is its fault."""
        plugin, self.plugin = self.plugin, None
        if why:
            self.violated(why)
        if plugin is not None:
            await plugin.wire.close()
            self._news.tell()

    async def late(self, plugin: _Plugin, method: str) -> None:
        """A plugin did not answer in time: it is dropped, but after Synchronize only forgotten."""
        if not self.forgives_late:
            self.violated(f"{method} was not answered within {self.request_timeout_s} s")
        if method == "Synchronize":
            self.forgotten.append(plugin)
            self._news.tell()
        elif plugin is self.plugin:
            await self.drop("")

    def lost(self, plugin: _Plugin) -> None:
        if plugin.wire.broken is not None:
            self.violations.append(plugin.wire.broken)
        plugin.wire.writer.transport.abort()
        if plugin is self.plugin:
            self.plugin = None
        self._news.tell()

    def violated(self, what: str) -> None:
        self.violations.append(ContractViolation(what))
