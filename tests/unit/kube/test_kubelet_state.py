"""What kubelet's own CPU and memory managers do, read from their files, in every form that kubelet has written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nodeagent.core.kubelet.assigned import MemoryBlock
from nodeagent.core.ledger.free import MEMORY
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import InputError
from nodeagent.kube.kubelet_files import config as kubelet_config
from nodeagent.kube.kubelet_files import cpu_state as kubelet_state
from nodeagent.kube.kubelet_files import memory_state
from nodeagent.kube.kubelet_files.checkpoints import pods_there, text_checksum
from nodeagent.kube.kubelet_files.config import KubeletConfig
from nodeagent.kube.kubelet_files.cpu_state import KubeletState
from nodeagent.kube.kubelet_files.memory_state import MemoryState

STATIC_STATE = {
    "policyName": "static",
    "defaultCpuSet": "0,4-7",
    "entries": {"uid-b": {"app": "2-3"}, "uid-a": {"app": "1"}},
    "checksum": 123,
}
GIB = 1 << 30


def memory(nodes: list[int], kind: str, size: int) -> dict[str, object]:
    return {"numaAffinity": nodes, "type": kind, "size": size}


MEMORY_STATE = {
    "policyName": "Static",
    "machineState": {"0": {"numberOfAssignments": 2, "memoryMap": {}, "cells": [0]}},
    "entries": {"uid-a": {"app": [memory([0], "memory", GIB), memory([1, 0], "hugepages-2Mi", 4 << 20)]}},
    "checksum": 77,
}


def text_of(state: object) -> dict[str, object]:
    """The newer form: the state as text, with its checksum."""
    text = json.dumps(state)
    return {"data": text, "dataChecksum": text_checksum(text)}


def write(folder: Path, *, state: object = None, config: str | None = None, memory: object = None) -> Path:
    for name, one in (("cpu_manager_state", state), ("memory_manager_state", memory)):
        if one is not None:
            (folder / name).write_text(one if isinstance(one, str) else json.dumps(one))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def config_of(folder: Path) -> KubeletConfig:
    file = folder / "config.yaml"
    return kubelet_config.read(str(file) if file.exists() else "", "")


def read(folder: Path) -> KubeletState:
    return kubelet_state.read(folder, config_of(folder))


def read_memory(folder: Path) -> MemoryState:
    return memory_state.read(folder, config_of(folder))


def test_no_files_means_no_cpu_manager(tmp_path: Path) -> None:
    """And nothing that it manages."""
    found = read(tmp_path)
    assert found == KubeletState()
    assert (found.policy, found.static, found.managed) == ("none", False, EMPTY)


def test_the_state_of_a_static_manager_is_read_whole(tmp_path: Path) -> None:
    """Shared and assigned CPUs; what is managed is both less the reserved ones."""
    found = read(write(tmp_path, state=STATIC_STATE, config="cpuManagerPolicy: static\nreservedSystemCPUs: 0,4\n"))
    assert found.static
    assert found.policy_source == str(tmp_path / "config.yaml")
    assert found.reserved == CpuSet.parse("0,4")
    assert found.shared == CpuSet.parse("0,4-7")
    assert dict(found.assigned) == {("uid-a", "app"): CpuSet.parse("1"), ("uid-b", "app"): CpuSet.parse("2-3")}
    assert list(found.assigned) == [("uid-a", "app"), ("uid-b", "app")]
    assert found.managed == CpuSet.parse("1-3,5-7")


@pytest.mark.parametrize(
    ("state", "config", "policy", "source"),
    [
        ({"policyName": "static"}, None, "static", "cpu_manager_state"),
        ({"policyName": "static"}, "cpuManagerPolicy: none", "static", "cpu_manager_state"),
        ({"policyName": "none"}, "cpuManagerPolicy: static", "static", "config.yaml"),
        ({"policyName": "none", "defaultCpuSet": ""}, None, "none", "cpu_manager_state"),
        (None, "cpuManagerPolicy: none", "none", "config.yaml"),
    ],
)
def test_either_file_can_say_static(
    state: object, config: str | None, policy: str, source: str, tmp_path: Path
) -> None:
    """Whichever it is, it is named."""
    found = read(write(tmp_path, state=state, config=config))
    assert (found.policy, found.policy_source) == (policy, str(tmp_path / source))


@pytest.mark.parametrize(
    ("state", "config", "said"),
    [
        ({"policyName": "static"}, "cpuManagerPolicy: none", "cpuManagerPolicy is none ({0}/config.yaml) and static"),
        ({"policyName": "static"}, "kind: KubeletConfiguration", "is none (kubelet's defaults) and static in {0}/cpu_"),
        ({"policyName": "none"}, "cpuManagerPolicy: static", "cpuManagerPolicy is static ({0}/config.yaml) and none"),
        ({"policyName": "none"}, "kind: KubeletConfiguration", None),
        ({"policyName": "static"}, None, None),
        (None, "cpuManagerPolicy: static", None),
    ],
)
def test_a_state_of_another_policy_than_the_configurations_is_a_contradiction(
    state: object, config: str | None, said: str | None, tmp_path: Path
) -> None:
    """Kubelet refuses to start with both. Where one of the two is not there, they do not contradict each other."""
    conflict = read(write(tmp_path, state=state, config=config)).policy_conflict
    assert said.format(tmp_path) in conflict if said else conflict == ""


def test_a_static_manager_without_its_state_may_manage_every_cpu(tmp_path: Path) -> None:
    """Unknown is said, not guessed."""
    assert read(write(tmp_path, config="cpuManagerPolicy: static")).managed is None


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        ("{", None, "cannot read {}/cpu_manager_state: Input data was truncated"),
        ("[]", None, "cannot read {}/cpu_manager_state: Expected `object`, got `array`"),
        ('{"policyName": "\\ud800"}', None, "cannot read {}/cpu_manager_state: "),
        (
            '{"data": "{", "dataChecksum": 3017666942}',
            None,
            "cannot read {}/cpu_manager_state: Input data was truncated",
        ),
        (
            {**STATIC_STATE, "data": "{}", "dataChecksum": 7},
            None,
            "cannot read {}/cpu_manager_state: dataChecksum is 7, that of its data 694314937",
        ),
        (
            {**STATIC_STATE, "data": "", "dataChecksum": 7},
            None,
            "cannot read {}/cpu_manager_state: dataChecksum is 7, that of its data ",
        ),
        (
            {**STATIC_STATE, "data": "{}"},
            None,
            "cannot read {}/cpu_manager_state: dataChecksum is 0, that of its data ",
        ),
        (
            {**STATIC_STATE, "baselines": {"uid-a": {"app": {"baseline": "1-"}}}},
            None,
            "cannot read CPU list '1-' of {}/cpu_manager_state: ",
        ),
        (
            {**STATIC_STATE, "baselines": {"uid-a": {"app": "1"}}},
            None,
            "cannot read {}/cpu_manager_state: Expected `object`",
        ),
        (
            {"policyName": "static", "entries": {"u": {"c": {"original": "1"}}}},
            None,
            "cannot read {}/cpu_manager_state: ",
        ),
        (
            {"policyName": "static", "podEntries": {"u": "1"}},
            None,
            "cannot read {}/cpu_manager_state: Expected `object`",
        ),
        (
            {"policyName": "static", "podEntries": {"u": {"cpuSet": "7-"}}},
            None,
            "cannot read CPU list '7-' of {}/cpu_manager_state: ",
        ),
        ("{}", None, "cannot read {}/cpu_manager_state: Object missing required field `policyName`"),
        (
            {"policyName": "static", "defaultCpuSet": "3-1"},
            None,
            "cannot read CPU list '3-1' of {}/cpu_manager_state: ",
        ),
        (
            {"policyName": "static", "entries": {"u": {"c": "x"}}},
            None,
            "cannot read CPU list 'x' of {}/cpu_manager_state: ",
        ),
        (None, "a: [", "cannot read {}/config.yaml: while parsing a flow node"),
        (None, "- a", "cannot read {}/config.yaml: list at the top, expected a mapping"),
        (None, "cpuManagerPolicy: 1", "cannot read cpuManagerPolicy of {}/config.yaml: 1, expected a string"),
        (None, "reservedSystemCPUs: 0-", "cannot read CPU list '0-' of reservedSystemCPUs of {}/config.yaml: "),
    ],
)
def test_what_cannot_be_understood_is_an_error_with_its_place(
    state: object, config: str | None, message: str, tmp_path: Path
) -> None:
    """The file and the value."""
    with pytest.raises(InputError) as bad:
        read(write(tmp_path, state=state, config=config))
    assert str(bad.value).startswith(message.format(tmp_path))


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    """A folder in its place."""
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*/config\.yaml: Is a directory"):
        read(tmp_path)


# ---------------------------------------------------------------- the forms of the CPU manager's state


def test_the_oldest_form_names_containers_without_their_pods(tmp_path: Path) -> None:
    """They are managed all the same."""
    state = {"policyName": "static", "defaultCpuSet": "0,3", "entries": {"4a1f": "1-2"}, "checksum": 5}
    found = read(write(tmp_path, state=state))
    assert dict(found.unnamed) == {"4a1f": CpuSet.parse("1-2")}
    assert dict(found.assigned) == {}
    assert found.managed == CpuSet.parse("0-3")


POD_LEVEL = {
    "policyName": "static",
    "defaultCpuSet": "0,6-7",
    "entries": {"uid-a": {"app": "1", "side": "2-3"}},
    "podEntries": {"uid-a": {"cpuSet": "1-5"}},
}


@pytest.mark.parametrize(
    "state",
    [
        {**POD_LEVEL, "checksum": 9},
        {**POD_LEVEL, "checksum": 0, **text_of(POD_LEVEL)},
        text_of(POD_LEVEL),
        {"policyName": "none", "defaultCpuSet": "", **text_of({**POD_LEVEL, "later": 1}), "later": []},
    ],
    ids=["third", "fourth", "fourth-alone", "fourth-counts"],
)
def test_whole_pods_are_read_from_the_newer_forms(state: object, tmp_path: Path) -> None:
    """Where there is text under "data", that is what counts."""
    found = read(write(tmp_path, state=state))
    assert (found.static, found.shared) == (True, CpuSet.parse("0,6-7"))
    assert dict(found.pods) == {"uid-a": CpuSet.parse("1-5")}
    assert dict(found.assigned) == {("uid-a", "app"): CpuSet.parse("1"), ("uid-a", "side"): CpuSet.parse("2-3")}
    assert found.managed == CpuSet.parse("0-7")


WRITTEN_BY_1_37 = {
    "policyName": "static",
    "defaultCpuSet": "0,6-7",
    "entries": {"uid-a": {"app": "1", "side": "2-3"}},
    "checksum": 3102377269,
    "data": '{"policyName":"static","defaultCpuSet":"0,6-7","entries":{"uid-a":{"app":"1","side":"2-3"}},'
    '"podEntries":{"uid-a":{"cpuSet":"1-5"}},"baselines":{"uid-a":{"app":{"baseline":"1"},"side":{"baseline":"2"}}}}',
    "dataChecksum": 1340424055,
}
"""As kubelet 1.37.2 writes it with InPlacePodVerticalScalingExclusiveCPUs and PodLevelResourceManagers."""


def test_what_kubelet_1_37_writes_is_read_as_it_means_it(tmp_path: Path) -> None:
    """The checksum is right, and what containers had before they were resized is theirs still."""
    found = read(write(tmp_path, state=WRITTEN_BY_1_37))
    assert dict(found.pods) == {"uid-a": CpuSet.parse("1-5")}
    assert dict(found.assigned) == {("uid-a", "app"): CpuSet.parse("1"), ("uid-a", "side"): CpuSet.parse("2-3")}


def test_the_fields_for_older_kubelets_do_not_count(tmp_path: Path) -> None:
    """Not even where they alone were edited."""
    found = read(write(tmp_path, state={**WRITTEN_BY_1_37, "entries": {"uid-b": {"x": "7"}}, "policyName": "none"}))
    assert found.static and ("uid-b", "x") not in found.assigned


def test_a_text_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    """Kubelet does not start with it either: one CPU more would be one that others have."""
    edited = {**WRITTEN_BY_1_37, "data": str(WRITTEN_BY_1_37["data"]).replace('"2-3"', '"2-4"')}
    with pytest.raises(InputError, match=r"cpu_manager_state: dataChecksum is 1340424055, that of its data \d+"):
        read(write(tmp_path, state=edited))


def test_cpus_that_a_container_was_promised_are_not_given_to_others(tmp_path: Path) -> None:
    """Whatever its entry says by now."""
    state = {**POD_LEVEL, "baselines": {"uid-a": {"app": {"baseline": "1,4"}}, "gone": {"x": {"baseline": "7"}}}}
    found = read(write(tmp_path, state=text_of(state)))
    assert found.assigned["uid-a", "app"] == CpuSet.parse("1,4")
    assert ("gone", "x") not in found.assigned


@pytest.mark.parametrize(
    ("text", "checksum"),
    [("", 441364273), ("{}", 694314937), ("{", 3017666942), ("ü\x7f", 1658109587)],
)
def test_the_checksum_is_that_of_kubelet(text: str, checksum: int) -> None:
    """Of the text's bytes, with its type before it."""
    assert text_checksum(text) == checksum


