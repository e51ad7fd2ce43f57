"""`nodeagent inventory`, and its JSON read back by `nodeagent place --inventory`, edited by hand or not."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cli.shared.source import read_file
from nodeagent.core.model.device import Device, Link
from nodeagent.core.model.inventory_json import from_document, to_document
from nodeagent.errors import InputError
from tests.builders import machines
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.unit.cli.machine.test_place import complaint, nodeagent

RECORDED = (
    "256ppc-8n8s4t",
    "48amd64-4pa2n6c-sparse",
    "40intel64-2g2n4c+pcilocality",
    "20s390-2g6s4c",
    "fakeheterocpunuma",
)
KEYS = {
    "generation",
    "cpus",
    "cpus_online",
    "cpus_offline",
    "cpus_isolated",
    "numa_nodes",
    "caches",
    "devices",
    "links",
}
CPU_KEYS = ["id", "package", "die", "cluster", "core", "numa_node", "l2", "l3", "kind", "isolated"]


def inventory(root: Path, form: str) -> subprocess.CompletedProcess[bytes]:
    done = nodeagent("inventory", "--root", str(root), "-o", form)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = machines.Shape(packages=2, threads=2, hugepages={(0, 2 << 20): (16, 8, 0)}, offline="3", isolated="1")
    return machines.build(tmp_path_factory.mktemp("built"), shape)


def test_the_json_has_the_documented_keys(built: Path) -> None:
    found = json.loads(inventory(built, "json").stdout)
    assert set(found) >= KEYS
    assert list(found["cpus"][0]) == CPU_KEYS
    assert (found["cpus_online"], found["cpus_offline"], found["cpus_isolated"]) == ("0-2,4-15", "3", "1")
    assert found["numa_nodes"][0]["hugepages"] == [
        {"page_bytes": 2 << 20, "total_pages": 16, "free_pages": 8, "reserved_pages": 0, "surplus_pages": 0}
    ]
    assert found["numa_nodes"][0]["distances"] == {"0": 10, "1": 20}


def test_yaml_says_the_same_and_the_table_shows_it(built: Path) -> None:
    assert yaml.safe_load(inventory(built, "yaml").stdout) == json.loads(inventory(built, "json").stdout)
    table = inventory(built, "table").stdout.decode()
    assert "15 CPUs online (0-2,4-15), 8 cores, 2 packages, offline 3, isolated 1" in table
    assert "2Mi=8/16" in table


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_tree_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    """For any user but root."""
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys").chmod(0)
    script = "import os, sys, nodeagent.cli.machine.inventory as _; os.setuid(65534); sys.exit(nodeagent.cli.main())"
    words = [sys.executable, "-c", f"import nodeagent.cli; {script}", "inventory", "--root", str(tmp_path)]
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    done = subprocess.run(words, capture_output=True, check=False)
    (tmp_path / "sys").chmod(0o755)
    assert complaint(done) == f"nodeagent: cannot read --root {tmp_path}: {tmp_path}/sys: Permission denied"


REQUESTS = b"""{"cpus":1}
{"cpus":3,"held":"0-1"}
{"cpus":2,"options":["full-pcpus-only"]}
{"cpus":8,"numa":"single"}
{"cpus":9,"numa":"restricted","memory":"1Gi"}
{"hugepages":{"2Mi":1}}
{"cpus":4,"options":["distribute-cpus-across-numa"]}
"""


@pytest.mark.parametrize("name", RECORDED)
def test_place_answers_the_same_from_the_tree_and_from_its_json(
    name: str, tmp_path: Path, recorded_tree: Callable[[str], Path]
) -> None:
    root, path = recorded_tree(name), tmp_path / "inventory.json"
    path.write_bytes(inventory(root, "json").stdout)
    from_tree = nodeagent("place", "--root", str(root), "--batch", "-", stdin=REQUESTS)
    from_file = nodeagent("place", "--inventory", str(path), "--batch", "-", stdin=REQUESTS)
    assert from_tree.returncode == from_file.returncode == 0
    assert from_tree.stdout == from_file.stdout
    assert len(from_tree.stdout.splitlines()) == 7
    errors = [one["error"] for one in map(json.loads, from_tree.stdout.splitlines()) if "error" in one]
    assert all("cannot place hugepages of 2Mi: the sizes of this machine are" in one for one in errors)


# ---------------------------------------------------------------- read back, edited by hand


def document() -> dict[str, Any]:
    """A small machine with everything in it."""
    devices = [Device(kind="gpu", id=f"gpu{i}", numa_node=i, attributes={"name": "x", "n": 1}) for i in range(2)]
    links = [Link(a="gpu0", b="gpu1", type="nvlink", weight=100)]
    found = inventory_of(even_rows(2, 1, 1, 2, 2), pages={(0, GIB): 2}, devices=devices, links=links)
    return to_document(found)


def test_a_document_reads_back_as_it_was() -> None:
    again = to_document(from_document(json.dumps(document()), source="test"))
    assert again == document()


@pytest.mark.parametrize("name", ["built", *RECORDED])
def test_yaml_is_read_back_as_the_json_of_the_same_machine(
    name: str, built: Path, tmp_path: Path, recorded_tree: Callable[[str], Path]
) -> None:
    """Bit for bit: what is read from either is written in the same bytes, and places the same."""
    root, answers = built if name == "built" else recorded_tree(name), []
    for form in ("json", "yaml"):
        path = tmp_path / f"it.{form}"
        path.write_bytes(inventory(root, form).stdout)
        done = nodeagent("place", "--inventory", str(path), "--cpus", "1", "-o", "json")
        answers.append((json.dumps(to_document(read_file(str(path)))), done.returncode, done.stdout))
    assert answers[0] == answers[1]
    assert answers[0][0] == json.dumps(json.loads((tmp_path / "it.json").read_text()))


ODD_TEXTS = st.one_of(
    st.sampled_from(["1", "0x1f", "1e3", "null", "yes", "~", "2026-01-01", "a: b", "#", "'"]), st.text()
)


@given(ODD_TEXTS, ODD_TEXTS)
def test_texts_that_yaml_could_take_for_something_else_are_read_back(driver: str, name: str) -> None:
    """Numbers, dates, booleans, comments, line breaks: a text stays the text that it was."""
    found = document()
    found["devices"][0].update(driver=driver, attributes={"name": name})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "it.yaml"
        path.write_text(yaml.safe_dump(found, sort_keys=False))
        assert to_document(read_file(str(path))) == to_document(from_document(json.dumps(found), source="it"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpus: [", "while parsing a flow node"),
        ("cpus: 3\n", "Expected `array`, got `int` - at `$.cpus`"),
        ("x", "object"),
    ],
)
def test_yaml_that_is_no_inventory_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_file(str(path))
    assert str(caught.value).startswith(f"cannot read inventory {path}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hand_written_file_needs_only_cpus_and_nodes(tmp_path: Path) -> None:
    small = {
        "cpus": [{"id": cpu, "package": 0, "core": cpu, "numa_node": 8, "remark": "mine"} for cpu in (0, 5)],
        "numa_nodes": [{"id": 8}],
        "something": "new",
    }
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small))
    done = nodeagent("place", "--inventory", str(path), "--cpus", "2", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cpus"] == "0,5"


Edit = Callable[[dict[str, Any]], object]
BAD: dict[str, tuple[Edit, str]] = {
    "cpu twice": (lambda d: d["cpus"].append(d["cpus"][0]), "id 0 stands twice in cpus"),
    "node twice": (lambda d: d["numa_nodes"].append(d["numa_nodes"][0]), "id 0 stands twice in numa_nodes"),
    "device twice": (lambda d: d["devices"].append(d["devices"][0]), "id gpu0 stands twice in devices"),
    "negative distance": (lambda d: d["numa_nodes"][0]["distances"].update({"1": -5}), "distance -5"),
    "node unknown": (lambda d: d["cpus"][0].update(numa_node=7), "numa_node 7 is not in numa_nodes"),
    "negative package": (lambda d: d["cpus"][0].update(package=-1), "package -1 is not in 0 to 8191"),
    "huge package": (lambda d: d["cpus"][0].update(package=10**12), "package 1000000000000 is not in 0 to 8191"),
    "huge core": (lambda d: d["cpus"][0].update(core=10**30), "core"),
    "huge cpu": (lambda d: d["cpus"][0].update(id=8192), "id 8192 is not in 0 to 8191"),
    "huge node": (lambda d: d["numa_nodes"].append({"id": 10**6}), "id 1000000 is not in 0 to 8191"),
    "core on two packages": (lambda d: d["cpus"][0].update(package=1), "core 0 lies on several packages"),
    "negative pages": (lambda d: d["numa_nodes"][0]["hugepages"][0].update(free_pages=-1), "free_pages -1"),
    "page size 0": (lambda d: d["numa_nodes"][0]["hugepages"][0].update(page_bytes=0), "page_bytes is 0"),
    "more free than there": (lambda d: d["numa_nodes"][0]["hugepages"][0].update(free_pages=9), "9 of 2 pages"),
    "size twice": (lambda d: d["numa_nodes"][0]["hugepages"].append(d["numa_nodes"][0]["hugepages"][0]), "twice"),
    "negative memory": (lambda d: d["numa_nodes"][0].update(memory_bytes=-1), "memory_bytes -1"),
    "device node unknown": (lambda d: d["devices"][0].update(numa_node=-4), "numa_node -4"),
    "device without id": (lambda d: d["devices"][0].update(id=""), "empty"),
    "bad local_cpus": (lambda d: d["devices"][0].update(local_cpus="3-1"), "devices, id gpu0"),
    "heavy link": (lambda d: d["links"][0].update(weight=10**9), "weight 1000000000"),
    "text for a number": (lambda d: d["cpus"][0].update(id="0"), "$.cpus[0].id"),
    "no cpus": (lambda d: d.pop("cpus"), "cpus"),
    "cpus a number": (lambda d: d.update(cpus=3), "$.cpus"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_inventory_is_refused_naming_the_value(name: str) -> None:
    edit, expected = BAD[name]
    bad = copy.deepcopy(document())
    edit(bad)
    with pytest.raises(InputError, match=r"cannot read .* ?here") as refused:
        from_document(json.dumps(bad), source="here")
    assert expected in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"cpus":[],"numa_nodes":[]}x'])
def test_what_is_no_inventory_exits_with_2_and_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    assert str(path) in complaint(nodeagent("place", "--inventory", str(path), "--cpus", "1"))


def test_an_empty_machine_refuses_and_does_not_fall_over() -> None:
    found = from_document('{"cpus":[],"numa_nodes":[]}', source="x")
    assert found.cpus == ()


@pytest.mark.parametrize("words", [["--root", "/nowhere"], ["--root", "/etc/passwd"], ["--root", "/etc"]])
def test_a_root_that_is_none_exits_with_2(words: list[str]) -> None:
    assert words[1] in complaint(nodeagent("inventory", *words))


@pytest.mark.parametrize("path", ["/nowhere", "/"])
def test_a_file_that_cannot_be_read_exits_with_2(path: str) -> None:
    assert path in complaint(nodeagent("place", "--inventory", path, "--cpus", "1"))


def test_the_reader_may_go_away_in_the_middle(built: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m nodeagent inventory --root {built} -o json | head -1"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == b"{\n"
    assert done.stderr == b""
