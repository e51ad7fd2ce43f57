"""FakeKubelet: kubelet's side of the device-plugin API, a real gRPC server on real sockets, as strict as the real one.

What a plugin does against the contract is kept as a ContractViolation and raised when the kubelet is left. Needs
nothing but gRPC and the package, so the demo uses it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc

from nodeagent.kube.kubelet.sockets import is_served
from nodeagent.pb import deviceplugin_pb2 as pb
from nodeagent.pb import podresources_pb2 as pods_pb
from tests.doubles.kubelet_plugins import AlreadyConnectedError, Endpoint, Version, table_of
from tests.pb import deviceplugin_pb2_grpc as rpc
from tests.pb import podresources_pb2_grpc as pods_rpc
from tests.support.until import News

CHECKPOINT = "kubelet_internal_checkpoint"
UNAWARE_S = 2.0
"""For so long a plugin may not have noticed that its socket was wiped; it gets an error and tries again."""
OVERTAKE_S = 0.5
"""For so long a Register may overtake the end of the stream of a server that is gone: they come on two connections."""
DIAL_S, PRE_START_S = 10.0, 30.0
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_EXTENDED_NAME = re.compile(rf"(?P<domain>{_LABEL}(\.{_LABEL})*)/[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?")


class ContractViolation(AssertionError):  # noqa: N818
    """A plugin did what kubelet does not allow."""


class RefusedOnPurposeError(Exception):
    """A registration was failed because the test asked for that."""


class AdmissionError(Exception):
    """A pod was not admitted: what kubelet shows as UnexpectedAdmissionError."""

    def __init__(self, why: str, code: grpc.StatusCode | None = None) -> None:
        super().__init__(why)
        self.code = code


@dataclass
class Pod:
    """An admitted pod: its devices and what the plugin answered, by container and resource."""

    namespace: str
    name: str
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    devices: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    responses: dict[str, dict[str, pb.ContainerAllocateResponse]] = field(default_factory=dict)
    init_containers: frozenset[str] = frozenset()
    """Those that are not sidecars."""
    claims: dict[str, list[str]] = field(default_factory=dict)
    """Names of the resource claims that each container uses; they are of the pod's namespace."""
    claimed: dict[str, list[pods_pb.ClaimResource]] = field(default_factory=dict)
    """What each container has through a claim called "other"."""

    def held(self, resource: str) -> set[str]:
        return {one for container in self.devices.values() for one in container.get(resource, ())}


