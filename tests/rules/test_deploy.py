"""The manifests: every name in them is the one that the rest of the program uses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest
import yaml
from msgspec.structs import replace

from nodeagent.cli import VERBS
from nodeagent.cli.shared.ask import SOCKET
from nodeagent.config.load import parse
from nodeagent.config.schema import DEFAULT_RESOURCES, Config
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.cpu_pool import CpuPool, PoolKind
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.memory_pools import MemoryPool, PagePool
from nodeagent.core.dra.pool import ALL_FEATURES, PoolDevice
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.core.model.options import OPTIONS
from nodeagent.core.model.topology import DRAM, MEMORY_KINDS
from nodeagent.core.opaque.decode import FORMS
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.kube.resourceslice.render import Owner, pool_name
from tests.builders.inventories import even_rows, inventory_of
from tests.support.paths import CHECKOUT

FOLDER = CHECKOUT / "deploy"
DRIVER, ACCOUNT = "nodeagent.dev", "nodeagent"
PARAMETERS = "parameters.nodeagent.dev"
"""The policy that concerns users instead of the agent."""
MIB = 1 << 20
TOPOLOGY = {"cpu", "hugepages", "memory"}
KINDS = {*TOPOLOGY, *(kind.name for kind in builtin_kinds())}

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the manifests lie in the checkout")


class Strict(yaml.SafeLoader):
    """A key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key stands twice among {keys}"
        return super().construct_mapping(node, deep)


def documents(name: str = "*.yaml") -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(FOLDER.glob(name)):
        for document in yaml.load_all(path.read_text(), Strict):
            yield path.name, document


def all_of(kind: str) -> list[dict[str, Any]]:
    return [document for _, document in documents() if document["kind"] == kind]


def only(kind: str) -> dict[str, Any]:
    (found,) = all_of(kind)
    return found


def pod() -> dict[str, Any]:
    found: dict[str, Any] = only("DaemonSet")["spec"]["template"]["spec"]
    return found


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    assert isinstance(found, dict)
    return found


# ---------------------------------------------------------------- all of them


def test_every_document_is_an_object_with_a_name_of_its_own() -> None:
    found = [(one["kind"], one["metadata"]["name"]) for _, one in documents() if one["apiVersion"]]
    assert len(found) == len(set(found)) > 15


def test_kustomize_applies_every_file_the_namespace_first() -> None:
    listed = only("Kustomization")["resources"]
    assert sorted(listed) == sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
    assert "Namespace" in [one["kind"] for name, one in documents(listed[0])]


def test_everything_that_lies_in_a_namespace_lies_in_ours() -> None:
    for _, one in documents():
        namespace = one["metadata"].get("namespace")
        lies_in_one = one["kind"] in ("ServiceAccount", "ConfigMap", "DaemonSet")
        assert namespace == (only("Namespace")["metadata"]["name"] if lies_in_one else None), one["metadata"]


# ---------------------------------------------------------------- what the agent may do