# ---------------------------------------------------------------- the memory manager's state


def test_no_files_means_no_memory_manager(tmp_path: Path) -> None:
    found = read_memory(tmp_path)
    assert found == MemoryState()
    assert (found.policy, found.static) == ("None", False)


def test_the_state_of_a_static_memory_manager_is_read_whole(tmp_path: Path) -> None:
    found = read_memory(write(tmp_path, memory=MEMORY_STATE))
    assert (found.static, found.policy_source) == (True, str(tmp_path / "memory_manager_state"))
    assert dict(found.assigned) == {
        ("uid-a", "app"): (
            MemoryBlock(nodes=(0,), page_bytes=MEMORY, size_bytes=GIB),
            MemoryBlock(nodes=(0, 1), page_bytes=2 << 20, size_bytes=4 << 20),
        )
    }


@pytest.mark.parametrize("in_data", [False, True])
def test_memory_of_whole_pods_is_read_from_the_newer_forms(in_data: bool, tmp_path: Path) -> None:
    state = {**MEMORY_STATE, "podEntries": {"uid-a": {"memoryBlocks": [memory([1], "memory", 2 * GIB)]}}}
    whole = {**MEMORY_STATE, **text_of(state)} if in_data else state
    found = read_memory(write(tmp_path, memory=whole))
    assert dict(found.pods) == {"uid-a": (MemoryBlock(nodes=(1,), page_bytes=MEMORY, size_bytes=2 * GIB),)}
    assert list(found.assigned) == [("uid-a", "app")]


