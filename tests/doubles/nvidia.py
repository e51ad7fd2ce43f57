"""NVIDIA's control daemon of MPS and nvidia-smi as real programs: `Programs.install` puts them into a folder.

The daemon is as strict as NVIDIA documents it (Multi-Process Service, Legacy MPS v2 Interface;
nvidia-cuda-mps-control(1)): `-f` or `-d`, one daemon for each pipe folder, commands over the socket `control`, limits
that are refused out of range, servers that it starts for clients and that outlive it, and `quit`, which waits for
servers that have clients unless it is given a time. nvidia-smi knows `compute-policy` and the compute mode.
"""

from __future__ import annotations

import json
import select
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTROL, SERVER, SMI = "nvidia-cuda-mps-control", "nvidia-cuda-mps-server", "nvidia-smi"

MPS_SOURCE = r'''
import fcntl, json, os, re, select, signal, socket, subprocess, sys, time
here = os.path.dirname(os.path.realpath(sys.argv[0]))
pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
def plan():
    try:
        with open(os.path.join(here, "plan.json")) as file:
            return json.load(file)
    except FileNotFoundError:
        return {}
def die(text):
    print(text, file=sys.stderr)
    sys.exit(1)

def client():
    """Send what stands on standard input to the daemon."""
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(os.path.join(pipe, "control"))
    except OSError:
        die("Cannot find MPS control daemon process")
    for line in sys.stdin:
        peer.sendall(b"command " + line.strip().encode() + b"\n")
        data = b""
        while not data.endswith(b"\0"):
            more = peer.recv(4096)
            if not more:
                if line.split()[:1] == ["quit"]:
                    sys.exit(0)
                die("The control daemon has closed the connection")
            data += more
        text = data[:-1].decode()
        if text.startswith("!"):
            die(text[1:])
        if text:
            print(text)

class Daemon:
    def __init__(self, multi_user):
        self.multi_user = multi_user
        self.devices = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        self.percent, self.limits = 100.0, {}
        self.servers = {}       # pid -> [uid, process, percent, limits]
        self.clients = {}       # socket -> server's pid
        self.buffers = {}

    def serve(self):
        self.lock = open(os.path.join(pipe, "control_lock"), "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            die("An instance of this daemon is already running")
        path = os.path.join(pipe, "control")
        if len(path.encode()) > 107:
            die("Failed to bind the control socket")
        if os.path.exists(path):
            os.unlink(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        os.chmod(path, 0o666)
        with open(os.path.join(pipe, "nvidia-cuda-mps-control.pid"), "w") as file:
            file.write(str(os.getpid()))
        self.listener.listen(64)
        while True:
            self.round()

    def round(self, wait=None):
        ready, _, _ = select.select([self.listener, *self.buffers], [], [], wait)
        for one in ready:
            if one is self.listener:
                peer, _ = self.listener.accept()
                self.buffers[peer] = b""
            else:
                self.read(one)

    def read(self, peer):
        try:
            data = peer.recv(4096)
        except OSError:
            data = b""
        if not data:
            self.buffers.pop(peer)
            self.clients.pop(peer, None)
            return peer.close()
        self.buffers[peer] += data
        while peer in self.buffers and b"\n" in self.buffers[peer]:
            line, _, self.buffers[peer] = self.buffers[peer].partition(b"\n")
            self.take(peer, line.decode().split())

    def take(self, peer, words):
        if words[0] == "client":
            return self.connect(peer, int(words[1]))
        try:
            answer = self.command(words[1:])
        except ValueError as error:
            answer = "!" + str(error)
        try:
            peer.sendall(answer.encode() + b"\0")
        except OSError:
            pass

    def connect(self, peer, uid):
        """A CUDA program: the server of its user serves it, of root if all users share one."""
        uid = 0 if self.multi_user else uid
        found = [pid for pid, one in self.servers.items() if one[0] == uid and one[1].poll() is None]
        pid = found[0] if found else self.start_server(uid)
        self.clients[peer] = pid
        _, _, percent, limits = self.servers[pid]
        peer.sendall((json.dumps([pid, percent, limits]) + "\n").encode())

    def start_server(self, uid):
        process = subprocess.Popen([os.path.join(here, "nvidia-cuda-mps-server")], stdin=subprocess.DEVNULL)
        self.servers[process.pid] = [uid, process, self.percent, dict(self.limits)]
        return process.pid

    def command(self, words):
        if " ".join(words) in plan().get("refuse", ()) or words[:1] and words[0] in plan().get("refuse", ()):
            raise ValueError("Failed: on purpose")
        if words[:1] and words[0] in plan().get("hang", ()):
            time.sleep(600)
        known = {
            "get_server_list": (0, self.get_server_list),
            "start_server": (2, lambda flag, uid: str(self.start_server(int(uid))) if flag == "-uid" else self.bad()),
            "get_default_active_thread_percentage": (0, lambda: str(self.percent)),
            "set_default_active_thread_percentage": (1, self.set_percent),
            "get_active_thread_percentage": (1, lambda pid: str(self.server(pid)[2])),
            "set_active_thread_percentage": (2, self.set_server_percent),
            "get_default_device_pinned_mem_limit": (1, lambda dev: self.limits.get(self.device(dev), "")),
            "set_default_device_pinned_mem_limit": (2, self.set_limit),
            "get_device_pinned_mem_limit": (2, lambda pid, dev: self.server(pid)[3].get(self.device(dev), "")),
            "set_device_pinned_mem_limit": (3, self.set_server_limit),
        }
        if words[:1] == ["quit"]:
            return self.quit(words[1:])
        if not words or words[0] not in known or len(words) - 1 != known[words[0]][0]:
            raise ValueError("Unrecognized command")
        return known[words[0]][1](*words[1:])

    def bad(self):
        raise ValueError("Unrecognized command")

    def get_server_list(self):
        return "\n".join(str(pid) for pid, one in self.servers.items() if one[1].poll() is None)

    def server(self, pid):
        if not pid.isdigit() or int(pid) not in self.servers:
            raise ValueError("Server " + pid + " not found")
        return self.servers[int(pid)]

    def device(self, text):
        if text in self.devices:
            return str(self.devices.index(text))
        if not text.isdigit() or int(text) >= len(self.devices):
            raise ValueError("Invalid device " + text)
        return text

    def valid_percent(self, text):
        if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?", text) or not 0 < float(text) <= 100:
            raise ValueError("Invalid percentage " + text)
        return float(text)

    def valid_limit(self, text):
        if not re.fullmatch(r"[1-9][0-9]*[GM]", text):
            raise ValueError("Invalid limit " + text)
        return text

    def set_percent(self, text):
        self.percent = self.valid_percent(text)
        return str(self.percent)

    def set_server_percent(self, pid, text):
        self.server(pid)[2] = self.valid_percent(text)
        return ""

    def set_limit(self, device, text):
        self.limits[self.device(device)] = self.valid_limit(text)
        return ""

    def set_server_limit(self, pid, device, text):
        self.server(pid)[3][self.device(device)] = self.valid_limit(text)
        return ""

    def quit(self, words):
        if words and (len(words) != 2 or words[0] != "-t" or not words[1].isdigit()):
            raise ValueError("Unrecognized command")
        until = time.monotonic() + int(words[1]) if words else None
        while self.clients and (until is None or time.monotonic() < until):
            self.round(None if until is None else max(0, until - time.monotonic()))
        for _, process, _, _ in self.servers.values():
            process.kill()
            process.wait()
        for name in ("control", "nvidia-cuda-mps-control.pid"):
            os.unlink(os.path.join(pipe, name))
        os._exit(0)

def main():
    if os.path.basename(sys.argv[0]) == "nvidia-cuda-mps-server":
        if plan().get("stubborn"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()
    words = sys.argv[1:]
    if not words:
        return client()
    if words[0] not in ("-f", "-d") or any(one != "-multiuser-server" for one in words[1:]):
        die("Unrecognized option")
    if plan().get("start") == "fail":
        die("CUDA driver: on purpose")
    if plan().get("start") == "silent":
        time.sleep(600)
    if not os.path.isdir(pipe):
        die("Failed to create the control socket in " + pipe)
    if words[0] == "-d" and os.fork():
        return
    Daemon("-multiuser-server" in words).serve()
main()
'''

