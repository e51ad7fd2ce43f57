"""Which kubelet is this node's, how it was started, and what is assumed where that cannot be seen."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from nodeagent.config.operation import KubeletConfigConfig
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.kubelet import Kubelet, Started, look
from tests.doubles.kubelet_process import ends, kubelet, process, put


class Node:
    """A captured machine with kubelet's folder in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.dir = folder / "kubelet"
        self.dir.mkdir(parents=True)
        self.hidden(False)

    def hidden(self, hidden: bool) -> None:
        """Whether the agent is in a PID namespace of its own."""
        link = self.root / "proc/self/ns/pid"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to("pid:[4026532201]" if hidden else "pid:[4026531836]")

    def look(self, before: Started | None = None, **named: str) -> Kubelet:
        return look(SysFs(self.root), self.dir, KubeletConfigConfig(**named), before)

    def reserved(self, **named: str) -> str:
        found = self.look(**named)
        assert found.cpus is not None, found.cpus_error
        return str(found.cpus.reserved)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


# ---------------------------------------------------------------- its command line


def test_the_files_are_those_of_the_command_line(node: Node) -> None:
    """And no others: what lies where it usually does is not kubelet's unless it is told so."""
    put(node.dir / "config.yaml", "reservedSystemCPUs: '1'\n")
    put(node.root / "etc/kubernetes/kubelet.conf.d/1.conf", "reservedSystemCPUs: '2'\n")
    put(node.root / "etc/k.yaml", "reservedSystemCPUs: '3'\n")
    put(node.root / "etc/k.d/1.conf", "reservedSystemCPUs: '0,8'\n")
    kubelet(node.root, node.dir, "--config=/etc/k.yaml", "--config-dir", "/etc/k.d")
    assert node.reserved() == "0,8"
    assert node.look().config.sources == (f"{node.root}/etc/k.yaml", f"{node.root}/etc/k.d/1.conf")
    kubelet(node.root, node.dir, "--config=/etc/k.yaml")
    assert node.reserved() == "3"
    kubelet(node.root, node.dir)
    assert node.reserved() == ""


def test_a_flag_counts_more_than_any_file(node: Node) -> None:
    put(node.root / "k.yaml", "reservedSystemCPUs: '3'\ncpuManagerPolicy: none\n")
    kubelet(node.root, node.dir, "--config", "/k.yaml", "--reserved_cpus=4-5", "--cpu-manager-policy=static")
    found = node.look().cpus
    assert found is not None
    assert (found.reserved, found.static) == (CpuSet.parse("4-5"), True)
    assert found.policy_source == "--cpu-manager-policy of kubelet (process 812)"


def test_a_kubelet_that_was_started_with_other_flags_is_read_anew(node: Node) -> None:
    ends(kubelet(node.root, node.dir, "--reserved-cpus=1"))
    kubelet(node.root, node.dir, "--reserved-cpus=2", pid=900)
    found = node.look()
    assert found.started is not None and found.cpus is not None
    assert (found.started.pid, str(found.cpus.reserved)) == (900, "2")


def test_a_relative_path_starts_in_kubelets_working_directory(node: Node) -> None:
    put(node.root / "opt/node/k.yaml", "reservedSystemCPUs: '3'\n")
    put(node.root / "opt/d/1.conf", "reservedSystemCPUs: '5'\n")
    kubelet(node.root, node.dir)
    process(node.root, 812, "kubelet", "--config=k.yaml", cwd="/opt/node")
    assert node.reserved() == "3"
    process(node.root, 812, "kubelet", "--config=k.yaml", "--config-dir=../d", cwd="/opt/node")
    assert node.reserved() == "5"


def test_a_relative_path_from_a_directory_that_may_not_be_read_is_an_error(node: Node) -> None:
    """The admin can name the file."""
    kubelet(node.root, node.dir)
    process(node.root, 812, "kubelet", "--config=k.yaml", cwd=None).joinpath("cwd").unlink()
    found = node.look()
    assert found.cpus is None and found.memory is None
    assert found.cpus_error.startswith("cannot find --config of kubelet (process 812): 'k.yaml' is relative")
    file = put(node.root / "k.yaml", "reservedSystemCPUs: '3'\n")
    assert node.reserved(file=str(file)) == "3"