@pytest.mark.parametrize(
    ("state", "config", "policy", "source"),
    [
        ({"policyName": "None", "machineState": {}, "checksum": 1}, None, "None", "memory_manager_state"),
        ({"policyName": "None", "machineState": None}, "memoryManagerPolicy: Static", "Static", "config.yaml"),
        (MEMORY_STATE, "memoryManagerPolicy: None", "Static", "memory_manager_state"),
        (None, "memoryManagerPolicy: None\nreservedMemory: [{numaNode: 0}]", "None", "config.yaml"),
    ],
)
def test_either_file_can_say_static_of_memory(
    state: object, config: str | None, policy: str, source: str, tmp_path: Path
) -> None:
    found = read_memory(write(tmp_path, memory=state, config=config))
    assert (found.policy, found.policy_source) == (policy, str(tmp_path / source))


def entry(**changes: object) -> dict[str, object]:
    return {**MEMORY_STATE, "entries": {"u": {"c": [{**memory([0], "memory", 1), **changes}]}}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"policyName": "Static"}, "Object missing required field `machineState`"),
        ({"machineState": {}}, "Object missing required field `policyName`"),
        ({**MEMORY_STATE, "entries": {"u": {"c": "x"}}}, "Expected `array`, got `str`"),
        (entry(numaAffinity=[]), "Expected `array` of length >= 1"),
        (entry(numaAffinity=[-1]), "Expected `int` >= 0"),
        (entry(size=-1), "Expected `int` >= 0"),
        (entry(type="hugepages-2Fi"), "type 'hugepages-2Fi': cannot read size"),
        (entry(type="cpu"), "type 'cpu', expected memory or hugepages-SIZE"),
    ],
)
def test_memory_that_cannot_be_understood_is_an_error_with_its_place(
    state: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as bad:
        read_memory(write(tmp_path, memory=state))
    assert str(bad.value).startswith(f"cannot read {tmp_path}/memory_manager_state: ")
    assert message in str(bad.value)


# ---------------------------------------------------------------- the folders of pods


def test_pods_are_there_that_have_a_folder(tmp_path: Path) -> None:
    """Without the folder of them all it is not known: that is no empty list."""
    with pytest.raises(InputError, match=r"cannot read .*/pods: No such file"):
        pods_there(tmp_path)
    (tmp_path / "pods" / "uid-a").mkdir(parents=True)
    assert pods_there(tmp_path) == {"uid-a"}
