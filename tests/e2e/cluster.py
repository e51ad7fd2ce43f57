"""A whole Kubernetes node from a folder of binaries, on loopback, with the agent on it: real processes, one start for
all tests of a file.

    NODEAGENT_E2E_BIN=/folder make test TESTS=tests/e2e

The folder holds etcd, kube-apiserver, kube-scheduler, kube-controller-manager, kubelet, containerd,
containerd-shim-runc-v2 and ctr; runc may be there or in PATH. Also needed: root, openssl and a static busybox; for the
tests of GPUs' health a C compiler too. What is missing is said, and the tests are skipped. Written for Kubernetes 1.36,
no feature gate set unless a file of tests says so, and containerd 2. NODEAGENT_E2E_LOGS=/folder keeps the logs of all
processes there.

The node has mount and PID namespaces of its own (inside.py), so that its kubelet has a /var/lib/kubelet for itself, and
nothing of it is left over even where a test run is killed. What the kernel has only once (cgroups, a few sysctls) is
put back at the end, or by the next run; a lock allows one run at a time. A machine on which a kubelet is at work is
left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import nodefiles
from tests.e2e.forward import forwarding
from tests.e2e.grounds import PREFIX, Shared, busybox, missing, path
from tests.e2e.kubeapi import KubeApi, until
from tests.e2e.nodefiles import NODE, PORTS
from tests.e2e.programs import API_PORT, API_SERVICE, command
from tests.support.paths import NVML_DOUBLE
from tests.support.running import CHECKOUT

ADMIN, KUBELET = "e2e-admin-token", "e2e-kubelet-token"
STEP_S, STOP_S = 90.0, 20.0
GATED = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet")


class Cluster:
    """What tests touch of the node: its API server, its agent, its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cdi = folder / "cdi"
        self.logs = folder / "logs"
        self.xid_file = folder / "xid"
        self.gates: dict[str, tuple[str, ...]] = {}
        """Feature gates that are turned on, by program, from its next start on."""
        self.apis: tuple[str, ...] = ()
        """Groups and versions that the API server has off by default, and is to serve."""
        self.resources = nodefiles.RESOURCES
        self._ports = {name: free_port() for name in ("api", "etcd", "peer", "kubelet")}
        self.api = KubeApi(self._ports["api"], ADMIN)
        self._inside: subprocess.Popen[str] | None = None
        for made in (self.cdi, self.logs, folder / "agent"):
            made.mkdir()

    # Processes

    def start(self, name: str, **env: str) -> None:
        """Start one of the node's programs, the first time or again."""
        env["PATH"] = path()
        if name.startswith("nodeagent"):
            env |= {"LD_LIBRARY_PATH": str(self.folder / "nvml"), "FAKE_NVML_XID": str(self.xid_file)}
        words = command(name, self.folder, self._ports, self.gates.get(name, ()))
        if name == "kube-apiserver" and self.apis:
            words.append(f"--runtime-config={','.join(f'{one}=true' for one in self.apis)}")
        self._ask("start", name, words, env, str(self.logs / f"{name}.log"))

    def send(self, name: str, how: signal.Signals) -> None:
        """Send one of the programs a signal that does not end it, such as SIGSTOP."""
        self._ask("signal", name, int(how))

    def wait(self, name: str, seconds: float = STOP_S) -> int:
        """The exit code of a program that ends by itself."""
        code = self._ask("wait", name, seconds)
        assert isinstance(code, int), f"{name} did not end within {seconds:g} s"
        return code

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> int:
        """The exit code, negative for a signal."""
        self._ask("signal", name, int(how))
        code = self._ask("wait", name, STOP_S)
        assert isinstance(code, int), f"{name} did not end within {STOP_S:g} s of {how.name}"
        return code

    def restart(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        self.stop(name, how)
        self.start(name)

    def run(self, name: str, *words: str, seconds: float = STOP_S) -> None:
        """Run a command in the node's namespaces to its end, for which it has that long. name: of its log."""
        self._ask("start", name, list(words), {"PATH": path()}, str(self.logs / f"{name}.log"))
        assert self.wait(name, seconds) == 0, (self.logs / f"{name}.log").read_text()

    def output(self, *words: str) -> str:
        """What a command prints that is run in the node's namespaces to its end."""
        log = self.logs / "command.log"
        log.unlink(missing_ok=True)
        self.run("command", *words)
        return log.read_text()

    def ctr(self, *words: str, seconds: float = STOP_S) -> None:
        """Run containerd's command in the namespace of kubelet's containers."""
        self.run("ctr", "ctr", "-a", f"{self.folder}/containerd.sock", "-n", "k8s.io", *words, seconds=seconds)

    def plug(self, path: str) -> None:
        """Make a device node on the node; /dev of the machine stays as it is."""
        self._ask("mknod", path)

    def unplug(self, path: str) -> None:
        self._ask("unlink", path)

    def _ask(self, *words: Any) -> Any:
        assert self._inside is not None and self._inside.stdin is not None and self._inside.stdout is not None
        self._inside.stdin.write(json.dumps(words) + "\n")
        self._inside.stdin.flush()
        answer = json.loads(self._inside.stdout.readline() or '{"error": "the namespaces have ended"}')
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["answer"]

    # Up and down

    def up(self) -> None:
        """Start everything but the agent; returns when the node is Ready."""
        self._write_files()
        self.start("etcd")
        self.start("containerd")
        until("etcd listens", lambda: _listens(self._ports["etcd"]), STEP_S)
        self.start("kube-apiserver")
        until("containerd has the image", self._import_image, STEP_S)
        until("the API server is ready", self.api.ready, STEP_S)
        for name in ("kube-controller-manager", "kube-scheduler", "kubelet"):
            self.start(name)
        until("there is a default service account", lambda: self.api.find(_ACCOUNT), STEP_S)
        until("the node is Ready", self._node_ready, STEP_S)

    def start_agent(self) -> None:
        """Start the agent as a process of the node; returns when its pools are published."""
        self.deploy()
        self.write_agent_config()
        self.start("nodeagent")
        self.agent_ready()

    def down(self, name: str) -> None:
        """End everything at once. name: of the folder that its logs are kept in."""
        if self._inside is not None and self._inside.stdin is not None and self._inside.stdout is not None:
            self._inside.stdin.close()
            self._inside.wait(STOP_S)
            self._inside.stdout.close()
        if kept := os.environ.get("NODEAGENT_E2E_LOGS"):
            shutil.copytree(self.logs, Path(kept) / name, dirs_exist_ok=True)

    def last_words(self) -> str:
        """The end of each log."""
        found = {path.stem: path.read_text(errors="replace")[-1500:] for path in sorted(self.logs.glob("*.log"))}
        return "".join(f"\n--- {name} ---\n{text}" for name, text in found.items())

    def enter(self) -> str:
        """Make the node's namespaces; why there can be none here, or ""."""
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words += [sys.executable, str(Path(__file__).with_name("inside.py"))]
        pipe = subprocess.PIPE
        cwd = CHECKOUT if (CHECKOUT / "nodeagent").exists() else None
        self._inside = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, cwd=cwd)
        try:
            self._ask("prepare", str(self.folder), PORTS)
        except OSError as error:
            return str(error)
        return ""

    def _write_files(self) -> None:
        f = self.folder
        nodefiles.write_machine(f / "machine")
        nodefiles.write_image(f / "image.tar", busybox() or Path())
        nodefiles.write_containerd(f)
        settings = nodefiles.kubelet_settings(f, self._ports["kubelet"])
        (f / "kubelet" / nodefiles.KUBELET_CONFIG.name).write_text(json.dumps(settings))
        nodefiles.write_kubeconfig(f / "admin.kubeconfig", self.api.port, ADMIN)
        nodefiles.write_kubeconfig(f / "kubelet.kubeconfig", self.api.port, KUBELET)
        tokens = (f"{ADMIN},admin,admin,system:masters", f"{KUBELET},system:node:{NODE},{NODE},system:nodes")
        (f / "tokens.csv").write_text("\n".join(tokens) + "\n")
        _run("openssl", "genrsa", "-out", f / "sa.key", "2048")
        _run("openssl", "rsa", "-in", f / "sa.key", "-pubout", "-out", f / "sa.pub")
        (f / "nvml").mkdir()
        if compiler := shutil.which("cc"):
            library = f / "nvml/libnvidia-ml.so.1"
            _run(compiler, "-shared", "-fPIC", "-fvisibility=hidden", "-o", library, NVML_DOUBLE)

    def _import_image(self) -> bool:
        words = ["ctr", "-a", f"{self.folder}/containerd.sock", "-n", "k8s.io", "images", "import"]
        self._ask("start", "ctr", [*words, f"{self.folder}/image.tar"], {"PATH": path()}, str(self.logs / "ctr.log"))
        return self._ask("wait", "ctr", STEP_S) == 0

    def _node_ready(self) -> bool:
        node = self.api.find(f"/api/v1/nodes/{NODE}") or {"status": {}}
        conditions = node["status"].get("conditions", [])
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    # The agent

    def deploy(self) -> None:
        """What is shipped for the API server, and a token as the agent's pod on this node would have."""
        for name in ("rbac.yaml", "admission.yaml", "deviceclasses.yaml"):
            for document in yaml.safe_load_all((CHECKOUT / "deploy" / name).read_text()):
                self.api.create(document)
        token = self.agent_token(NODE)
        ca = self.folder / "apicert/apiserver.crt"
        nodefiles.write_kubeconfig(self.folder / "agent.kubeconfig", self.api.port, token, ca)

    def agent_token(self, node: str) -> str:
        uid = self.api.call("GET", f"/api/v1/nodes/{node}")["metadata"]["uid"]
        bound = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}
        asked = {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1"}
        asked["spec"] = {"boundObjectRef": bound, "audiences": ["https://e2e"]}
        path = "/api/v1/namespaces/nodeagent/serviceaccounts/nodeagent/token"
        return str(self.api.call("POST", path, asked)["status"]["token"])

    def write_agent_config(self, **dra: Any) -> None:
        draft = self.folder / "agent/config.new"
        draft.write_text(json.dumps({**nodefiles.agent_config(self.folder, dra), "resources": self.resources}))
        draft.rename(self.folder / "agent/config.yaml")

    def status(self) -> dict[str, Any]:
        """The agent's status; {} while it does not answer."""
        found = self.ask_agent("/v1/status")
        return found if isinstance(found, dict) else {}

    def agent_ready(self) -> None:
        """Return once pods can get all that it serves."""

        def ready() -> bool:
            assert self._ask("ended", "nodeagent") is None, "the agent has ended"
            return bool(self.status().get("ready"))

        until("the agent is ready", ready)

    def agent_said(self, event: str, name: str = "nodeagent") -> list[dict[str, Any]]:
        """The lines of an agent's log with an event."""
        lines = (json.loads(line) for line in (self.logs / f"{name}.log").read_text().splitlines() if line[0] == "{")
        return [line for line in lines if line.get("event") == event]

    def grants(self) -> list[dict[str, Any]]:
        found = self.ask_agent("/v1/grants")
        assert isinstance(found, list), "the agent does not answer"
        return found

    def clear_health(self, device: str) -> None:
        """As an admin does."""
        where = ["--socket", str(self.folder / "agent/run/status.sock")]
        subprocess.run([sys.executable, "-m", "nodeagent", "health", *where, "clear", device], cwd=CHECKOUT, check=True)

    def ask_agent(self, page: str) -> Any:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(STOP_S)
            connection.connect(str(self.folder / "agent/run/status.sock"))
            connection.sendall(f"GET {page} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
            return json.loads(answer.partition(b"\r\n\r\n")[2])
        return None


_ACCOUNT = "/api/v1/namespaces/default/serviceaccounts/default"


@contextlib.contextmanager
def cluster(
    name: str,
    *,
    gates: tuple[str, ...] = (),
    apis: tuple[str, ...] = (),
    resources: list[dict[str, Any]] | None = None,
    agent: bool = True,
) -> Iterator[Cluster]:
    """A node that is up; the test is skipped, saying why, where there can be none. name: for kept logs. gates: turned
    on at every program of Kubernetes. apis: served though not by default. resources: what the agent serves, if not what
    it usually does. agent: whether it runs, as a process."""
    if reason := missing():
        pytest.skip(reason)
    with (
        contextlib.closing(Shared()) as shared,
        tempfile.TemporaryDirectory(prefix=f"{PREFIX}run-", ignore_cleanup_errors=True) as folder,
    ):
        if reason := shared.take(Path(folder)):
            pytest.skip(reason)
        made = Cluster(Path(folder))
        try:
            if reason := made.enter():
                pytest.skip(f"no namespaces for a node here: {reason}")
            made.gates, made.apis = dict.fromkeys(GATED, gates), apis
            made.resources = resources or made.resources
            made.up()
            with forwarding((API_SERVICE, API_PORT), ("127.0.0.1", made.api.port)):
                if agent:
                    made.start_agent()
                yield made
        except BaseException:
            sys.stderr.write(made.last_words())
            raise
        finally:
            made.down(name)


def free_port() -> int:
    """One of loopback that no program uses at this moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _run(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