@pytest.mark.parametrize("words", [("/opt/hyperkube", "kubelet"), ("kubelet",), ("/usr/local/bin/kubelet",)])
def test_a_kubelet_is_known_by_the_name_of_its_program(words: tuple[str, ...], node: Node) -> None:
    kubelet(node.root, node.dir)
    process(node.root, 812, *words, "--reserved-cpus=3", name=Path(words[0]).name)
    assert node.reserved() == "3"


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (("/bin/sh", "kubelet", "--reserved-cpus=3"), {"name": "kubelet-wrapper"}),
        (("/kubelet-csr-approver", "--reserved-cpus=3"), {"name": "kubelet-csr-app"}),
        (("/opt/hyperkube", "proxy"), {"name": "hyperkube"}),
        (("kubelet", "--version"), {}),
        (("kubelet", "--reserved-cpus=3"), {"parent": 812}),
        ((), {}),
    ],
)
def test_what_only_looks_like_a_kubelet_is_none(words: tuple[str, ...], more: dict[str, Any], node: Node) -> None:
    """Another program, a look at its version, a child that kubelet is just starting, one that has ended."""
    kubelet(node.root, node.dir, "--reserved-cpus=1")
    process(node.root, 913, *words, **more)
    assert node.reserved() == "1"


def test_a_file_of_the_command_line_that_is_not_there_is_an_error(node: Node) -> None:
    """As in a container that does not have it mounted: it is not known then what kubelet reserves."""
    kubelet(node.root, node.dir, "--config=/home/kubernetes/kubelet-config.yaml")
    found = node.look()
    assert found.cpus is None
    assert found.cpus_error == f"cannot read {node.root}/home/kubernetes/kubelet-config.yaml: No such file or directory"


# ---------------------------------------------------------------- several, others, none


def test_of_several_kubelets_none_is_guessed(node: Node) -> None:
    kubelet(node.root, node.dir, "--reserved-cpus=1")
    kubelet(node.root, node.dir, "--reserved-cpus=2", pid=900)
    found = node.look()
    assert found.cpus is None and found.memory is None
    assert found.cpus_error == (
        f"cannot determine which kubelet is this node's: processes 812 and 900 both have folder {node.dir}"
    )


def test_a_kubelet_with_another_folder_is_not_this_nodes(node: Node) -> None:
    """With one that is, it does not matter; alone it is reported, and what is usual is assumed."""
    file = put(node.dir / "config.yaml", "reservedSystemCPUs: '4'\n")
    process(node.root, 813, "kubelet", "--root-dir=/srv/other", "--reserved-cpus=7")
    assert node.reserved() == "4"
    assert node.look().unseen == (
        f"kubelet (process 813) has folder /srv/other, not {node.dir}, and is not looked at: its configuration is "
        f"taken from {file}; kubeletConfig names where it lies"
    )
    kubelet(node.root, node.dir, "--reserved-cpus=1")
    assert (node.reserved(), node.look().unseen) == ("1", "")


def test_a_folder_is_the_same_through_a_link(node: Node) -> None:
    (node.root / "data").mkdir()
    (node.root / "data/kubelet").symlink_to(node.dir)
    process(node.root, 812, "kubelet", "--root-dir", "/data/kubelet", "--reserved-cpus=7")
    assert node.reserved() == "7"


@pytest.mark.parametrize(
    "words",
    [("/usr/local/bin/k3s server", "", ""), ("/bin/k3s", "agent", "--x"), ("/snap/microk8s/1/kubelite", "--a=b")],
)
def test_a_kubelet_inside_another_program_has_no_flags_to_see(words: tuple[str, ...], node: Node) -> None:
    """Which is reported, with what is assumed instead; an admin who names the files knows it."""
    drop_in = put(node.root / "var/lib/rancher/k3s/agent/etc/kubelet.conf.d/1.conf", "reservedSystemCPUs: '3'\n")
    name = Path(words[0].split()[0]).name
    process(node.root, 77, *words, name=name)
    found = node.look()
    assert found.unseen == (
        f"kubelet runs inside {name} (process 77) and its command line shows no flags: its defaults are assumed; "
        "kubeletConfig names where it lies"
    )
    named = node.look(drop_ins=str(drop_in.parent))
    assert named.cpus is not None
    assert (str(named.cpus.reserved), named.unseen) == ("3", "")


def test_k3s_that_only_runs_a_tool_has_no_kubelet(node: Node) -> None:
    process(node.root, 77, "k3s", "kubectl", "get", "pods", name="k3s")
    assert node.look().unseen == ""


