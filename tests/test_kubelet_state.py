"""What kubelet's own CPU manager does, read from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nodeagent.core.cpuset import EMPTY, CpuSet
from nodeagent.errors import InputError
from nodeagent.kube.kubelet_state import KubeletState, read

STATIC_STATE = {
    "policyName": "static",
    "defaultCpuSet": "0,4-7",
    "entries": {"uid-b": {"app": "2-3"}, "uid-a": {"app": "1"}},
    "checksum": 123,
}


def write(folder: Path, *, state: object = None, config: str | None = None) -> Path:
    if state is not None:
        text = state if isinstance(state, str) else json.dumps(state)
        (folder / "cpu_manager_state").write_text(text)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


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
        ({"policyName": "none", "defaultCpuSet": ""}, "kind: KubeletConfiguration", "none", "cpu_manager_state"),
        (None, "cpuManagerPolicy: none", "none", "config.yaml"),
    ],
)
def test_either_file_can_say_static(
    state: object, config: str | None, policy: str, source: str, tmp_path: Path
) -> None:
    """Whichever it is, it is named."""
    found = read(write(tmp_path, state=state, config=config))
    assert (found.policy, found.policy_source) == (policy, str(tmp_path / source))


def test_a_static_manager_without_its_state_may_manage_every_cpu(tmp_path: Path) -> None:
    """Unknown is said, not guessed."""
    assert read(write(tmp_path, config="cpuManagerPolicy: static")).managed is None


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        ("{", None, "cannot read {}/cpu_manager_state: Input data was truncated"),
        ("[]", None, "cannot read {}/cpu_manager_state: Expected `object`, got `array`"),
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
        (None, "reservedSystemCPUs: 0-", "cannot read CPU list '0-' of {}/config.yaml: "),
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
