"""FakeDraKubelet: kubelet's side of plugin registration, DRA and the health of its devices, as strict as the real one.

It stands alongside FakeKubelet on the same folder and shares nothing with it. What a plugin does against the contract
is kept in `violations` and raised when the kubelet is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import stat
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import grpc
from asyncinotify import Inotify, Mask

from nodeagent.pb import dra_v1_pb2, dra_v1beta1_pb2, drahealth_v1_pb2, drahealth_v1alpha1_pb2
from nodeagent.pb import pluginregistration_pb2 as pb
from tests.oracles.endpoints import wrong_with_endpoint
from tests.pb import dra_v1_pb2_grpc, dra_v1beta1_pb2_grpc, drahealth_v1_pb2_grpc, drahealth_v1alpha1_pb2_grpc
from tests.pb import pluginregistration_pb2_grpc as rpc
from tests.support.until import News

DIAL_S, GET_INFO_S, NOTIFY_S, CALL_S = 10.0, 1.0, 5.0, 45.0
FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.0
"""Of a registration; kubelet's own are ten times as long and more."""
DEFAULT_HEALTH_S = 30.0
V1, V1BETA1 = "v1.DRAPlugin", "v1beta1.DRAPlugin"
HEALTH_V1, HEALTH_V1ALPHA1 = "v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth"
NEWEST_FIRST = (V1, V1BETA1, HEALTH_V1, HEALTH_V1ALPHA1)
UNKNOWN, HEALTHY, UNHEALTHY = "UNKNOWN", "HEALTHY", "UNHEALTHY"

_CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)

