"""`nodeagent import sriov`: what it reads, what it answers and writes, and its exit code."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.cli import main
from nodeagent.config.load import load

GOOD = {"resourceList": [{"resourceName": "dpdk", "selectors": [{"vendors": ["8086"], "drivers": ["vfio-pci"]}]}]}
LACKING = {"resourceList": [{"resourceName": "x", "selectors": {"vendors": ["8086"], "ddpProfiles": ["GTP"]}}]}


def config_map(**entries: Any) -> str:
    data = {name: json.dumps(one) for name, one in entries.items()}
    return yaml.safe_dump({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": data})


def written(folder: Path, text: str) -> str:
    (folder / "in").write_text(text)
    return str(folder / "in")


@pytest.mark.parametrize("text", [json.dumps(GOOD), json.dumps(GOOD, indent="\t"), yaml.safe_dump(GOOD)])
def test_a_file_becomes_a_configuration_that_the_agent_takes(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["import", "sriov", written(tmp_path, text), "--out", str(out)]) == 0
    config = load(out / "config.yaml")
    assert [(one.name, one.kind) for one in config.served] == [("intel.com/dpdk", "nic")]
    assert "next: nodeagent config check" in capsys.readouterr().out


def test_what_has_no_equivalent_is_in_the_answer_in_the_file_and_in_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, json.dumps(LACKING))
    assert main(["import", "sriov", file, "--out", str(tmp_path / "out"), "-o", "json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["complete"] is False
    assert "no-equivalent" in [one["state"] for one in answer["entries"]]
    first = (tmp_path / "out" / "config.yaml").read_text().splitlines()[0]
    assert first.startswith("# no-equivalent: $.resourceList[0].selectors.ddpProfiles")


def test_a_dry_run_writes_nothing_and_shows_what_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "sriov", written(tmp_path, json.dumps(GOOD)), "--resource-prefix", "a.example.com"]) == 0
    shown = capsys.readouterr().out
    assert "# config.yaml" in shown and "a.example.com/dpdk" in shown
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


def test_a_config_map_is_read_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(config_map(**{"config.json": GOOD}).encode())))
    assert main(["import", "sriov", "-", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["configuration"]["resources"][0]["name"] == "intel.com/dpdk"


def test_of_several_entries_one_has_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, config_map(a=GOOD, b=LACKING))
    assert main(["import", "sriov", file]) != 0
    assert "give one with --entry, it has a, b" in capsys.readouterr().err
    assert main(["import", "sriov", file, "--entry", "a"]) == 0
    assert main(["import", "sriov", file, "--entry", "c"]) != 0


def test_a_file_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    assert main(["import", "sriov", written(tmp_path, json.dumps(GOOD)), "--out", str(tmp_path)]) != 0
    assert "it is there already" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "mine"


NESTED = '{"a": ' + "[" * 960 + "]" * 960 + "}"
BOMB = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))


@pytest.mark.parametrize(
    "text",
    [
        *("{", "- [", "{a: b", "x: [1", "a: 2024-13-45", "a: !!int x", "a: !!bool x", "a: 1\n---\nb: 2", NESTED),
        '{"resourceList": [], "\\ud800": 1}',
        f"a: &a [{', '.join('x' * 10)}]\n{BOMB}resourceList: []",
        f"resourceList: []\n#{'x' * (4 << 20)}\nb: 1",
    ],
)
def test_a_text_that_is_neither_is_an_error_with_its_file(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "sriov", written(tmp_path, text)]) == 2
    said = capsys.readouterr().err
    assert said.count(f"cannot read {tmp_path / 'in'}: ") == 1 and len(said) < 1000


def test_nothing_of_a_large_file_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"resourceList: []\n#{'x' * (1 << 20)}\nlast: 1\n"
    assert main(["import", "sriov", written(tmp_path, text), "-o", "json"]) == 3
    assert [one["place"] for one in json.loads(capsys.readouterr().out)["entries"]] == ["$.last"]


@pytest.mark.parametrize(
    "one",
    [{"deviceType": ["x"]}, {"deviceType": {"x": 1}}, {"selectors": {"pfNames": [f"eth0#{'9' * 5000}"]}}],
)
def test_a_value_of_the_wrong_type_is_an_error(
    one: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, json.dumps({"resourceList": [{"resourceName": "a", **one}]}))
    assert main(["import", "sriov", file]) == 2
    assert "cannot translate $.resourceList[0]" in capsys.readouterr().err
