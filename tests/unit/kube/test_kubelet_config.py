"""Kubelet's effective configuration: file, drop-ins and flags put together as kubelet puts them together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InputError
from nodeagent.kube.kubelet_files import config as kubelet_config
from nodeagent.kube.kubelet_files.config import DEFAULTS, KubeletConfig, Layer, drop_ins, effective, merge
from nodeagent.kube.kubelet_files.flags import parse
from tests.doubles.kubelet_process import HEAD, put


def read(folder: Path, *flags: str) -> KubeletConfig:
    """The file c.yaml and the drop-ins in d, where they are there."""
    file, drops = folder / "c.yaml", folder / "d"
    there = (str(one) if one.exists() else "" for one in (file, drops))
    return kubelet_config.read(*there, parse(flags, "kubelet"), "kubelet")


# ---------------------------------------------------------------- merging

KEYS = st.sampled_from("abc")
SCALARS = st.one_of(st.text(max_size=2), st.integers(0, 3), st.booleans(), st.lists(st.integers(0, 1), max_size=2))
DOCUMENTS = st.recursive(
    st.dictionaries(KEYS, st.one_of(SCALARS, st.none()), max_size=3),
    lambda inner: st.dictionaries(KEYS, st.one_of(SCALARS, st.none(), inner), max_size=3),
    max_leaves=12,
)
WHOLE = st.recursive(
    st.dictionaries(KEYS, SCALARS, max_size=3),
    lambda inner: st.dictionaries(KEYS, st.one_of(SCALARS, inner), max_size=3),
)
Keys = tuple[str, ...]


def lines(document: Mapping[str, Any], at: Keys = ()) -> dict[Keys, Any]:
    """A document as one line for each thing that it says: a path and a value, {} for a mapping that is there."""
    found: dict[Keys, Any] = {at: {}} if at else {}
    for key, value in document.items():
        found |= lines(value, (*at, key)) if isinstance(value, Mapping) else {(*at, key): value}
    return found


def patched(document: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[Keys, Any]:
    """The oracle: apply a patch line by line to the lines of a document."""
    now = lines(document)
    for path, value in lines(patch).items():
        if value != {} or now.get(path) != {}:
            now = {one: kept for one, kept in now.items() if one[: len(path)] != path}
        if value is not None:
            now[path] = value
    return now


@given(WHOLE, DOCUMENTS)
def test_a_merge_does_line_by_line_what_the_patch_says(document: dict[str, Any], patch: dict[str, Any]) -> None:
    """Mappings are merged, all else is replaced, null removes."""
    before = json.dumps([document, patch])
    assert lines(merge(document, patch)) == patched(document, patch)
    assert json.dumps([document, patch]) == before


@given(st.lists(DOCUMENTS, max_size=4))
def test_no_null_is_left_by_a_merge(patches: list[dict[str, Any]]) -> None:
    now: dict[str, Any] = {}
    for patch in patches:
        now = merge(now, patch)
    assert None not in lines(now).values()


@pytest.mark.parametrize(
    ("patch", "after"),
    [
        ({"systemReserved": {"cpu": "2"}}, {"systemReserved": {"cpu": "2", "memory": "1Gi"}, "list": [1, 2]}),
        ({"systemReserved": {"cpu": None}}, {"systemReserved": {"memory": "1Gi"}, "list": [1, 2]}),
        ({"systemReserved": None}, {"list": [1, 2]}),
        ({"systemReserved": {}}, {"systemReserved": {"cpu": "1", "memory": "1Gi"}, "list": [1, 2]}),
        ({"list": [3]}, {"systemReserved": {"cpu": "1", "memory": "1Gi"}, "list": [3]}),
        ({"list": {"a": None, "b": 1}}, {"systemReserved": {"cpu": "1", "memory": "1Gi"}, "list": {"b": 1}}),
    ],
)
def test_what_a_patch_does_to_maps_and_lists(patch: dict[str, Any], after: dict[str, Any]) -> None:
    assert merge({"systemReserved": {"cpu": "1", "memory": "1Gi"}, "list": [1, 2]}, patch) == after


# ---------------------------------------------------------------- files and flags together

STATIC = "cpuManagerPolicy: static\nreservedSystemCPUs: '0'\nsystemReserved: {cpu: 100m, memory: 1Gi}\n"


def test_a_drop_in_overrides_the_file_and_a_flag_overrides_both(tmp_path: Path) -> None:
    """And each says where it comes from."""
    file = put(tmp_path / "c.yaml", STATIC)
    early = put(tmp_path / "d/10.conf", "reservedSystemCPUs: '3'\nkubeReserved: {cpu: '1'}\n")
    late = put(tmp_path / "d/20.conf", "reservedSystemCPUs: '0,8'\nsystemReserved: {cpu: 200m}\n")
    found = read(tmp_path)
    assert found.text("reservedSystemCPUs") == "0,8"
    assert found.values["systemReserved"] == {"cpu": "200m", "memory": "1Gi"}
    assert found.places["reservedSystemCPUs"] == found.places["systemReserved"] == str(late)
    assert (found.places["cpuManagerPolicy"], found.places["kubeReserved"]) == (str(file), str(early))
    assert found.sources == (str(file), str(early), str(late))
    flagged = read(tmp_path, "--reserved-cpus=1", "--cpu-manager-policy", "none")
    assert (flagged.text("reservedSystemCPUs"), flagged.text("cpuManagerPolicy")) == ("1", "none")
    assert flagged.places["reservedSystemCPUs"] == "--reserved-cpus of kubelet"
    assert flagged.sources == (*found.sources, "--cpu-manager-policy", "--reserved-cpus")


@pytest.mark.parametrize("nothing", ["null", "''"])
def test_a_drop_in_can_take_a_key_back_to_its_default(nothing: str, tmp_path: Path) -> None:
    put(tmp_path / "c.yaml", STATIC)
    put(tmp_path / "d/1.conf", f"reservedSystemCPUs: {nothing}\ncpuManagerPolicy: {nothing}\n")
    found = read(tmp_path)
    assert (found.text("reservedSystemCPUs"), found.text("cpuManagerPolicy")) == ("", "none")


def test_without_any_file_kubelets_defaults_hold_and_its_flags() -> None:
    """What is known of no kubelet at all is nothing, not even that."""
    assert kubelet_config.read("", "").values == {}
    assert kubelet_config.read("", "", parse((), "kubelet"), "kubelet").values == DEFAULTS
    found = kubelet_config.read("", "", parse(("--reserved-cpus=7",), "kubelet"), "kubelet")
    assert found.values == {**DEFAULTS, "reservedSystemCPUs": "7"}


@pytest.mark.parametrize(
    ("file", "drop_in", "reserved"),
    [
        ("reservedsystemcpus: '5'\n", None, ""),
        ("reservedsystemcpus: '5'\n", "{}", ""),
        ("", "reservedsystemcpus: '5'\n", "5"),
        ("reservedSystemCPUs: '1'\n", "reservedsystemcpus: '5'\n", "5"),
        ("reservedSystemCPUs: '1'\n", "ReservedSystemCPUs: '5'\n", "1"),
        ("", "ReservedSystemCPUs: '5'\nreservedsystemcpus: '6'\n", "6"),
    ],
)
def test_upper_and_lower_case_matter_in_the_file_and_not_in_a_drop_in(
    file: str, drop_in: str | None, reserved: str, tmp_path: Path
) -> None:
    """As the JSON decoders of Go have it: of several spellings in a drop-in the last by its bytes counts."""
    put(tmp_path / "c.yaml", file)
    if drop_in is not None:
        put(tmp_path / "d/1.conf", "" if drop_in == "{}" else drop_in)
    assert read(tmp_path).text("reservedSystemCPUs") == reserved


def test_only_the_first_document_of_a_file_counts(tmp_path: Path) -> None:
    put(tmp_path / "c.yaml", f"reservedSystemCPUs: '1'\n---\n{HEAD}reservedSystemCPUs: '2'\n")
    assert read(tmp_path).text("reservedSystemCPUs") == "1"


def test_json_is_read_as_well(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text('{"reservedSystemCPUs": "0,8"}')
    assert read(tmp_path).text("reservedSystemCPUs") == "0,8"


# ---------------------------------------------------------------- which drop-ins, in which order


def names(folder: Path, root: str = "d") -> list[str]:
    return [str(Path(one).relative_to(folder)) for one in drop_ins(f"{folder}/{root}")]


def test_drop_ins_come_in_the_order_of_their_bytes_and_a_folders_in_its_place(tmp_path: Path) -> None:
    """Only what ends in .conf, however the folders are called."""
    for name in ("a.conf", "a/z.conf", "a-b.conf", "B.conf", ".conf", "x.conf/y.conf", "9.conf", "10.conf", "é.conf"):
        put(tmp_path / "d" / name, "")
    for name in ("README", "c.conf.bak", "c.yaml", "c.CONF"):
        put(tmp_path / "d" / name, "")
    expected = [".conf", "10.conf", "9.conf", "B.conf", "a/z.conf", "a-b.conf", "a.conf", "x.conf/y.conf", "é.conf"]
    assert names(tmp_path) == [f"d/{one}" for one in expected]


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    """The folder itself is one only with a slash at its end."""
    put(tmp_path / "else/a.yaml", "")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/file.conf").symlink_to("../else/a.yaml")
    (tmp_path / "d/folder").symlink_to("../else")
    (tmp_path / "link").symlink_to("d")
    assert names(tmp_path) == ["d/file.conf"]
    assert names(tmp_path, "link") == []
    assert names(tmp_path, "link/") == ["link/file.conf"]


def test_a_file_in_the_folders_place_is_the_only_drop_in(tmp_path: Path) -> None:
    put(tmp_path / "d.conf", "")
    assert names(tmp_path, "d.conf") == ["d.conf"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read {}: NoneType at the top, expected a mapping"),
        ("a: [", "cannot read {}: while parsing a flow node"),
        ("reservedSystemCPUs: '5'\n", "cannot use {}: it is None None, expected kubelet.config.k8s.io/v1beta1 Kubelet"),
        ("apiVersion: v1\nkind: Pod\n", "cannot use {}: it is v1 Pod, expected kubelet.config.k8s.io/v1beta1 Kubelet"),
        (f"{HEAD}reservedSystemCPUs: 5\n", "cannot read reservedSystemCPUs of {}: 5, expected a string"),
        (f"{HEAD}reservedSystemCPUs: 5-\n", "cannot read CPU list '5-' of reservedSystemCPUs of {}: "),
    ],
)
def test_a_drop_in_that_kubelet_would_refuse_is_an_error_with_its_place(
    text: str, message: str, tmp_path: Path
) -> None:
    """Never passed over: it may be the one that reserves CPUs."""
    put(tmp_path / "c.yaml", STATIC)
    bad = tmp_path / "d/50.conf"
    bad.parent.mkdir()
    bad.write_text(text)
    with pytest.raises(InputError) as error:
        read(tmp_path).cpus("reservedSystemCPUs")
    assert str(error.value).startswith(message.format(bad))


@pytest.mark.parametrize(
    ("file", "folder", "message"),
    [
        ("none.yaml", "", "cannot read {}/none.yaml: No such file or directory"),
        ("", "none", "cannot read {}/none: No such file or directory"),
        ("", "broken", "cannot read {}/broken/a.conf: No such file or directory"),
    ],
)
def test_a_file_or_folder_that_is_not_there_is_an_error(file: str, folder: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.conf").symlink_to("nowhere")
    where = (f"{tmp_path}/{one}" if one else "" for one in (file, folder))
    with pytest.raises(InputError) as error:
        kubelet_config.read(*where)
    assert str(error.value) == message.format(tmp_path)


def test_layers_are_put_together_without_any_file() -> None:
    base, patch = Layer("base", {"cgroupRoot": "/a", "x": None}), Layer("patch", {"cgroupRoot": "/b"})
    found = effective(base, [patch], parse(("--cgroup-root=/c",), "kubelet"), "kubelet")
    assert (found.text("cgroupRoot"), found.sources) == ("/c", ("base", "patch", "--cgroup-root"))