class FakeKubelet:
    """An async context manager: entered, it serves; left, it stops and raises what the plugins did wrong."""

    def __init__(
        self, folder: Path, *, seed: int = 0, version: Version = Version.V1_37, clean_up_s: float = 0.02
    ) -> None:
        """`folder` stands for /var/lib/kubelet; `seed` fixes the order in which ids are handed to Allocate; what a
        stream's end entails happens `clean_up_s` later."""
        self.plugins_folder = folder / "device-plugins"
        self.socket = self.plugins_folder / "kubelet.sock"
        self.pod_resources_socket = folder / "pod-resources" / "kubelet.sock"
        self.violations: list[ContractViolation] = []
        self.registrations: dict[str, int] = {}
        self.pods: dict[tuple[str, str], Pod] = {}
        self.knows_pods = True
        """Whether the API server has told it of its pods; until then it lists none, whatever runs."""
        self._version = version
        self._clean_up_s = clean_up_s
        self._table = table_of(version)
        self._open: list[Endpoint] = []
        self._overtaken: list[tuple[Endpoint, float, str]] = []
        self._refusals: dict[str, float] = {}
        self._spoilt: dict[str, int] = {}
        self._held_dials: dict[str, asyncio.Event] = {}
        self._held_answers: dict[str, asyncio.Event] = {}
        self._going = asyncio.Event()
        self._wiped_at: dict[str, float] = {}
        self._admitting: list[Pod] = []
        self._servers: list[grpc.aio.Server] = []
        self._random = random.Random(seed)
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

    async def start(self, *, wipe: bool = True) -> None:
        """Empty the folder but for the checkpoint, read that, then listen: the order kubelet has."""
        self.plugins_folder.mkdir(parents=True, exist_ok=True)
        self.pod_resources_socket.parent.mkdir(parents=True, exist_ok=True)
        if wipe:
            self.wipe()
        self._restore()
        self._table = table_of(self._version)
        self._going.set()
        for path, add in ((self.pod_resources_socket, self._add_pod_resources), (self.socket, self._add_registration)):
            server = grpc.aio.server()
            add(server)
            server.add_insecure_port(f"unix:{path}")
            await server.start()
            self._servers.append(server)
        self._news.tell()

    async def stop(self, *, leave_socket: bool = False) -> None:
        """Hang up on every plugin and stop; `leave_socket` leaves a dead kubelet.sock, as a killed kubelet does."""
        aside = self.socket.with_name(".kubelet.sock")
        if leave_socket:
            self.socket.rename(aside)
        await asyncio.gather(*(server.stop(0) for server in self._servers))
        self._servers.clear()
        self._judge_streams(None, OVERTAKE_S / 5)
        await asyncio.gather(*(endpoint.close() for endpoint in self._open))
        self._open.clear()
        self._table = table_of(self._version)
        if leave_socket:
            aside.rename(self.socket)
        self._news.tell()

    async def restart(self, *, wipe: bool = True) -> None:
        """Stop and start; what pods hold is read back from the checkpoint."""
        await self.stop()
        await self.start(wipe=wipe)

    def wipe(self) -> None:
        """Delete every file in the folder but the checkpoint."""
        for path in self.plugins_folder.iterdir():
            if path.name != CHECKPOINT and not path.is_dir():
                self.lose(path)

    async def cut_streams(self) -> None:
        """Hang up on every plugin without a word, staying alive: what a broken connection looks like."""
        watchers = [endpoint.watcher for endpoint in self._open if endpoint.watcher is not None]
        for endpoint in self._open:
            endpoint.hang_up()
        await asyncio.gather(*watchers)

    def pause(self) -> None:
        """Stand still as after SIGSTOP: nothing is read or answered, connections stay."""
        self._going.clear()

    def resume(self) -> None:
        """Go on with what came meanwhile."""
        self._going.set()

    def hold_dials(self, resource: str) -> None:
        """Let Register wait before it dials back, until release()."""
        self._held_dials[resource] = asyncio.Event()

    def hold_answers(self, resource: str) -> None:
        """Serve Register, and withhold the answer until release()."""
        self._held_answers[resource] = asyncio.Event()

    def release(self, resource: str) -> None:
        """End what hold_dials() or hold_answers() began."""
        for held in (self._held_dials, self._held_answers):
            if event := held.pop(resource, None):
                event.set()

    def spoil(self, resource: str, times: int = 1) -> None:
        """Serve the next `times` Registers, and say all the same that they came twice."""
        self._spoilt[resource] = times

    def lose(self, path: Path) -> None:
        """Delete a plugin's socket by hand."""
        path.unlink(missing_ok=True)
        self._wiped_at[path.name] = time.monotonic()

    def refuse(self, resource: str, times: float = float("inf")) -> None:
        """Fail the next `times` registrations of a resource; 0 ends that."""
        self._refusals[resource] = times

    # What it shows

    @property
    def endpoints(self) -> Mapping[str, Endpoint]:
        """The plugin that is asked to allocate, by resource."""
        return self._table.endpoints

    def devices(self, resource: str) -> list[pb.Device]:
        """The newest list of a resource, in the order sent; none where its plugin is known to be gone."""
        return [*self._table.devices.get(resource, {}).values()]

    def healthy(self, resource: str) -> list[str]:
        """The ids of a resource that the node would show as allocatable, in the order sent."""
        return [one.ID for one in self.devices(resource) if one.health == "Healthy"]

    def allocatable(self, resource: str) -> int:
        """How many healthy devices the node would show."""
        return len(self.healthy(resource))

    def streams(self, resource: str) -> list[Endpoint]:
        """The plugins of a resource whose streams are open, as far as kubelet has read."""
        return [one for one in self.connections(resource) if not one.ended.is_set()]

    def connections(self, resource: str) -> list[Endpoint]:
        """The plugins of a resource that kubelet has still to clean up after, now or later."""
        return [one for one in self._open if one.resource == resource]

    def stranded(self) -> list[str]:
        """The paths that would still be shown as healthy after the end of what is served there."""
        return [str(one) for one in self._table.stranded()]

    async def wait_allocatable(self, resource: str, count: int) -> None:
        """Return once allocatable(resource) is `count`."""
        await self.until(lambda: self.allocatable(resource) == count)

    async def wait_registered(self, resource: str, times: int = 1) -> None:
        """Return once a resource was registered `times` times since this object was made."""
        await self.until(lambda: self.registrations.get(resource, 0) >= times)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return once `holds()`, which is asked after every change here."""
        await self._news.until(holds)

    # Registration

    def _add_registration(self, server: grpc.aio.Server) -> None:
        rpc.add_RegistrationServicer_to_server(_Registration(self), server)

    async def register(self, request: pb.RegisterRequest) -> None:
        """What Register does; raises ContractViolation, RefusedOnPurposeError where it was told to refuse, or
        AlreadyConnectedError."""
        await self._going.wait()
        self._check_registration(request)
        if self._refusals.get(request.resource_name, 0) > 0:
            self._refusals[request.resource_name] -= 1
            raise RefusedOnPurposeError(f"{request.resource_name} is refused on purpose")
        endpoint = Endpoint(request.resource_name, self.plugins_folder / request.endpoint)
        self._note_streams(endpoint)
        self._table.begin(endpoint)
        try:
            await self._connect(endpoint)
        except BaseException:
            self._table.failed(endpoint)
            await endpoint.close()
            raise
        self._take(endpoint)
        await _held(self._held_answers, request.resource_name)
        if self._spoilt.get(request.resource_name, 0) > 0:
            self._spoilt[request.resource_name] -= 1
            raise AlreadyConnectedError(f"device plugin already connected: {endpoint.path}")

    def _note_streams(self, endpoint: Endpoint) -> None:
        """No version bears a Register unharmed while the resource has a stream. Kubelet goes on."""
        for older in self.streams(endpoint.resource):
            why = f"{endpoint.resource}: Register of {endpoint.path.name} while {older.path.name} is watched"
            if is_served(older.path):
                self.violations.append(ContractViolation(why))
            else:
                self._overtaken.append((older, time.monotonic(), why))

    def _judge_streams(self, ended: Endpoint | None, within_s: float) -> None:
        """A violation where a stream did not end soon after the Register that overtook its end; None: none did."""
        now_s = time.monotonic()
        for noted in [one for one in self._overtaken if ended in (one[0], None)]:
            _, came_s, why = noted
            self._overtaken.remove(noted)
            if now_s - came_s > within_s:
                self.violations.append(ContractViolation(why))

    async def _connect(self, endpoint: Endpoint) -> None:
        await _held(self._held_dials, endpoint.resource)
        try:
            endpoint.options = await endpoint.stub.GetDevicePluginOptions(pb.Empty(), timeout=DIAL_S)
        except grpc.aio.AioRpcError as error:
            name = endpoint.path.name
            why = f"cannot dial {name} back inside Register: {error.details()}"
            if time.monotonic() - self._wiped_at.get(name, float("-inf")) < UNAWARE_S:
                raise RefusedOnPurposeError(why) from None
            raise ContractViolation(why) from None
        self._table.connected(endpoint)

    def _take(self, endpoint: Endpoint) -> None:
        self.registrations[endpoint.resource] = self.registrations.get(endpoint.resource, 0) + 1
        self._open.append(endpoint)
        endpoint.stream = endpoint.stub.ListAndWatch(pb.Empty())
        endpoint.watcher = asyncio.create_task(self._watch(endpoint))
        self._news.tell()

    def _check_registration(self, request: pb.RegisterRequest) -> None:
        name = _EXTENDED_NAME.fullmatch(request.resource_name)
        if request.version != "v1beta1":
            raise ContractViolation(f"version {request.version!r}, expected 'v1beta1'")
        if name is None or len(name["domain"]) > 253:
            raise ContractViolation(f"{request.resource_name!r} is no extended resource name")
        if name["domain"] == "kubernetes.io" or name["domain"].endswith(".kubernetes.io"):
            raise ContractViolation(f"{request.resource_name!r} is in kubelet's own domain")
        if not request.endpoint or "/" in request.endpoint or request.endpoint in (".", "..", "kubelet.sock"):
            raise ContractViolation(f"endpoint {request.endpoint!r} is not a plain file name")

    async def _watch(self, endpoint: Endpoint) -> None:
        """Follow one ListAndWatch stream; clean up a moment after its end."""
        try:
            async for message in endpoint.stream:
                await self._going.wait()
                self._table.devices[endpoint.resource] = self._checked_list(endpoint.resource, message)
                self._write_checkpoint()
                self._news.tell()
        except grpc.aio.AioRpcError:
            pass
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        await self._going.wait()
        endpoint.ended.set()
        self._judge_streams(endpoint, OVERTAKE_S)
        self._news.tell()
        await asyncio.sleep(self._clean_up_s)
        other = self._table.ended(endpoint)
        if other is not None and other is not endpoint:
            other.hang_up()
        self._open.remove(endpoint)
        await endpoint.channel.close(None)
        self._news.tell()

    def _checked_list(self, resource: str, message: pb.ListAndWatchResponse) -> dict[str, pb.Device]:
        good: dict[str, pb.Device] = {}
        for device in message.devices:
            for wrong in _wrong_with(device, good):
                self.violations.append(ContractViolation(f"{resource}: device {device.ID!r}: {wrong}"))
            good[device.ID] = device
        return good

    # Admission

    async def admit_pod(
        self,
        namespace: str,
        name: str,
        containers: Mapping[str, Mapping[str, int]],
        init_containers: Mapping[str, Mapping[str, int]] | None = None,
    ) -> Pod:
        """Give each container its counts of resources, init containers first; AdmissionError, with nothing kept."""
        if (namespace, name) in self.pods:
            raise AdmissionError(f"pod {namespace}/{name} exists")
        pod, reusable = Pod(namespace, name, init_containers=frozenset(init_containers or ())), dict[str, set[str]]()
        self._admitting.append(pod)
        try:
            for container, wants in (init_containers or {}).items():
                await self._admit_container(pod, container, wants, reusable)
                for resource, ids in pod.devices[container].items():
                    reusable.setdefault(resource, set()).update(ids)
            for container, wants in containers.items():
                await self._admit_container(pod, container, wants, reusable)
                for resource, ids in pod.devices[container].items():
                    reusable.get(resource, set()).difference_update(ids)
        finally:
            self._admitting.remove(pod)
        self.pods[namespace, name] = pod
        self._folder_of(pod).mkdir(parents=True, exist_ok=True)
        self._write_checkpoint()
        self._news.tell()
        return pod

    async def delete_pod(self, namespace: str, name: str) -> None:
        """Forget a pod and what it held. The checkpoint keeps it until it is written next, as kubelet's does."""
        pod = self.pods.pop((namespace, name))
        with contextlib.suppress(FileNotFoundError):
            self._folder_of(pod).rmdir()
        self._news.tell()

    def _folder_of(self, pod: Pod) -> Path:
        """Kubelet makes it once it has admitted a pod, and removes it when nothing of the pod is left."""
        return self.plugins_folder.parent / "pods" / pod.uid

    async def _admit_container(
        self, pod: Pod, container: str, wants: Mapping[str, int], reusable: Mapping[str, set[str]]
    ) -> None:
        pod.devices[container], pod.responses[container] = {}, {}
        for resource, count in wants.items():
            endpoint = self.endpoints.get(resource)
            if endpoint is None or endpoint.stopped:
                raise AdmissionError(f"cannot allocate unregistered device {resource}")
            chosen = await self._choose(endpoint, count, reusable.get(resource, set()))
            pod.devices[container][resource] = chosen
            pod.responses[container][resource] = await self._allocate(endpoint, chosen)
            if endpoint.options.pre_start_required:
                await self._call(
                    endpoint.stub.PreStartContainer(
                        pb.PreStartContainerRequest(devices_ids=chosen), timeout=PRE_START_S
                    )
                )

    async def _choose(self, endpoint: Endpoint, count: int, reusable: set[str]) -> list[str]:
        """Reused ids first, then the plugin's preference as far as it is allowed, then the own order."""
        healthy = self.healthy(endpoint.resource)
        reused = [one for one in healthy if one in reusable][:count]
        free = [one for one in healthy if one not in self._allocated(endpoint.resource)]
        missing = count - len(reused)
        if missing > len(free):
            raise AdmissionError(
                f"requested number of devices unavailable for {endpoint.resource}. Requested: {missing}, "
                f"Available: {len(free)}"
            )
        preferred: list[str] = []
        if 0 < missing < len(free) and endpoint.options.get_preferred_allocation_available:
            preferred = await self._prefer(endpoint, [*reused, *free], reused, count)
        taken = [one for one in dict.fromkeys([*preferred, *sorted(free)]) if one in free][:missing]
        chosen = [*reused, *taken]
        self._random.shuffle(chosen)
        return chosen

    async def _prefer(self, endpoint: Endpoint, available: list[str], must: list[str], count: int) -> list[str]:
        self._random.shuffle(available)
        request = pb.ContainerPreferredAllocationRequest(
            available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=count
        )
        answer = await self._call(
            endpoint.stub.GetPreferredAllocation(pb.PreferredAllocationRequest(container_requests=[request]))
        )
        return [*answer.container_responses[0].deviceIDs] if answer.container_responses else []

    async def _allocate(self, endpoint: Endpoint, ids: list[str]) -> pb.ContainerAllocateResponse:
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=ids)])
        answer = await self._call(endpoint.stub.Allocate(request))
        if not answer.container_responses:
            raise AdmissionError(f"no containers in the answer to Allocate of {endpoint.resource}")
        first: pb.ContainerAllocateResponse = answer.container_responses[0]
        return first

    async def _call(self, call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise AdmissionError(error.details() or error.code().name, error.code()) from None

    def _allocated(self, resource: str) -> set[str]:
        return {one for pod in (*self.pods.values(), *self._admitting) for one in pod.held(resource)}

    # The checkpoint

    def _write_checkpoint(self) -> None:
        """The shape of kubelet's own file; replaced whole."""
        entries = [
            {"PodUID": pod.uid, "ContainerName": container, "ResourceName": resource, "DeviceIDs": {"-1": sorted(ids)}}
            for pod in self.pods.values()
            for container, held in pod.devices.items()
            for resource, ids in held.items()
        ]
        registered = {name: self.healthy(name) for name in self.endpoints}
        data = {"Data": {"PodDeviceEntries": entries, "RegisteredDevices": registered}, "Checksum": 0}
        temporary = self.plugins_folder / f".{CHECKPOINT}.new"
        with contextlib.suppress(FileNotFoundError):
            temporary.write_text(json.dumps(data))
            temporary.rename(self.plugins_folder / CHECKPOINT)

    def _restore(self) -> None:
        """What pods hold is what the checkpoint says; the pods themselves are known from the API server."""
        try:
            entries = json.loads((self.plugins_folder / CHECKPOINT).read_text())["Data"]["PodDeviceEntries"]
        except FileNotFoundError:
            entries = []
        pods = {pod.uid: pod for pod in self.pods.values()}
        for pod in pods.values():
            pod.devices = {}
        for entry in entries:
            if entry["PodUID"] in pods:
                held = pods[entry["PodUID"]].devices.setdefault(entry["ContainerName"], {})
                held[entry["ResourceName"]] = [one for ids in entry["DeviceIDs"].values() for one in ids]

    # Pod resources

    def _add_pod_resources(self, server: grpc.aio.Server) -> None:
        pods_rpc.add_PodResourcesListerServicer_to_server(_PodResources(self), server)

    def pod_resources(self, pod: Pod) -> pods_pb.PodResources:
        """One pod as pod-resources shows it: without its init containers, though those hold devices too."""
        containers = [
            pods_pb.ContainerResources(
                name=name,
                devices=[one for item in held.items() for one in self.container_devices(*item)],
                dynamic_resources=[
                    pods_pb.DynamicResource(claim_namespace=pod.namespace, claim_name=claim)
                    for claim in pod.claims.get(name, ())
                ]
                + [
                    pods_pb.DynamicResource(
                        claim_namespace=pod.namespace, claim_name="other", claim_resources=pod.claimed[name]
                    )
                    for _ in pod.claimed.get(name, ())[:1]
                ],
            )
            for name, held in pod.devices.items()
            if name not in pod.init_containers
        ]
        return pods_pb.PodResources(name=pod.name, namespace=pod.namespace, containers=containers)

    def container_devices(self, resource: str, ids: Iterable[str]) -> Iterator[pods_pb.ContainerDevices]:
        """One entry for each set of NUMA nodes, as kubelet gives it."""
        known = {device.ID: device for device in self.devices(resource)}
        groups: dict[tuple[int, ...], list[str]] = {}
        for one in ids:
            nodes = tuple(node.ID for node in known[one].topology.nodes) if one in known else ()
            groups.setdefault(nodes, []).append(one)
        for nodes, members in groups.items():
            topology = pods_pb.TopologyInfo(nodes=[pods_pb.NUMANode(ID=node) for node in nodes]) if nodes else None
            yield pods_pb.ContainerDevices(resource_name=resource, device_ids=members, topology=topology)


async def _held(holds: Mapping[str, asyncio.Event], resource: str) -> None:
    if event := holds.get(resource):
        await event.wait()


def _wrong_with(device: pb.Device, before: Mapping[str, pb.Device]) -> Iterator[str]:
    nodes = [node.ID for node in device.topology.nodes]
    if not 1 <= len(device.ID) <= 63:
        yield f"the id has {len(device.ID)} characters, expected 1 to 63"
    if device.ID in before:
        yield "the id stands twice"
    if device.health not in ("Healthy", "Unhealthy"):
        yield f"health {device.health!r}"
    if any(node < 0 for node in nodes) or len(set(nodes)) != len(nodes):
        yield f"NUMA nodes {nodes}"


class _Registration(rpc.RegistrationServicer):
    def __init__(self, kubelet: FakeKubelet) -> None:
        self._kubelet = kubelet

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.Empty:  # noqa: N802
        try:
            await self._kubelet.register(request)
        except ContractViolation as violation:
            self._kubelet.violations.append(violation)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(violation))
        except (RefusedOnPurposeError, AlreadyConnectedError) as error:
            await context.abort(grpc.StatusCode.UNKNOWN, str(error))
        return pb.Empty()


