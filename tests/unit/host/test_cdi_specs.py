"""The device nodes behind CDI devices, whichever program wrote the spec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nodeagent.host.cdi_specs import LARGEST_SPEC_BYTES, nodes_of

FIRST, SECOND = "k8s.gpu.example.com/device=gpu-0", "k8s.gpu.example.com/device=gpu-1"
SPEC = {
    "cdiVersion": "0.6.0",
    "kind": "k8s.gpu.example.com/device",
    "devices": [
        {"name": "gpu-0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}},
        {"name": "gpu-1", "containerEdits": {"deviceNodes": [{"path": "/dev/a", "hostPath": "/dev/nvidia1"}]}},
        {"name": "all", "containerEdits": {"env": ["A=b"]}},
    ],
    "containerEdits": {"deviceNodes": [{"path": "/dev/nvidiactl"}]},
}
YAML = """
kind: k8s.gpu.example.com/device
devices:
  - name: gpu-1
    containerEdits:
      deviceNodes:
        - path: /dev/nvidia1
"""


def test_a_device_stands_for_its_own_nodes_and_those_of_all(tmp_path: Path) -> None:
    """By the path on the host."""
    (tmp_path / "some.json").write_text(json.dumps(SPEC))
    assert nodes_of([tmp_path], {FIRST, SECOND, "k8s.gpu.example.com/device=gpu-9", "other/kind=x"}) == {
        FIRST: ("/dev/nvidiactl", "/dev/nvidia0"),
        SECOND: ("/dev/nvidiactl", "/dev/nvidia1"),
    }


def test_specs_may_be_yaml_and_lie_in_several_folders(tmp_path: Path) -> None:
    """A folder that is not there is none."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.yaml").write_text(YAML)
    assert nodes_of([tmp_path / "none", tmp_path / "a"], {SECOND}) == {SECOND: ("/dev/nvidia1",)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '{"kind": 7}',
        '{"kind": "k/c", "devices": 1}',
        "[" * 100_000,
        "\xff",
        " " * (LARGEST_SPEC_BYTES + 1),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_that_is_no_spec_costs_no_other(tmp_path: Path, text: str, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(text.encode("latin-1"))
    (tmp_path / "b.json").write_text(json.dumps(SPEC))
    (tmp_path / "c.json").mkdir()
    (tmp_path / "d.json").symlink_to("nowhere")
    (tmp_path / "e.txt").write_text(json.dumps({**SPEC, "devices": []}))
    assert nodes_of([tmp_path], {FIRST}) == {FIRST: ("/dev/nvidiactl", "/dev/nvidia0")}