def test_from_another_pid_namespace_what_is_usual_is_assumed_and_reported(node: Node) -> None:
    """kubeadm's file, and the drop-ins where Kubernetes' documentation has them."""
    file = put(node.dir / "config.yaml", "reservedSystemCPUs: '1'\n")
    drop_in = put(node.root / "etc/kubernetes/kubelet.conf.d/1.conf", "reservedSystemCPUs: '0,8'\n")
    assert (node.reserved(), node.look().unseen) == ("0,8", "")
    node.hidden(True)
    assert node.reserved() == "0,8"
    assert node.look().unseen == (
        "kubelet's command line cannot be seen from this PID namespace (hostPID: true shows it): its configuration is "
        f"taken from {file}, {drop_in}; kubeletConfig names where it lies"
    )
    assert node.look(file=str(file)).unseen == ""
    kubelet(node.root, node.dir)
    assert node.look().unseen == ""


def test_where_nothing_is_known_of_a_kubelet_nothing_is_assumed(node: Node) -> None:
    found = node.look()
    assert found.cpus is not None and found.memory is not None
    assert (found.started, found.unseen, found.config.known) == (None, "", False)
    assert (found.cpus.reserved, found.cpus.managed, found.memory.static) == (EMPTY, EMPTY, False)


def test_while_kubelet_is_away_the_flags_that_it_was_last_started_with_hold(node: Node) -> None:
    """Its files are read again all the same."""
    file = put(node.root / "k.yaml", "cpuManagerPolicy: none\n")
    before = kubelet(node.root, node.dir, "--config=/k.yaml", "--reserved-cpus=3")
    seen = node.look().started
    ends(before)
    process(node.root, 813, "kubelet", "--root-dir=/srv/other", "--reserved-cpus=7")
    put(file, "cpuManagerPolicy: static\n")
    found = node.look(seen)
    assert found.cpus is not None
    assert (str(found.cpus.reserved), found.cpus.static, found.unseen) == ("3", True, "")


def test_named_files_count_instead_of_those_of_the_command_line(node: Node) -> None:
    """As where they are mounted elsewhere; the flags count on top of them."""
    file = put(node.root / "mnt/k.yaml", "reservedSystemCPUs: '3'\ncpuManagerPolicy: none\n")
    drop_in = put(node.root / "mnt/d/1.conf", "reservedSystemCPUs: '5'\n")
    kubelet(node.root, node.dir, "--config=/none.yaml", "--config-dir=/none.d", "--cpu-manager-policy=static")
    found = node.look(file=str(file), drop_ins=str(drop_in.parent))
    assert found.cpus is not None
    assert (str(found.cpus.reserved), found.cpus.static) == ("5", True)


def test_a_named_file_that_is_not_there_is_an_error(node: Node) -> None:
    assert node.look(file="/nowhere/k.yaml").cpus_error == "cannot read /nowhere/k.yaml: No such file or directory"


def test_one_manager_that_cannot_be_understood_does_not_hide_the_other(node: Node) -> None:
    (node.dir / "memory_manager_state").write_text("{")
    found = node.look()
    assert found.cpus is not None
    assert found.memory is None
    assert found.memory_error.startswith(f"cannot read {node.dir}/memory_manager_state: ")


# ---------------------------------------------------------------- on the machine itself

PYTHON = Path(sys.executable).resolve()
LISTEN = """
import pathlib, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.bind(sys.argv[1])
    server.listen()
    print("listening", flush=True)
    sys.stdin.read()
"""


async def listening(program: Path, path: Path) -> asyncio.subprocess.Process:
    """A process that is called kubelet and listens on a socket."""
    words = ("kubelet", "-c", LISTEN, str(path), "--root-dir=/elsewhere", "--reserved-cpus=5")
    pipe = asyncio.subprocess.PIPE
    started = await asyncio.create_subprocess_exec(*words, executable=program, stdin=pipe, stdout=pipe)
    assert started.stdout is not None
    assert await started.stdout.readline() == b"listening\n"
    return started


async def test_the_kubelet_that_listens_on_the_socket_is_this_nodes(folder: Path) -> None:
    """A real process, whatever folder its flags name, and however many others there are."""
    (folder / "kubelet").symlink_to(PYTHON)
    kubelet_dir = folder / "dir"
    socket = kubelet_dir / "device-plugins/kubelet.sock"
    socket.parent.mkdir(parents=True)
    mine = await listening(folder / "kubelet", socket)
    other = await listening(folder / "kubelet", folder / "other.sock")
    try:
        found = look(SysFs("/"), kubelet_dir)
        assert found.started is not None and found.cpus is not None, found
        assert (found.started.pid, str(found.cpus.reserved)) == (mine.pid, "5")
        assert found.started.folder == str(Path.cwd())
    finally:
        for one in (mine, other):
            one.kill()
            await one.wait()
    shutil.rmtree(kubelet_dir)
    assert look(SysFs("/"), kubelet_dir).started is None