class _PodResources(pods_rpc.PodResourcesListerServicer):
    def __init__(self, kubelet: FakeKubelet) -> None:
        self._kubelet = kubelet

    async def List(  # noqa: N802
        self, request: pods_pb.ListPodResourcesRequest, context: Any
    ) -> pods_pb.ListPodResourcesResponse:
        known = self._kubelet.pods.values() if self._kubelet.knows_pods else ()
        pods = [self._kubelet.pod_resources(pod) for pod in known]
        return pods_pb.ListPodResourcesResponse(pod_resources=pods)

    async def GetAllocatableResources(  # noqa: N802
        self, request: pods_pb.AllocatableResourcesRequest, context: Any
    ) -> pods_pb.AllocatableResourcesResponse:
        devices = [
            entry
            for name in self._kubelet.endpoints
            for entry in self._kubelet.container_devices(name, self._kubelet.healthy(name))
        ]
        return pods_pb.AllocatableResourcesResponse(devices=devices)

    async def Get(  # noqa: N802
        self, request: pods_pb.GetPodResourcesRequest, context: Any
    ) -> pods_pb.GetPodResourcesResponse:
        pod = self._kubelet.pods.get((request.pod_namespace, request.pod_name))
        if pod is not None:
            return pods_pb.GetPodResourcesResponse(pod_resources=self._kubelet.pod_resources(pod))
        text = f"pod {request.pod_name} in namespace {request.pod_namespace} not found"
        return await context.abort(grpc.StatusCode.NOT_FOUND, text)
