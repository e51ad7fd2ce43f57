"""`nodeagent place` as an admin calls it: a process, its output, its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.cli.shared.source import read_root
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory_json import to_document
from tests.builders import tables
from tests.builders.inventories import GIB, even_rows, inventory_of

KEYS = ["cpus", "packages", "numa_nodes", "l3", "split_cores", "hugepages", "devices", "cost", "why"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 packages, 2 nodes, 16 CPUs; 4 pages of 1 GiB on each node; two GPUs."""
    devices = [Device(kind="gpu", id=f"gpu{node}", numa_node=node) for node in range(2)]
    pages = {(0, GIB): 4, (1, GIB): 4, (0, 2 << 20): 64}
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    path.write_text(json.dumps(to_document(inventory_of(even_rows(2, 1, 2, 2, 2), pages=pages, devices=devices))))
    return path


def nodeagent(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "nodeagent", *words], input=stdin, capture_output=True, timeout=60, check=False
    )


def place(machine: Path, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return nodeagent("place", "--inventory", str(machine), *words, stdin=stdin)


def answer(machine: Path, *words: str, code: int = 0) -> dict[str, Any]:
    done = place(machine, *words, "-o", "json")
    assert (done.returncode, done.stderr) == (code, b"")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line that bad input gets."""
    assert done.returncode == 2, done
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    return line


def test_a_placement_has_the_documented_keys(machine: Path) -> None:
    found = answer(machine, "--cpus", "4", "--hugepages", "1Gi=2", "--hugepages", "2Mi=64", "--devices", "gpu=1")
    assert list(found) == KEYS
    assert found["cpus"] == "0-1,8-9"
    assert (found["packages"], found["numa_nodes"], found["l3"], found["split_cores"]) == ([0], [0], [0], 0)
    assert found["hugepages"] == {"1Gi": {"0": 2}, "2Mi": {"0": 64}}
    assert found["devices"] == ["gpu0"]
    assert len(found["cost"]) == 13
    assert all(isinstance(sentence, str) for sentence in found["why"])


def test_a_refusal_exits_with_3_and_its_numbers(machine: Path) -> None:
    found = answer(machine, "--cpus", "17", code=3)
    assert list(found) == ["refused", "want", "free", "unit", "would_admit"]
    assert (found["want"], found["free"]) == (17, 16)
    assert place(machine, "--cpus", "17").returncode == 3


def test_what_is_held_or_reserved_is_not_given(machine: Path) -> None:
    assert answer(machine, "--cpus", "2", "--held", "0-1", "--reserved", "8-9")["cpus"] == "2,10"


def test_what_is_held_is_not_reported_as_reserved(machine: Path) -> None:
    found = answer(machine, "--cpus", "16", "--held", "0-1", "--reserved", "8", code=3)
    assert found["refused"] == "cannot place 16 CPUs: 13 of 16 are free (2 held, 1 reserved)"
    assert (found["want"], found["free"], found["unit"]) == (16, 13, "CPUs")


def test_a_state_is_the_grants_of_another_node(machine: Path, tmp_path: Path) -> None:
    """As `nodeagent grants -o json` writes it: CPUs, pages, memory and devices count."""
    grant = {
        "id": "g-1",
        "api": "claim",
        "cpus": "0-1,8-9",
        "hugepages": [{"size": "1Gi", "numa_node": 0, "pages": 3}],
        "memory": [],
        "devices": ["gpu0"],
        "things": [["gpu0", "gpu0"]],
        "granted_at": 1.0,
    }
    state = tmp_path / "grants.json"
    state.write_text(json.dumps([grant]))
    words = ("--state", str(state))
    assert answer(machine, "--cpus", "2", *words)["cpus"] == "2,10"
    assert answer(machine, "--devices", "gpu=1", *words)["devices"] == ["gpu1"]
    refused = answer(machine, "--hugepages", "1Gi=6", *words, code=3)
    assert (refused["want"], refused["free"], refused["unit"]) == (6, 5, "pages")
    for wrong in ("{", '[{"cpus": 1}]', '[{"id": "x", "cpus": "3-1"}]', "\udcff"):
        state.write_text(wrong, errors="surrogateescape")
        assert str(state) in complaint(place(machine, "--cpus", "1", *words))


def test_a_refusal_under_a_policy_has_the_numbers_of_what_is_short(machine: Path) -> None:
    """One GPU on each node: two do not fit on one."""
    found = answer(machine, "--devices", "gpu=2", "--numa", "single", code=3)
    assert found["refused"] == "cannot place 2 devices of kind gpu under NUMA policy single: 1 would fit"
    assert (found["want"], found["free"], found["unit"]) == (2, 1, "devices")
    assert found["would_admit"] == "NUMA policy best-effort would admit it"
    pages = answer(machine, "--hugepages", "1Gi=5", "--numa", "single", code=3)
    assert (pages["want"], pages["free"], pages["unit"]) == (5, 4, "pages")


def test_a_disk_that_the_node_uses_is_not_placed(tmp_path: Path) -> None:
    """The root is on a btrfs over both disks."""
    root = tables.build(tmp_path, tables.load("disk-in-use-btrfs", tables.TREES))
    done = nodeagent("place", "--root", str(root), "--devices", "block=1", "-o", "json")
    assert done.returncode == 3, done
    refused = json.loads(done.stdout)
    assert refused["refused"] == "cannot place 1 devices of kind block: 0 of 2 are free (2 in use by the node)"
    assert (refused["want"], refused["free"], refused["unit"], refused["would_admit"]) == (1, 0, "devices", "")


@pytest.mark.parametrize("name", ["bond", "netvsc"])
def test_an_adapter_with_the_default_route_is_not_placed(tmp_path: Path, name: str) -> None:
    root = tables.build(tmp_path, tables.load(f"nic-default-route-{name}", tables.TREES))
    nics = {one.id: one for one in read_root(str(root)).devices_by_kind["nic"]}
    free = {id for id, one in nics.items() if not one.attributes.get("default_route")}
    assert len(free) < len(nics)
    done = nodeagent("place", "--root", str(root), "--devices", "nic=1", "-o", "json")
    if free:
        assert done.returncode == 0, done
        assert {*json.loads(done.stdout)["devices"]} <= free
    more = nodeagent("place", "--root", str(root), "--devices", f"nic={len(free) + 1}", "-o", "json")
    assert more.returncode == 3, more
    assert f"({len(nics) - len(free)} in use by the node)" in json.loads(more.stdout)["refused"]


def test_options_and_policies_are_followed(machine: Path) -> None:
    assert answer(machine, "--cpus", "2", "--option", "distribute-cpus-across-cores")["cpus"] == "0-1"
    assert answer(machine, "--cpus", "2", "--near", "gpu1")["numa_nodes"] == [1]
    assert answer(machine, "--cpus", "10", "--numa", "single", code=3)["free"] == 8


def test_memory_of_another_kind_is_given_only_where_the_request_names_it(tmp_path: Path) -> None:
    inventory = inventory_of(even_rows(1, 1, 1, 2, 1), more_nodes=[1], memory={0: GIB, 1: 4 * GIB})
    nodes = tuple(replace(node, kind="gpu") if node.id else node for node in inventory.numa_nodes)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(to_document(replace(inventory, numa_nodes=nodes))))
    assert answer(path, "--memory", "2Gi", code=3)["free"] == GIB
    assert answer(path, "--memory", "2Gi", "--memory-kind", "gpu")["memory"] == {"1": 2 * GIB}
    (line,) = batch(path, b'{"memory":"2Gi","memory_kind":"gpu"}')
    assert line["memory"] == {"1": 2 * GIB}
    assert "'rom': expected dram, hbm" in complaint(place(path, "--memory", "2Gi", "--memory-kind", "rom"))


def test_the_table_says_the_same(machine: Path) -> None:
    done = place(machine, "--cpus", "2", "--hugepages", "1Gi=1")
    assert done.returncode == 0
    assert b"0,8" in done.stdout
    assert b"hugepages 1Gi" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cpus", "-1"], ["--cpus", "-1", "whole number"]),
        (["--cpus", "two"], ["--cpus", "two", "whole number"]),
        (["--cpus", "9" * 5000], ["--cpus", "999", "whole number"]),
        (["--cpus", "٣"], ["--cpus", "whole number"]),
        (["--held", "3-1"], ["held", "3-1", "backwards"]),
        (["--held", "99999999"], ["held", "99999999", "8191"]),
        (["--reserved", "0-"], ["reserved", "0-", "missing"]),
        (["--reserved", "a"], ["reserved", "'a'"]),
        (["--reserved", "0,16"], ["cannot use reserved '0,16': this machine can have CPUs 0-15, not 16"]),
        (["--held", "15-17"], ["cannot use held '15-17': this machine can have CPUs 0-15, not 16-17"]),
        (["--option", "full-pcpu-only"], ["option", "full-pcpu-only", "full-pcpus-only"]),
        (["--numa", "any"], ["any", "single, restricted, best-effort"]),
        (["--hugepages", "2Mi"], ["--hugepages", "2Mi", "SIZE=COUNT"]),
        (["--hugepages", "2Xi=1"], ["2Xi", "Mi"]),
        (["--hugepages", "2Mi=-3"], ["--hugepages", "2Mi=-3"]),
        (["--memory", "much"], ["much"]),
        (["--devices", "gpu"], ["--devices", "gpu", "KIND=N"]),
        (["--devices", "gpu=1.5"], ["--devices", "gpu=1.5"]),
        (["--hugepages", "3Mi=1"], ["hugepages of 3Mi", "the sizes of this machine are 2Mi, 1Gi"]),
        (["--state", "/nowhere"], ["--state", "/nowhere"]),
        (["--near", "gpu7"], ["near", "gpu7"]),
        (["--batch", "/nowhere"], ["--batch", "/nowhere"]),
        (["--batch", "/"], ["--batch", "/"]),
        (["--root", "/"], ["--inventory", "--root"]),
        (["--nonsense"], ["--nonsense"]),
        (["-o", "xml"], ["xml"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_bad_input_exits_with_2_and_one_line(machine: Path, words: list[str], expected: list[str]) -> None:
    line = complaint(place(machine, *words))
    assert len(line) < 400
    for part in expected:
        assert part in line


def batch(machine: Path, *lines: bytes, words: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    done = place(machine, "--batch", "-", *words, stdin=b"\n".join(lines))
    assert (done.returncode, done.stderr) == (0, b"")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_batch_answers_line_by_line(machine: Path) -> None:
    found = batch(machine, b'{"cpus":2}', b'{"cpus":99}', b'{"hugepages":{"1Gi":3},"cpus":1,"numa":"single","near":[]}')
    assert found[0]["cpus"] == "0,8"
    assert (found[1]["want"], found[1]["free"]) == (99, 16)
    assert found[2]["hugepages"] == {"1Gi": {"0": 3}}


BAD_LINES = (
    b"nonsense",
    b"[]",
    b"3",
    b'{"cpus":"two"}',
    b'{"cpus":1.5}',
    b'{"cpus":-1}',
    b'{"cpus":true}',
    b'{"cpus":null}',
    b'{"cpu":1}',
    b'{"cpus":99999999999999999999999999}',
    b'{"cpus":1e999}',
    b'{"held":"3-1"}',
    b'{"held":"16"}',
    b'{"held":"0\\u0000"}',
    b'{"options":["nope"]}',
    b'{"options":"full-pcpus-only"}',
    b'{"numa":"any"}',
    b'{"hugepages":{"2Mi":-1}}',
    b'{"hugepages":{"two":1}}',
    b'{"devices":{"gpu":"1"}}',
    b'{"near":["gpu9"]}',
    b'{"memory":"-1"}',
    b'{"cpus":1',
    b'{"cpus":1}{"cpus":1}',
    b"\x00",
    b'{"near":["\xff"]}',
    b"\xff\xfe",
    b"[" * 5000,
)


def test_a_malformed_line_is_an_answer_with_its_number_and_the_rest_goes_on(machine: Path) -> None:
    good = b'{"cpus":1}'
    found = batch(machine, *(line for bad in BAD_LINES for line in (bad, good)))
    assert len(found) == 2 * len(BAD_LINES)
    for number, (one, after) in enumerate(zip(found[::2], found[1::2], strict=True)):
        assert list(one) == ["error", "line"], BAD_LINES[number]
        assert one["line"] == 2 * number + 1
        assert one["error"].startswith(f"line {one['line']}: ")
        assert len(one["error"]) < 600
        assert after["cpus"] == "0"


def test_blank_lines_are_passed_over_and_counted(machine: Path) -> None:
    found = batch(machine, b"", b"   ", b'{"cpus":1}', b"\r", b"oops\r", b"")
    assert len(found) == 2
    assert found[1]["line"] == 5
    assert batch(machine) == []


def test_a_batch_takes_what_it_leaves_out_from_the_command_line(machine: Path) -> None:
    found = batch(machine, b'{"cpus":2}', b'{"cpus":2,"held":""}', words=("--held", "0"))
    assert [one["cpus"] for one in found] == ["1,9", "0,8"]


def test_huge_requests_are_refused_not_searched(machine: Path) -> None:
    found = batch(machine, b'{"cpus":1000000000000}', b'{"hugepages":{"1Gi":1000000000000}}', b'{"memory":"9Ti"}')
    assert [one["free"] for one in found][:2] == [16, 8]
    assert all("refused" in one for one in found)


def test_ten_thousand_requests_are_answered_in_order(machine: Path, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(f'{{"cpus":{1 + n % 16},"held":"{n % 16}"}}\n' for n in range(10_000)))
    start = time.monotonic()
    done = place(machine, "--batch", str(path))
    print(f"10,000 requests in {time.monotonic() - start:.1f} s")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 10_000
    assert "refused" in answers[15]
    assert answers[0]["cpus"] == "8"
