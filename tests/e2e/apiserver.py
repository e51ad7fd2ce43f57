"""An API server with etcd, and nothing else of Kubernetes: for what is shipped to be applied to."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.e2e import grounds, nodefiles, programs
from tests.e2e.cluster import ADMIN, STEP_S, free_port
from tests.e2e.kubeapi import KubeApi, until

NEEDED = ("etcd", "kube-apiserver", "openssl")


def lacking(*more: str) -> str:
    """Why there can be none here, or no other program of these names; "" where there can."""
    absent = [name for name in (*NEEDED, *more) if shutil.which(name, path=grounds.path()) is None]
    where = os.environ.get("NODEAGENT_E2E_BIN", "")
    return f"missing in NODEAGENT_E2E_BIN={where} and PATH: {', '.join(absent)}" if absent else ""


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[KubeApi]:
    """A server that is ready, as its admin sees it; admin.kubeconfig in the folder is for programs."""
    ports = {name: free_port() for name in ("api", "etcd", "peer")}
    api = KubeApi(ports["api"], ADMIN)
    (folder / "tokens.csv").write_text(f"{ADMIN},admin,admin,system:masters\n")
    nodefiles.write_kubeconfig(folder / "admin.kubeconfig", ports["api"], ADMIN)
    for words in (("genrsa", "-out", "sa.key", "2048"), ("rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
    with contextlib.ExitStack() as running:
        for name in ("etcd", "kube-apiserver"):
            running.enter_context(_running(name, folder, ports))
        until("the API server is ready", api.ready, STEP_S)
        yield api


@contextlib.contextmanager
def scheduler(folder: Path) -> Iterator[None]:
    """A scheduler alongside the server of the folder."""
    with _running("kube-scheduler", folder, {}):
        yield


@contextlib.contextmanager
def _running(name: str, folder: Path, ports: dict[str, int]) -> Iterator[None]:
    with (folder / f"{name}.log").open("wb") as log:
        env = {**os.environ, "PATH": grounds.path()}
        process = subprocess.Popen(programs.command(name, folder, ports), stdout=log, stderr=log, env=env)
    try:
        yield
    finally:
        process.kill()
        process.wait()
