"""Detects each start of a kubelet."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.registration import KUBELET_SOCKET

KUBELET_POLL_S = 15.0
"""Fallback poll interval in addition to the watch of kubelet's folder."""


async def kubelets(plugins: Path) -> AsyncGenerator[None, None]:
    """Yield at each start of a kubelet, first for the one already running.

    `plugins` is kubelet's device-plugins folder, where kubelet creates its socket before it calls any plugin.
    """
    before: sockets.SocketIdentity | None = None
    with (
        sockets.SocketWatch(plugins / KUBELET_SOCKET) as kubelet,
        FolderWatch(plugins, poll_s=KUBELET_POLL_S) as folder,
    ):
        while True:
            if (now := kubelet.look()) != before:
                before = now
                yield
            await folder.wait()