SMI_SOURCE = r"""
import fcntl, json, os, sys, time
here = os.path.dirname(os.path.realpath(sys.argv[0]))
NAMES = ("Default", "Short", "Medium", "Long")
def die(text, status):
    print(text)
    sys.exit(status)
def main():
    words = sys.argv[1:]
    file = open(os.path.join(here, "smi.json"), "r+")
    fcntl.flock(file, fcntl.LOCK_EX)
    state = json.load(file)
    if state.get("hang"):
        time.sleep(600)
    policy = words[:1] == ["compute-policy"]
    words = words[1:] if policy else words
    if words[:1] != ["-i"]:
        die("Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.", 2)
    gpu = state["gpus"].get(words[1])
    if gpu is None:
        die("No devices were found", 6)
    rest = words[2:]
    if not policy and rest == ["--query-gpu=compute_mode", "--format=csv,noheader"]:
        return print(gpu.get("mode", "Default"))
    if policy and rest in (["-l"], ["--list"]):
        print("+-------------------------------------+")
        print("| GPU compute policies:               |")
        print("| GPU     Name               Value    |")
        print("|=====================================|")
        print("|   0     Timeslice          %-8s |" % NAMES[gpu.get("slice", 0)])
        return print("+-------------------------------------+")
    if policy and rest[:1] == ["--set-timeslice"] and len(rest) == 2 and rest[1] in ("0", "1", "2", "3"):
        if gpu.get("mig") or gpu.get("old"):
            die("Unable to set timeslice for GPU: Not Supported", 3)
        if state.get("unprivileged"):
            die("Unable to set timeslice for GPU: Insufficient Permissions", 4)
        gpu["slice"] = int(rest[1])
        state["sets"] = state.get("sets", 0) + 1
        file.seek(0)
        file.truncate()
        json.dump(state, file)
        return print("Successfully set timeslice for GPU %s to %s" % (words[1], NAMES[int(rest[1])].upper()))
    die("Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.", 2)
main()
"""


