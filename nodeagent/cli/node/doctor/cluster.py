"""The cluster's side: rights in the API server, the Node's name, versions, and the clock that certificates need."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from nodeagent.cli.node.doctor.model import Check, Finding, failure, ok, skipped, unknown, warning
from nodeagent.cli.node.doctor.node import Node
from nodeagent.config.schema import Config
from nodeagent.errors import ConfigError, HostError, PeerError
from nodeagent.kube.apiserver.client import NODES, ApiResource, ApiServer, access
from nodeagent.kube.apiserver.lazy import is_configured
from nodeagent.managers.dra.manager import node_name

REVIEWS = ApiResource("authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", False)
WHOAMI = ApiResource("authentication.k8s.io", "v1", "selfsubjectreviews", "SelfSubjectReview", False)
DRA = "resource.k8s.io"
TOPOLOGY = "topology.node.k8s.io"
CALL_S = 3.0
NODE_USER = "system:node:"
DRIVER_RIGHTS = (1, 36)
"""From here on the status of devices in claims needs rights of its own."""
OLDEST, NEWEST = (1, 34), (1, 38)
"""Versions of Kubernetes that docs/compatibility.md has columns for."""
CONTAINERD = "containerd"
TESTED_RUNTIMES = {CONTAINERD: ((1, 7), (2, 99)), "cri-o": ((1, 36), (1, 36)), "crio": ((1, 36), (1, 36))}
"""First and last version. Kubelet has "cri-o", the program itself "crio"."""
TESTED = "containerd 1.7 and 2, and CRI-O 1.36"
VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
SLICES_FIX = "kubectl apply -k deploy"
_VERSION = re.compile(r"v?(\d+)\.(\d+)")
NO_API = skipped("no API server is configured (dra.kubeconfig), and this is no pod")


class Right(NamedTuple):
    """One thing that the agent does in the API server."""

    verb: str
    group: str
    resource: str
    subresource: str = ""
    name: str = ""

    def __str__(self) -> str:
        of = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return f"{self.verb} {of}"

    def review(self) -> dict[str, Any]:
        """Return the question whether the credentials have this right."""
        asked = {key: value for key, value in self._asdict().items() if value}
        if self.resource == "resourceclaims":
            asked["namespace"] = "default"
        return {"metadata": {}, "spec": {"resourceAttributes": {**asked, "group": self.group}}}


def rights(config: Config, node: str, kubernetes: tuple[int, int] | None = None) -> Iterator[Right]:
    """Yield the rights that a configuration needs (docs/operations.md, "Permissions in the API server").

    kubernetes: the version, or None if it is not known: then those that only newer ones ask for are left out."""
    if config.served_by_dra:
        yield from (Right(verb, DRA, "resourceslices") for verb in VERBS)
        yield Right("get", DRA, "resourceclaims")
        yield from (Right(verb, "", "nodes", name=node) for verb in ("get", "watch"))
    if config.served_by_dra and config.dra.binding_conditions:
        yield from (Right(verb, DRA, "resourceclaims") for verb in ("list", "watch"))
    if config.served_by_dra and config.dra.device_status:
        yield from (Right(verb, DRA, "resourceclaims", "status") for verb in ("update", "patch"))
        if (kubernetes or OLDEST) >= DRIVER_RIGHTS:
            verbs = ("associated-node:update", "associated-node:patch")
            yield from (Right(verb, DRA, "resourceclaims", "driver", config.dra.driver) for verb in verbs)
    if config.events.enabled:
        yield from (Right(verb, "events.k8s.io", "events") for verb in ("create", "patch"))
    if config.publish.node_labels:
        yield Right("patch", "", "nodes", name=node)
    if config.publish.node_resource_topology:
        yield from (Right(verb, TOPOLOGY, "noderesourcetopologies") for verb in ("get", "create", "patch", "delete"))


def _api(node: Node) -> ApiServer:
    """Return the API server as the agent would ask it. Raise PeerError if the credentials cannot be used."""
    try:
        return ApiServer(access(node.config.dra.kubeconfig or None), timeout_s=CALL_S)
    except ConfigError as error:
        raise PeerError(str(error)) from None


class Answers(NamedTuple):
    """What the API server says of the agent."""

    user: str
    denied: tuple[str, ...]


async def _ask(api: ApiServer, wanted: Iterable[Right]) -> Answers:
    try:
        try:
            said = await api.create(WHOAMI, {"metadata": {}})
            user = str(said.get("status", {}).get("userInfo", {}).get("username", ""))
        except PeerError as error:
            if error.status not in (403, 404):
                raise
            user = ""
        denied = [right for right in wanted if not await _allowed(api, right)]
        return Answers(user, tuple(map(str, denied)))
    finally:
        await api.close()


async def _allowed(api: ApiServer, right: Right) -> bool:
    status = (await api.create(REVIEWS, right.review())).get("status")
    return isinstance(status, dict) and status.get("allowed") is True


def _rights(node: Node) -> Finding:
    if not is_configured(node.config.dra.kubeconfig):
        return NO_API
    wanted = rights(node.config, node_name(node.config), _kubernetes(node))
    found = asyncio.run(_ask(_api(node), wanted))
    if not found.denied:
        return ok(f"{found.user or 'the credentials'} may do all that is configured")
    if found.user.startswith(NODE_USER):
        return unknown(
            f"{found.user} is a kubelet's account, of which the API server judges each object: in general it may not "
            f"{', '.join(found.denied)}"
        )
    return failure(
        f"{found.user or 'the credentials'} may not {', '.join(found.denied)}", "apply the roles", SLICES_FIX
    )


def _kubernetes(node: Node) -> tuple[int, int] | None:
    """Return the version of Kubernetes as far as this node's kubelet shows it, or None."""
    try:
        return _number(_said_version(node, "kubeletVersion"))
    except PeerError:
        return None


