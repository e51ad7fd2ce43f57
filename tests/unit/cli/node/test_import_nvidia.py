"""`nodeagent import nvidia`: what it reads, what it answers and writes, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.cli import main
from tests.builders.machines import machine
from tests.support.paths import DATA

FILES = DATA / "nvidia"
PLUGIN, CLAIMS, VALUES = (str(FILES / name) for name in ("plugin-shared.yaml", "claims.yaml", "dra-values.yaml"))
MAP = str(FILES / "plugin-configmap.yaml")


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(machine(tmp_path / "root", "1s1n4c"))


def run(*words: str) -> int:
    return main(["import", "nvidia", *words])


def answer(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_without_out_nothing_is_written_and_everything_is_shown(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(PLUGIN, "--root", root, "--mig-profile", "1g.5gb") == 0
    text = capsys.readouterr().out
    assert "$.sharing.timeSlicing.resources[0].replicas" in text
    assert "- name: nvidia.com/mig-1g.5gb\n" in text
    assert text.endswith("next: run it again with --out DIR\n")
    assert [one.name for one in tmp_path.iterdir()] == ["root"]


def test_what_is_written_passes_the_agent_s_own_check(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(PLUGIN, VALUES, CLAIMS, "--root", root, "--mig-profile", "1g.5gb", "--out", str(out), "-o", "json") == 0
    found = answer(capsys)
    assert found["complete"] and found["written"] == [str(out / name) for name in ("config.yaml", "claims.yaml")]
    assert main(["config", "check", str(out / "config.yaml"), "--root", root]) == 0
    assert "nvidia.com/gpu.shared, nvidia.com/mig-1g.5gb\n" in capsys.readouterr().out
    objects = list(yaml.safe_load_all((out / "claims.yaml").read_text()))
    assert [one["kind"] for one in objects] == ["ResourceClaimTemplate", "ResourceClaim", "ResourceClaim", "Pod"]
    assert "nvidia" not in yaml.safe_dump_all(objects)
    assert run(PLUGIN, "--root", root, "--out", str(out)) == 2
    assert "it is there already" in capsys.readouterr().err


def test_what_has_no_equivalent_is_an_exit_code_and_stands_in_the_file(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(MAP, "--entry", "inference", "--root", root, "--out", str(tmp_path / "out"), "-o", "json") == 3
    found = answer(capsys)
    assert not found["complete"]
    lost = {one["place"] for one in found["entries"] if one["state"] in ("no-equivalent", "in-part")}
    assert "inference: $.flags.gdrcopyEnabled" in lost
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert text.startswith("# no-equivalent: inference: $.flags.gdrcopyEnabled true: serve /dev/gdrdrv")
    (made,) = yaml.safe_load_all((tmp_path / "out" / "classes.yaml").read_text())
    assert made["kind"] == "DeviceClass"


def test_a_key_cannot_write_lines_into_the_configuration(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps({"version": "v1", "a\ndomain: x": "b\nc"}))
    assert run(str(file), "--root", root, "--out", str(tmp_path / "out")) == 3
    first, second = (tmp_path / "out" / "config.yaml").read_text().splitlines()[:2]
    assert first == "# unknown: $.a domain: x b c: the format does not have this key"
    assert second == "resources:"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ([MAP], "cannot choose an entry"),
        ([MAP, "--entry", "none"], "it has inference, plain"),
        ([PLUGIN, PLUGIN], "has the configuration of the device plugin already"),
        (["/none"], "cannot read /none: No such file"),
        (["values"], "values of the chart of NVIDIA's device plugin"),
        (["list"], "expected a configuration of NVIDIA's device plugin"),
        (["text"], "expected a configuration of NVIDIA's device plugin"),
        (["empty"], "it is empty"),
    ],
)
def test_what_cannot_be_read_is_named(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str], error: str
) -> None:
    for name, text in {"values": "migStrategy: none", "list": "[1]", "text": "colour: red", "empty": ""}.items():
        (tmp_path / name).write_text(text)
    words = [str(tmp_path / one) if one in ("values", "list", "text", "empty") else one for one in files]
    assert run(*words, "--root", root) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "version: v1\nflags: {deviceDiscoveryStrategy: [a]}",
        "version: v1\nflags: {plugin: {nvidiaCTKPath: []}}",
        "featureGates: {}\naltProcDevices: []",
        "featureGates: {}\nnvidiaCDIHookPath: {}",
    ],
)
def test_a_list_in_place_of_a_text_has_no_equivalent(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "p.yaml").write_text(text)
    assert run(str(tmp_path / "p.yaml"), "--root", root) == 3
    assert "no-equivalent" in capsys.readouterr().out
