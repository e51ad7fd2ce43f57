"""A file that is mounted by itself and replaced on the host: what is seen is the old one, and that is noticed."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.errors import InputError
from nodeagent.kube.kubelet_files import config as kubelet_config
from nodeagent.kube.kubelet_files import mounted_file as mountedfile
from nodeagent.kube.kubelet_files.claim_state import STATE_FILE, prepared


@pytest.fixture
def replaced(tmp_path: Path) -> Iterator[Path]:
    """A path at which an inode is seen that no folder contains any longer, as such a mount shows it."""
    path = tmp_path / "config.yaml"
    path.write_text("cpuManagerPolicy: none\n")
    with path.open() as file:
        path.with_name("new").write_text("cpuManagerPolicy: static\n")
        path.with_name("new").rename(path)
        yield Path(f"/proc/self/fd/{file.fileno()}")


def test_a_kubelet_configuration_that_was_replaced_is_not_believed(replaced: Path) -> None:
    """It would say that kubelet does not manage CPUs, long after it does."""
    with pytest.raises(InputError, match=rf"cannot read {replaced}: it was replaced on the host after it was mounted"):
        kubelet_config.read(str(replaced), "")


def test_a_state_file_that_was_replaced_says_nothing(replaced: Path, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).symlink_to(replaced)
    assert prepared(tmp_path, "driver") is None


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    """Another process writes it again all the time."""
    path = tmp_path / "state"
    path.write_text("0")
    script = "import os, sys, pathlib\nwhile True:\n pathlib.Path('new').write_text('1')\n os.rename('new', 'state')"
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path) as writer:
        try:
            seen = {mountedfile.read(path) for _ in range(20_000)}
        finally:
            writer.kill()
    assert b"1" in seen and seen <= {b"0", b"1"}


def test_a_real_mount_of_one_file_is_noticed(tmp_path: Path) -> None:
    """As a pod's hostPath of type File is made."""
    script = f"""
mount --bind host mounted
echo new >draft && mv draft host
exec {sys.executable} -c 'import json, pathlib
from nodeagent.kube.kubelet_files import mounted_file as mountedfile
try: mountedfile.read(pathlib.Path("mounted"))
except OSError as error: print(json.dumps([error.errno, error.strerror]))'
"""
    for name in ("host", "mounted"):
        (tmp_path / name).write_text("old")
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode and "ermitted" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    number, text = json.loads(done.stdout)
    assert number == errno.ESTALE and "restart the agent's pod" in text