async def _get_node(api: ApiServer, name: str) -> dict[str, Any] | None:
    try:
        return await api.get(NODES, name)
    finally:
        await api.close()


def _node_object(node: Node) -> dict[str, Any] | None:
    """Return the Node object, or None if there is none. Raise PeerError if it cannot be read."""
    return asyncio.run(_get_node(_api(node), node_name(node.config)))


def _name(node: Node) -> Finding:
    name = node_name(node.config)
    if not is_configured(node.config.dra.kubeconfig):
        return skipped(f"the name {name} is not used without an API server")
    if _node_object(node) is not None:
        return ok(f"there is a Node {name}")
    return failure(f"there is no Node {name}", "set dra.nodeName, or $NODE_NAME", "kubectl get nodes")


def _said_version(node: Node, field: str) -> str:
    """Return a version that kubelet wrote into its Node, or "" if there is no Node or no API server."""
    found = _node_object(node) if is_configured(node.config.dra.kubeconfig) else None
    status = (found or {}).get("status")
    info = status.get("nodeInfo") if isinstance(status, dict) else None
    return str(info.get(field) or "") if isinstance(info, dict) else ""


def _version_of(node: Node, field: str, *names: str) -> str:
    """Return a version from the Node, or as the program that runs prints it; "" if neither shows it."""
    try:
        if said := _said_version(node, field):
            return said
    except PeerError:
        pass  # the checks above say why; the program is asked instead
    for one in node.running(*names):
        if (name := one.words[0].rpartition("/")[2]) in names:
            return f"{name}://{_printed(node.probes.output(_program(one.pid, one.words[0]), '--version'))}"
    return ""


def _program(pid: int, word: str) -> str:
    if word.startswith("/"):
        return word
    raise HostError(f"process {pid} runs {word!r} without saying where that is")


def _printed(text: str) -> str:
    found = re.search(r"v?\d+\.\d+[.\w+-]*", text)
    return found[0] if found else ""


def _number(text: str) -> tuple[int, int] | None:
    found = _VERSION.search(text.rpartition("://")[2])
    return (int(found[1][:6]), int(found[2][:6])) if found else None


def judged_kubelet(text: str, by_dra: bool) -> Finding:
    """Return whether a version of kubelet is one that docs/compatibility.md knows. by_dra: whether DRA is used."""
    number = _number(text)
    if number is None:
        return unknown(f"kubelet's version is {text[:60]!r}" if text else "no kubelet shows its version")
    shown, fix = f"kubelet is {text.rpartition('://')[2][:40]}", "see the table of versions"
    if number < OLDEST:
        short = f"{shown}: older than {OLDEST[0]}.{OLDEST[1]}"
        return failure(f"{short}, which DRA needs", fix) if by_dra else warning(f"{short}, not tested", fix)
    if number > NEWEST:
        return warning(f"{shown}: newer than {NEWEST[0]}.{NEWEST[1]}, not tested", fix)
    return ok(shown)


def judged_runtime(text: str) -> Finding:
    """Return whether a version such as containerd://2.1.0 is one that was tested."""
    name, number = text.partition("://")[0], _number(text)
    if number is None:
        return unknown(f"the runtime's version is {text[:60]!r}" if text else "no runtime shows its version")
    first, last = TESTED_RUNTIMES.get(name, (number, number))
    if name == CONTAINERD and number < first:
        return failure(f"the runtime is {text[:60]}: NRI and CDI need containerd 1.7", "upgrade containerd")
    if name not in TESTED_RUNTIMES or not first <= number <= last:
        return warning(f"the runtime is {text[:60]}; tested are {TESTED}", "look at pinning with care")
    return ok(f"the runtime is {text[:60]}")


def _kubelet_version(node: Node) -> Finding:
    return judged_kubelet(_version_of(node, "kubeletVersion", "kubelet"), bool(node.config.served_by_dra))


def _runtime_version(node: Node) -> Finding:
    return judged_runtime(_version_of(node, "containerRuntimeVersion", "containerd", "crio"))


def _clock(node: Node) -> Finding:
    if node.probes.clock_is_synchronised():
        return ok("the clock is synchronised")
    return warning(
        "the clock follows no other: certificates, and times in the audit and in Events, may be wrong",
        "run chrony or systemd-timesyncd",
        "timedatectl set-ntp true",
    )


CHECKS = (
    Check("cluster.rights", "operations.md#permissions-in-the-api-server", _rights, live=True, configuration=True),
    Check("cluster.node-name", "dra.md#on-the-host-with-systemd", _name, live=True, configuration=True),
    Check("cluster.kubelet-version", "compatibility.md#kubernetes-versions", _kubelet_version, live=True),
    Check("cluster.runtime-version", "pinning.md#what-it-needs", _runtime_version, live=True),
    Check("cluster.clock", "doctor.md#cluster", _clock, live=True),
)