def test_one_account_has_the_role_is_narrowed_and_runs_the_agent() -> None:
    account = only("ServiceAccount")["metadata"]
    (subject,) = only("ClusterRoleBinding")["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    assert only("ClusterRoleBinding")["roleRef"]["name"] == only("ClusterRole")["metadata"]["name"]
    assert pod()["serviceAccountName"] == account["name"]
    user = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    narrowing = [one for one in all_of("ValidatingAdmissionPolicy") if one["metadata"]["name"] != PARAMETERS]
    assert len(narrowing) == 2
    for policy in narrowing:
        (condition,) = policy["spec"]["matchConditions"]
        assert condition["expression"] == f'request.userInfo.username == "{user}"'


def test_the_policy_of_parameters_knows_every_kind_key_and_option_of_the_driver() -> None:
    """What each of them means is compared on a real API server (tests/e2e/test_admission_e2e.py)."""
    (policy,) = [one for one in all_of("ValidatingAdmissionPolicy") if one["metadata"]["name"] == PARAMETERS]
    spec = policy["spec"]
    variables = {one["name"]: one["expression"] for one in spec["variables"]}
    known = {name: [one.encode_name for one in msgspec.structs.fields(form)] for name, form in FORMS.items()}
    assert json.loads(variables["keys"]) == known
    (options,) = [one["expression"] for one in spec["validations"] if "list of options" in one["message"]]
    assert set(re.findall(r'"([a-z-]+)"', options)) == OPTIONS.keys()
    (rule,) = spec["matchConstraints"]["resourceRules"]
    assert rule["resources"] == ["resourceclaims", "resourceclaimtemplates", "deviceclasses"]


def test_the_role_is_what_the_agent_does_and_no_more() -> None:
    rules = {
        (group, resource): set(rule["verbs"])
        for rule in only("ClusterRole")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    api = "resource.k8s.io"
    write = {"create", "update", "patch", "delete", "deletecollection"}
    assert rules == {
        (api, "resourceslices"): {"get", "list", "watch", *write},
        (api, "resourceclaims"): {"get"},
        (api, "resourceclaims/status"): {"update", "patch"},
        (api, "resourceclaims/driver"): {"associated-node:update", "associated-node:patch"},
        ("events.k8s.io", "events"): {"create", "patch"},
        ("", "nodes"): {"get", "watch"},
    }
    (named,) = [rule for rule in only("ClusterRole")["rules"] if "resourceNames" in rule]
    assert (named["resources"], named["resourceNames"]) == (["resourceclaims/driver"], [DRIVER])


def enforced(name: str, resource: str, *operations: str) -> tuple[dict[str, str], list[str]]:
    """The variables and the validations of an admission policy that is in force, fails closed, and uses all of its
    variables."""
    (policy,) = [one for one in all_of("ValidatingAdmissionPolicy") if one["metadata"]["name"] == name]
    (binding,) = [one for one in all_of("ValidatingAdmissionPolicyBinding") if one["metadata"]["name"] == name]
    assert binding["spec"] == {"policyName": name, "validationActions": ["Deny"]}
    spec = policy["spec"]
    assert spec["failurePolicy"] == "Fail"
    (rule,) = spec["matchConstraints"]["resourceRules"]
    assert sorted(rule["operations"]) == sorted(operations)
    assert (rule["apiGroups"], rule["apiVersions"], rule["resources"]) == (["resource.k8s.io"], ["*"], [resource])
    variables = {one["name"]: one["expression"] for one in spec["variables"]}
    assert "authentication.kubernetes.io/node-name" in variables["node"]
    expressions = [one["expression"] for one in spec["validations"]]
    assert expressions[0] == 'variables.node != ""', "a token without a node may write nothing"
    used = {name for text in (*expressions, *variables.values()) for name in re.findall(r"variables\.(\w+)", text)}
    assert used == variables.keys()
    return variables, expressions


def test_every_write_of_a_slice_is_held_against_the_node_of_the_token() -> None:
    variables, expressions = enforced(f"slices.{DRIVER}", "resourceslices", "CREATE", "UPDATE", "DELETE")
    assert {"object", "oldObject"} <= set(re.findall(r"\w+", variables["slices"]))
    assert f'slice.spec.driver == "{DRIVER}"' in expressions[-1]


def test_an_agent_writes_the_status_of_its_own_nodes_devices_and_nothing_else_of_a_claim() -> None:
    """Before Kubernetes 1.36 the role alone would let each agent write the whole status of every claim."""
    variables, expressions = enforced(f"claims.{DRIVER}", "resourceclaims/status", "UPDATE")
    assert {"before", "after"} <= set(re.findall(r"variables\.(\w+)", variables["changed"]))
    _, rest, driver, node = expressions
    for part in ("allocation", "reservedFor"):
        assert f"object.?status.?{part} == oldObject.?status.?{part}" in rest
    assert driver == f'variables.changed.all(one, one.driver == "{DRIVER}")'
    prefix = pool_name(Owner(driver=DRIVER, node_name="NODE"), "").replace("NODE", "")
    assert f'one.pool.startsWith(variables.node + "{prefix}")' in node, "as the agent names its pools"
    assert "variables.allocated.exists(" in node


# ---------------------------------------------------------------- the pod


def test_the_shipped_configuration_is_the_default() -> None:
    (name, text), *more = only("ConfigMap")["data"].items()
    assert not more
    assert parse(text, source=name) == Config()
    command = container()["command"]
    assert command[:2] == ["nodeagent", "run"] and "run" in VERBS
    config = next(one for one in container()["volumeMounts"] if one["name"] == "config")
    assert command[2:] == ["--config", f"{config['mountPath']}/{name}"]


def test_the_probes_ask_with_a_verb_there_is() -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        program, verb, option, path = container()[probe]["exec"]["command"]
        assert program == "nodeagent" and verb in VERBS
        assert (option, path) == ("--socket", SOCKET)


def test_an_agent_that_answers_late_is_not_restarted() -> None:
    """Where a node is short of CPU, starting the program that asks takes most of the time."""
    waits = [container()[one]["timeoutSeconds"] for one in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert min(waits) >= 30 and waits[-1] >= 60


def test_the_folders_of_the_configuration_are_the_hosts_own_and_can_be_written_to() -> None:
    config = Config()
    places = {one["name"]: one.get("hostPath", {}).get("path") for one in pod()["volumes"]}
    mounts = {one["mountPath"]: one for one in container()["volumeMounts"]}
    assert {one["name"] for one in mounts.values()} == places.keys()
    for path, mount in mounts.items():
        assert places[mount["name"]] in (path, None), "a path in the agent's answers is the host's"
    kubelet = config.kubelet_dir
    written = {
        config.state_dir,
        config.runtime_dir,
        "/var/run/cdi",
        *("/var/run/nri", "/sys/fs/cgroup", "/run/systemd"),
        *(f"{kubelet}/{one}" for one in ("device-plugins", "plugins_registry", f"plugins/{DRIVER}")),
    }
    assert written == {path for path, one in mounts.items() if places[one["name"]] and not one.get("readOnly")}
    assert {"/sys", "/dev", "/run/udev", kubelet} <= mounts.keys()


def test_a_folder_or_file_that_a_node_lacks_does_not_keep_the_agent_from_starting() -> None:
    """Only what every node has is asked for: kubelet's folder, /sys with control groups, /dev. No single file is
    mounted: one that is replaced would not be seen either."""
    asked = {one["hostPath"]["path"]: one["hostPath"]["type"] for one in pod()["volumes"] if "hostPath" in one}
    there = {path for path, how in asked.items() if how != "DirectoryOrCreate"}
    assert there == {Config().kubelet_dir, "/sys", "/sys/fs/cgroup", "/dev"}
    assert {asked[path] for path in there} == {"Directory"}


def test_what_kubelet_unmounts_in_its_folder_is_not_held_by_the_pod() -> None:
    """A mount that a pod has taken over without propagation keeps the volume's device busy on the host."""
    above = Config().kubelet_dir
    (mount,) = [one for one in container()["volumeMounts"] if one["mountPath"] == above]
    assert (mount["mountPropagation"], mount["readOnly"]) == ("HostToContainer", True)


def test_the_pod_sees_what_the_unit_sees_of_the_host() -> None:
    """The kernel's events, and kubelet's command line."""
    assert (pod()["hostNetwork"], pod()["hostPID"]) == (True, True)


def test_the_pod_can_do_no_more_than_the_unit() -> None:
    found = container()["securityContext"]
    unit = (FOLDER.parent / "systemd" / "nodeagent.service").read_text()
    (capabilities,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert {f"CAP_{one}" for one in found["capabilities"]["add"]} == set(capabilities.split())
    assert found["capabilities"]["drop"] == ["ALL"]
    assert (found["privileged"], found["allowPrivilegeEscalation"], found["readOnlyRootFilesystem"]) == (
        False,
        False,
        True,
    )
    (memory,) = re.findall(r"^MemoryMax=(\d+M)$", unit, re.MULTILINE)
    assert container()["resources"]["limits"]["memory"] == f"{memory}i"


def test_a_node_is_never_without_an_agent_during_a_rolling_change() -> None:
    spec = only("DaemonSet")["spec"]
    assert spec["updateStrategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert not [port for port in container().get("ports", ()) if "hostPort" in port]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_two_agents_on_a_node_know_themselves_apart() -> None:
    told = {one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"] for one in container()["env"]}
    assert told == {"NODE_NAME": "spec.nodeName", "POD_UID": "metadata.uid"}


def test_the_image_is_the_one_that_is_built_here_and_kustomize_can_replace_it() -> None:
    """No registry is asked for a namesake where it is missing."""
    name, _, tag = container()["image"].partition(":")
    assert name == "localhost/nodeagent"
    assert only("Kustomization")["images"] == [{"name": name, "newTag": tag}]


# ---------------------------------------------------------------- device classes

CLAUSES = (
    (re.compile(r'device\.driver == "([^"]+)"'), lambda device, value: value == DRIVER),
    (
        re.compile(rf'device\.attributes\["{DRIVER}"\]\.(\w+) == "([^"]+)"'),
        lambda device, name, value: device.attributes[name] == value,
    ),
    (re.compile(rf'has\(device\.attributes\["{DRIVER}"\]\.(\w+)\)'), lambda device, name: name in device.attributes),
    (
        re.compile(rf'!has\(device\.attributes\["{DRIVER}"\]\.(\w+)\)'),
        lambda device, name: name not in device.attributes,
    ),
)


def matches(expression: str, device: PoolDevice) -> bool:
    """What the scheduler finds; like it, an attribute that is not there is an error, unless asked for with has()."""
    for clause in (one.strip() for one in expression.split("&&")):
        ((groups, meaning),) = [(p.fullmatch(clause), m) for p, m in CLAUSES if p.fullmatch(clause)]
        assert groups is not None
        if not meaning(device, *groups.groups()):
            return False
    return True


KIND_OF_CLASS = {"vf": "nic", "gpu-part": "gpu", "gpu-group": "gpu"}
"""Of classes that are not called like their kind."""


def classes() -> Mapping[str, str]:
    """The expression of each class by its short name."""
    found = {}
    for one in all_of("DeviceClass"):
        (selector,) = one["spec"]["selectors"]
        name, _, domain = one["metadata"]["name"].partition(".")
        assert domain == DRIVER
        found[name] = selector["cel"]["expression"]
    return found


def published() -> dict[str, list[PoolDevice]]:
    """What a machine with two NUMA nodes, pages and one device of each kind shows, by kind."""
    devices = [Device(kind=kind, id=f"{kind}-0", numa_node=0) for kind in sorted(KINDS - {*TOPOLOGY, "nic"})]
    devices += [Device(kind="nic", id=f"nic-{role}", attributes={"sriov": role}) for role in ("pf", "vf")]
    devices += [Device(kind="nic", id="nic-plain"), Device(kind="gpu", id="gpu-0/mig-1-0", parent="gpu-0")]
    devices += [Device(kind="gpu", id="gpus-2", attributes={"group": 2, "members": "gpu-0,gpu-1"})]
    pages = {(node, 2 * MIB): 8 for node in (0, 1)}
    found = sorted(devices, key=lambda one: (one.kind, one.id))
    inventory = inventory_of(even_rows(1, 2, 2, 4, 2), pages=pages, devices=found)
    pools: list[PoolKind] = [CpuPool(), PagePool(sizes=(2 * MIB,)), MemoryPool()]
    pools += [
        DevicePool(
            kind=kind,
            resources=(
                DeviceResource(name=f"{DRIVER}/{kind}", kind=kind),
                DeviceResource(name=f"{DRIVER}/{kind}-set", kind=kind, match={"group": "?*"}),
            ),
        )
        for kind in sorted(KINDS - TOPOLOGY)
    ]
    return {pool.kind: list(pool.pool(inventory, Ledger(), NO_HEALTH, ALL_FEATURES).devices) for pool in pools}


def test_each_class_finds_the_devices_of_its_kind_and_no_others() -> None:
    shown = published()
    assert all(shown.values())
    for name, expression in classes().items():
        found = {kind for kind, devices in shown.items() for one in devices if matches(expression, one)}
        assert found == {KIND_OF_CLASS.get(name, name)}
    for name, wanted in (("gpu", "gpu-0"), ("gpu-part", "gpu-0/mig-1-0"), ("gpu-group", "gpus-2")):
        assert [one.part.device for one in shown["gpu"] if matches(classes()[name], one)] == [wanted]
    functions = [one.attributes.get("sriov") for one in shown["nic"] if matches(classes()["vf"], one)]
    assert functions == ["vf"]


@pytest.mark.parametrize("kind", [one for one in MEMORY_KINDS if one != DRAM])
def test_no_class_finds_special_memory(kind: str) -> None:
    inventory = inventory_of(even_rows(1, 1, 1, 2, 1), more_nodes=[1], pages={(node, 2 * MIB): 8 for node in (0, 1)})
    nodes = (replace(node, kind=kind if node.id else DRAM) for node in inventory.numa_nodes)
    inventory = replace(inventory, numa_nodes=tuple(nodes))
    for pool in (PagePool(sizes=(2 * MIB,)), MemoryPool()):
        ordinary, special = pool.pool(inventory, Ledger(), NO_HEALTH, ALL_FEATURES).devices
        assert [name for name, one in classes().items() if matches(one, ordinary)] == [pool.kind]
        assert [name for name, one in classes().items() if matches(one, special)] == []


def test_there_is_a_class_for_every_kind_and_for_parts_and_virtual_functions() -> None:
    assert classes().keys() == {*KINDS, *KIND_OF_CLASS}


def test_a_class_stands_for_the_device_plugins_resource_of_the_same_kind() -> None:
    """One device is one unit: neither CPUs, pages and memory, nor what several containers share."""
    resources = {one.name: one for one in DEFAULT_RESOURCES}
    named = {
        one["metadata"]["name"].partition(".")[0]: one["spec"]["extendedResourceName"]
        for one in all_of("DeviceClass")
        if "extendedResourceName" in one["spec"]
    }
    assert named == {name: f"{Config().domain}/{name}" for name in ("gpu", "vf", "nvme")}
    for name in named.keys() & resources.keys():
        assert (resources[name].replicas, resources[name].match.get("sriov", name)) == (1, name)
        assert resources[name].kind == ("nic" if name == "vf" else name)