_STUBS: Mapping[str, tuple[ModuleType, Callable[[Any], Any]]] = {
    V1: (dra_v1_pb2, dra_v1_pb2_grpc.DRAPluginStub),
    V1BETA1: (dra_v1beta1_pb2, dra_v1beta1_pb2_grpc.DRAPluginStub),
    HEALTH_V1: (drahealth_v1_pb2, drahealth_v1_pb2_grpc.DRAResourceHealthStub),
    HEALTH_V1ALPHA1: (drahealth_v1alpha1_pb2, drahealth_v1alpha1_pb2_grpc.DRAResourceHealthStub),
}
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DRIVER = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_CDI_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z][A-Za-z0-9_-]*=[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?")
_REQUEST = re.compile(rf"{_LABEL}(/{_LABEL})?")


class DraViolation(AssertionError):  # noqa: N818
    """A plugin did what kubelet does not allow."""


class DraCallError(Exception):
    """A call failed as a whole, or there is no plugin to call: no claim of it got an answer."""

    def __init__(self, why: str, code: grpc.StatusCode | None = None) -> None:
        super().__init__(why)
        self.code = code


@dataclass(frozen=True, slots=True)
class ClaimId:
    """A claim as kubelet names it; anything with these three fields will do."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class DraDevice:
    """One prepared device as it came. share_id: None where it was not set."""

    requests: tuple[str, ...]
    pool: str
    device: str
    cdi_ids: tuple[str, ...]
    share_id: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer for one claim."""

    devices: tuple[DraDevice, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Health of one device as it was last said."""

    health: str
    message: str
    until_s: float


@dataclass(eq=False)
class Plugin:
    """One registered instance of a driver."""

    driver: str
    endpoint: Path
    service: str
    channel: grpc.aio.Channel
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    connected: bool = False

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.channel.close(None)


class FakeDraKubelet:
    """An async context manager: entered, it watches; left, it stops and raises what the plugins did wrong."""

    def __init__(
        self,
        folder: Path,
        *,
        services: Sequence[str] = (V1, V1BETA1),
        health_service: str = HEALTH_V1ALPHA1,
        health_retry_s: float = 0.2,
        retry_s: tuple[float, float] = (FIRST_RETRY_S, LAST_RETRY_S),
        seed: int = 0,
    ) -> None:
        """`folder` stands for /var/lib/kubelet, `services` for what this kubelet knows; no `health_service`: it does
        not ask for health. The real one opens the stream of health again every 5 s; `retry_s`: how long it first and at
        last waits after a registration that failed, before it tries the same path again; `seed` fixes in which order
        a start finds the sockets.
        """
        self.registry = folder / "plugins_registry"
        self.state_file = folder / "dra_manager_state"
        self._prepared: dict[str, tuple[Any, str]] = {}
        """Claims and their drivers by UID: from before the call that prepares them to after the one that does not."""
        self.violations: list[DraViolation] = []
        self.plugins: dict[str, list[Plugin]] = {}
        """By driver, in the order of registration."""
        self.registrations: dict[str, int] = {}
        """How often each driver was registered and knows it."""
        self.get_info_s: list[float] = []
        """How long each GetInfo took."""
        self._services = services
        self._health_service = health_service
        self._health_retry_s = health_retry_s
        self._random = random.Random(seed)
        self._refusals: dict[str, float] = {}
        self._silences: dict[str, float] = {}
        self._retry_s = retry_s
        self._waits: dict[Path, tuple[float, float]] = {}
        """By path, whatever socket is there: how long it waits after the next failure, and until when it waits now."""
        self._health: dict[str, dict[tuple[str, str], DeviceState]] = {}
        self._lists: dict[str, int] = {}
        self._age_s = 0.0
        self._wanted: dict[Path, object] = {}
        self._actual: dict[Path, tuple[object, Plugin]] = {}
        self._keepers: dict[Path, asyncio.Task[None]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._news = News()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.stop()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what the plugins did against the contract so far."""
        if self.violations:
            raise ExceptionGroup("plugins broke the contract", self.violations)

    # Its life

    async def start(self) -> None:
        """Make the folder, watch it, and register every socket that is there already."""
        self.registry.mkdir(parents=True, exist_ok=True)
        self._write_state()
        inotify = Inotify()
        inotify.add_watch(self.registry, Mask.CREATE | Mask.MOVED_TO | Mask.DELETE)
        self._watcher = asyncio.create_task(self._watch(inotify))
        found = sorted(self.registry.iterdir())
        self._random.shuffle(found)
        for path in found:
            self._came(path)

    async def stop(self) -> None:
        """Hang up on every plugin without a word, as a kubelet does that is killed."""
        tasks = [one for one in (self._watcher, *self._keepers.values()) if one is not None]
        self._watcher = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._keepers.clear()
        for plugin in [one for some in self.plugins.values() for one in some]:
            await plugin.close()
        self.plugins.clear()
        self._wanted.clear()
        self._waits.clear()
        self._actual.clear()
        self._health.clear()
        self._news.tell()

    async def restart(self) -> None:
        """Stop and start: every socket that is there is registered again."""
        await self.stop()
        await self.start()

    def refuse(self, driver: str, times: float = float("inf")) -> None:
        """Fail the next `times` registrations of a driver; 0 ends that."""
        self._refusals[driver] = times

    def give_up_on(self, driver: str, times: float = float("inf")) -> None:
        """Fail the next `times` registrations of a driver without a verdict, as where a busy node is too slow for
        kubelet's deadline; 0 ends that."""
        self._silences[driver] = times

    async def cut_streams(self, driver: str) -> None:
        """Hang up on every instance of a driver and connect again: what a broken connection looks like."""
        for path, (mark, plugin) in list(self._actual.items()):
            if plugin.driver == driver:
                await self._deregister(path)
                self._wanted[path] = mark
                self._keep(path)

    # What it shows

    def instances(self, driver: str) -> list[Path]:
        """The endpoints that are registered, in the order of registration."""
        return [one.endpoint for one in self.plugins.get(driver, ())]

    def chosen(self, driver: str) -> Plugin:
        """Whom it would call: the most recently registered that is connected. DraCallError where there is none."""
        some = self.plugins.get(driver, [])
        if not some:
            raise DraCallError(f"DRA driver {driver} is not registered")
        return next((one for one in reversed(some) if one.connected), some[-1])

    def health(self, driver: str) -> dict[tuple[str, str], tuple[str, str]]:
        """(health, message) by pool and device; what is too old is UNKNOWN."""
        now = time.monotonic() + self._age_s
        return {
            key: (one.health, one.message) if now <= one.until_s else (UNKNOWN, "")
            for key, one in self._health.get(driver, {}).items()
        }

    def lists(self, driver: str) -> int:
        """How many lists of health came since this object was made."""
        return self._lists.get(driver, 0)

    def age(self, seconds: float) -> None:
        """Let so much time pass for what is known of health."""
        self._age_s += seconds

    async def wait_registered(self, driver: str, times: int = 1) -> None:
        """Return once a driver was registered `times` times since this object was made, and all is connected."""
        await self.until(lambda: self.registrations.get(driver, 0) >= times and self._connected(driver))

    async def wait_instances(self, driver: str, *endpoints: Path) -> None:
        """Return once these instances are registered and connected, in this order."""
        await self.until(lambda: self.instances(driver) == [*endpoints] and self._connected(driver))

    async def wait_health(self, driver: str, pool: str, device: str, health: str) -> None:
        """Return once a device's health is that; without an entry it is UNKNOWN."""
        await self.until(lambda: self.health(driver).get((pool, device), (UNKNOWN, ""))[0] == health)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return once `holds()`, which is asked after every change here."""
        await self._news.until(holds)

    def _connected(self, driver: str) -> bool:
        return all(one.connected for one in self.plugins.get(driver, ()))

    # Registration

    async def _watch(self, inotify: Inotify) -> None:
        with inotify:
            async for event in inotify:
                if event.mask & Mask.IGNORED or event.name is None:
                    continue  # a folder that comes back is not seen before the next start
                path = self.registry / event.name
                if event.mask & Mask.DELETE:
                    self._wanted.pop(path, None)
                    self._keep(path)
                else:
                    self._came(path)

    def _came(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not path.name.startswith(".") and stat.S_ISSOCK(path.stat().st_mode):
                self._wanted[path] = object()
                self._keep(path)

    def _keep(self, path: Path) -> None:
        """Begin to bring one socket into order, unless that is under way."""
        keeper = self._keepers.get(path)
        if keeper is None or keeper.done():
            self._keepers[path] = asyncio.create_task(self._settle(path))
        self._news.tell()

    async def _settle(self, path: Path) -> None:
        while True:
            mark = self._wanted.get(path)
            known = self._actual.get(path)
            if known is not None and known[0] is not mark:
                await self._deregister(path)
            elif mark is None or known is not None or await self._gone_meanwhile(path):
                return
            elif await self._register(path, mark):
                self._waits.pop(path, None)
            else:
                next_s, _ = self._waits.get(path, (self._retry_s[0], 0.0))
                self._waits[path] = min(2 * next_s, self._retry_s[1]), time.monotonic() + next_s

    async def _gone_meanwhile(self, path: Path) -> bool:
        """Wait as long as an earlier failure of this path demands; whether the socket is gone by then."""
        _, until_s = self._waits.get(path, (0.0, 0.0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until_s - time.monotonic()):
                await self.until(lambda: path not in self._wanted)
        return path not in self._wanted

    async def _register(self, path: Path, mark: object) -> bool:
        """One try; whether the plugin is registered now."""
        async with grpc.aio.insecure_channel(f"unix:{path}", options=_CHANNEL) as channel:
            stub = rpc.RegistrationStub(channel)
            try:
                async with asyncio.timeout(DIAL_S):
                    await self._dial(channel, path, mark)
                info = await self._get_info(stub)
                if self._counted(self._silences, info.name):
                    return False
                error = self._wrong_with_info(info)
                if error:
                    self._violation(f"{path.name}: {error}")
                error = error or self._refused(info) or self._no_place(info)
                if error:
                    await stub.NotifyRegistrationStatus(_status(error), timeout=NOTIFY_S)
                    return False
                self._add(path, mark, info)
                await self._notify(stub, path, info.name)
            except (TimeoutError, grpc.aio.AioRpcError):
                return False
        return path in self._actual

    async def _dial(self, channel: grpc.aio.Channel, path: Path, mark: object) -> None:
        """Return once connected; AioRpcError's part is taken by the next call where the socket was replaced."""
        state = channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY and self._wanted.get(path) is mark:
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=True)

    async def _get_info(self, stub: Any) -> pb.PluginInfo:
        begun = time.monotonic()
        try:
            info: pb.PluginInfo = await stub.GetInfo(pb.InfoRequest(), timeout=GET_INFO_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._violation(f"GetInfo takes more than {GET_INFO_S:g} s")
            raise
        self.get_info_s.append(time.monotonic() - begun)
        return info

    async def _notify(self, stub: Any, path: Path, driver: str) -> None:
        try:
            await stub.NotifyRegistrationStatus(_status(""), timeout=NOTIFY_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._violation(f"NotifyRegistrationStatus takes more than {NOTIFY_S:g} s")
            await self._deregister(path)
        else:
            self.registrations[driver] = self.registrations.get(driver, 0) + 1
            self._news.tell()

    def _wrong_with_info(self, info: pb.PluginInfo) -> str:
        endpoint, versions = Path(info.endpoint), [*info.supported_versions]
        unknown = [one for one in versions if one not in NEWEST_FIRST]
        if info.type != "DRAPlugin":
            return f"no handler registered for plugin type: {info.type}"
        if not _DRIVER.fullmatch(info.name) or len(info.name) > 63:
            return f"{info.name!r} is no name of a driver"
        if wrong := wrong_with_endpoint(info.endpoint):
            return wrong
        if not endpoint.is_socket():
            return f"endpoint {info.endpoint!r} is not the absolute path of a socket"
        if unknown or not versions:
            return f"supported versions {versions}: {unknown or 'none'}"
        if versions != sorted(set(versions), key=NEWEST_FIRST.index):
            return f"supported versions {versions} are not newest first"
        return ""

    def _refused(self, info: pb.PluginInfo) -> str:
        return f"{info.name} is refused on purpose" if self._counted(self._refusals, info.name) else ""

    def _counted(self, failures: dict[str, float], driver: str) -> bool:
        """Whether this registration of a driver is one that is to fail."""
        if failures.get(driver, 0) <= 0:
            return False
        failures[driver] -= 1
        return True

    def _no_place(self, info: pb.PluginInfo) -> str:
        if Path(info.endpoint) in self.instances(info.name):
            return f"endpoint {info.endpoint} already registered for DRA driver plugin {info.name}"
        if not set(self._services) & set(info.supported_versions):
            return f"none of {[*info.supported_versions]} are supported by the kubelet ({[*self._services]})"
        return ""

    def _add(self, path: Path, mark: object, info: pb.PluginInfo) -> None:
        service = next(one for one in info.supported_versions if one in self._services)
        channel = grpc.aio.insecure_channel(f"unix:{info.endpoint}", options=_CHANNEL)
        plugin = Plugin(info.name, Path(info.endpoint), service, channel)
        plugin.tasks.append(asyncio.create_task(self._follow_connection(plugin)))
        if self._health_service:
            plugin.tasks.append(asyncio.create_task(self._follow_health(plugin)))
        self._actual[path] = (mark, plugin)
        self.plugins.setdefault(info.name, []).append(plugin)
        self._news.tell()

    async def _deregister(self, path: Path) -> None:
        _, plugin = self._actual.pop(path, (None, None))
        if plugin is not None:
            self.plugins[plugin.driver].remove(plugin)
            await plugin.close()
            self._news.tell()

    async def _follow_connection(self, plugin: Plugin) -> None:
        while True:
            state = plugin.channel.get_state(try_to_connect=True)
            plugin.connected = state is grpc.ChannelConnectivity.READY
            self._news.tell()
            await plugin.channel.wait_for_state_change(state)

    def _violation(self, text: str) -> None:
        self.violations.append(DraViolation(text))
        self._news.tell()

    # Claims

    async def prepare(self, driver: str, claims: Sequence[Any], *, timeout_s: float = CALL_S) -> dict[str, Outcome]:
        """The answer for each claim by UID; DraCallError where none has one. Cancelled, it cancels the call."""
        self.remember(driver, claims)
        pb, stub = self._stub(driver)
        request = pb.NodePrepareResourcesRequest(claims=_claims(pb, claims))
        answer = await self._call(stub.NodePrepareResources, request, timeout_s)
        self._check_uids("NodePrepareResources", claims, answer.claims)
        for uid, one in answer.claims.items():
            for wrong in _wrong_with_claim(one):
                self._violation(f"NodePrepareResources: claim {uid}: {wrong}")
        return {uid: Outcome(tuple(map(_device, one.devices)), one.error) for uid, one in answer.claims.items()}

    async def unprepare(self, driver: str, claims: Sequence[Any], *, timeout_s: float = CALL_S) -> dict[str, str]:
        """The error for each claim by UID, "" where it is unprepared; DraCallError where none has an answer."""
        pb, stub = self._stub(driver)
        request = pb.NodeUnprepareResourcesRequest(claims=_claims(pb, claims))
        answer = await self._call(stub.NodeUnprepareResources, request, timeout_s)
        self._check_uids("NodeUnprepareResources", claims, answer.claims)
        self.forget(uid for uid, one in answer.claims.items() if not one.error)
        return {uid: one.error for uid, one in answer.claims.items()}

    def remember(self, driver: str, claims: Iterable[Any]) -> None:
        """Note on disk that claims are being prepared, before the driver is asked."""
        self._prepared.update({one.uid: (one, driver) for one in claims})
        self._write_state()

    def forget(self, uids: Iterable[str]) -> None:
        """Note on disk that claims are unprepared."""
        for uid in uids:
            self._prepared.pop(uid, None)
        self._write_state()

    def _write_state(self) -> None:
        """The shape of kubelet's own file; replaced whole."""
        claims = [
            {"ClaimUID": one.uid, "ClaimName": one.name, "Namespace": one.namespace, "DriverState": {driver: {}}}
            for one, driver in self._prepared.values()
        ]
        data = json.dumps({"kind": "DRACheckpoint", "ClaimInfoStateList": claims})
        draft = self.state_file.with_suffix(".new")
        draft.write_text(json.dumps({"Data": data, "Checksum": zlib.crc32(data.encode())}))
        draft.rename(self.state_file)

    def _stub(self, driver: str) -> tuple[Any, Any]:
        plugin = self.chosen(driver)
        pb, stub = _STUBS[plugin.service]
        return pb, stub(plugin.channel)

    async def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                self._violation(f"a call failed as a whole: {why}")
            raise DraCallError(why, error.code()) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise DraCallError("the plugin was deregistered during the call", grpc.StatusCode.CANCELLED) from None

    def _check_uids(self, call: str, claims: Sequence[Any], answered: Collection[str]) -> None:
        asked = {one.uid for one in claims}
        if asked != set(answered):
            missing, unasked = sorted(asked - set(answered)), sorted(set(answered) - asked)
            self._violation(f"{call}: skipped {missing}, result for unknown claim UID {unasked}")

    # Health

    async def _follow_health(self, plugin: Plugin) -> None:
        """One stream after the other; the end of one makes all that is known of the driver be forgotten."""
        _, stub = _STUBS[self._health_service]
        pb: Any = _STUBS[self._health_service][0]
        while True:
            try:
                async for message in stub(plugin.channel).NodeWatchResources(pb.NodeWatchResourcesRequest()):
                    self._take_health(plugin.driver, message, pb)
            except grpc.aio.AioRpcError:
                pass
            finally:
                self._health.pop(plugin.driver, None)
                self._news.tell()
            await asyncio.sleep(self._health_retry_s)

    def _take_health(self, driver: str, message: Any, pb: Any) -> None:
        known = self._health.setdefault(driver, {})
        reported = set()
        for one in message.devices:
            key = (one.device.pool_name, one.device.device_name)
            for wrong in _wrong_with_health(one, key in reported):
                self._violation(f"health of {key}: {wrong}")
            reported.add(key)
            seconds = one.health_check_timeout_seconds or DEFAULT_HEALTH_S
            until_s = time.monotonic() + self._age_s + seconds
            known[key] = DeviceState(pb.HealthStatus.Name(one.health), one.message, until_s)
        self._lists[driver] = self._lists.get(driver, 0) + 1
        self._news.tell()


def _status(error: str) -> pb.RegistrationStatus:
    return pb.RegistrationStatus(plugin_registered=not error, error=error)


def _claims(pb: Any, claims: Sequence[Any]) -> list[Any]:
    return [pb.Claim(namespace=one.namespace, uid=one.uid, name=one.name) for one in claims]


def _device(one: Any) -> DraDevice:
    shared = "share_id" in one.DESCRIPTOR.fields_by_name and one.HasField("share_id")
    return DraDevice(
        requests=tuple(one.request_names),
        pool=one.pool_name,
        device=one.device_name,
        cdi_ids=tuple(one.cdi_device_ids),
        share_id=one.share_id if shared else None,
    )


def _wrong_with_claim(one: Any) -> Iterator[str]:
    if one.error and one.devices:
        yield "both devices and an error"
    devices = [_device(device) for device in one.devices]
    if len({(device.pool, device.device, device.share_id) for device in devices}) != len(devices):
        yield "a device stands twice"
    for device in devices:
        yield from (f"{device}: {wrong}" for wrong in _wrong_with_device(device))


def _wrong_with_device(device: DraDevice) -> Iterator[str]:
    if not device.pool or not re.fullmatch(_LABEL, device.device):
        yield "no pool, or no DNS label for a device"
    if device.share_id == "":
        yield "the share id is set and empty"
    for one in device.requests:
        if not _REQUEST.fullmatch(one):
            yield f"{one!r} is no name of a request"
    for one in device.cdi_ids:
        if not _CDI_ID.fullmatch(one):
            yield f"{one!r} is no CDI device, expected vendor/class=name"


def _wrong_with_health(one: Any, before: bool) -> Iterator[str]:
    if not one.device.pool_name or not one.device.device_name:
        yield "no pool or no device"
    if before:
        yield "it stands twice in the list"
    if abs(time.time() - one.last_updated_time) > DEFAULT_HEALTH_S:
        yield f"last updated at {one.last_updated_time}, which is not now"
    if one.health_check_timeout_seconds < 0:
        yield f"a time-out of {one.health_check_timeout_seconds} s"
    if one.health == 0 and not one.message:
        yield "unknown, and it is not said why"