class Programs:
    """The programs in a folder, and the GPUs that nvidia-smi knows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, *names: str, gpus: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """names: those to install; all of them if none are given."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sources = {CONTROL: MPS_SOURCE, SERVER: MPS_SOURCE, SMI: SMI_SOURCE}
        for name in names or sources:
            path = self.folder / name
            path.write_text(f"#!{sys.executable} -IS\n{sources[name]}")
            path.chmod(0o755)
        self.smi(gpus=dict(gpus or {}))

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def plan(self, **plan: Any) -> None:
        """What the daemon does otherwise: start="fail" or "silent", refuse=[command, …], hang=[command, …],
        stubborn: its servers ignore SIGTERM."""
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def smi(self, **state: Any) -> None:
        """Change what nvidia-smi knows: gpus={UUID: {slice, mode, mig, old}}, hang, unprivileged."""
        path = self.folder / "smi.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **state}))

    def gpu(self, uuid: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "smi.json").read_text())["gpus"][uuid]
        return found


class Client:
    """A CUDA program that uses MPS: connected as long as its server lives."""

    def __init__(self, pipe: Path, uid: int = 1000) -> None:
        self._peer = socket.socket(socket.AF_UNIX)
        self._peer.settimeout(10)
        self._peer.connect(str(pipe / "control"))
        self._peer.sendall(f"client {uid}\n".encode())
        self.server, self.percent, self.limits = json.loads(self._peer.makefile().readline())

    @property
    def lost(self) -> bool:
        """Whether its daemon is gone."""
        ready, _, _ = select.select([self._peer], [], [], 0)
        return bool(ready) and not self._peer.recv(1)

    def close(self) -> None:
        self._peer.close()

    __del__ = close
