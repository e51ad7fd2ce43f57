"""Folders whose sockets would not fit into a socket address are refused with their line, and no others are."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path, PurePosixPath

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.admin.http import HttpAnswer, HttpRequest
from nodeagent.admin.unix_server import UnixHttpServer
from nodeagent.config.load import parse
from nodeagent.config.schema import Config
from nodeagent.config.validate import wrong
from nodeagent.daemon.paths import STATUS_SOCKET, checked, paths_of
from nodeagent.errors import ConfigError, HostError
from nodeagent.kube.kubelet.device_plugin_sockets import PluginPaths
from nodeagent.kube.kubelet.plugin_sockets import plugin_sockets
from tests.oracles.endpoints import wrong_with_endpoint

SERVED = {"name": "gpu", "kind": "gpu", "serve": "dra"}
LETTERS = st.sampled_from("aä日/.-_ %")


def is_taken(key: str, folder: str) -> bool:
    """Whether the configuration takes a folder; if not, it names the key and the limit."""
    try:
        parse(f'{key}: "{folder}"', source="here.yaml")
    except ConfigError as error:
        assert f" bytes at $.{key}, expected at most " in str(error) and "(line 1, column " in str(error)
        return False
    return True


def fits(folder: str, resource: str, driver: str) -> bool:
    """Whether all sockets that an agent in a pod makes below kubelet's folder have paths that fit."""
    try:
        PluginPaths(Path(folder) / "device-plugins", resource)
        plugin_sockets(Path(folder), driver, "not-a-uuid")
    except ConfigError:
        return False
    return True


@given(st.text(LETTERS, max_size=60), st.integers(1, 63), st.integers(3, 63))
def test_kubelets_folder_is_taken_exactly_if_every_socket_below_it_fits(tail: str, name: int, driver: int) -> None:
    """However long the names of resources and of the driver are: hashes stand for those that are too long."""
    folder = f"/{tail}"
    taken = is_taken("kubeletDir", folder)
    if taken:
        assert fits(folder, "r" * name, "d" * driver)
    assert taken == fits(folder, "r" * 63, "d" * 63)


@given(st.text(st.sampled_from("aä/%?#2e0 \\:;@&=+\t\x7f."), max_size=20))
def test_kubelets_folder_is_taken_for_dra_exactly_if_kubelet_takes_the_sockets_in_it(tail: str) -> None:
    """It dials them as URLs. Where nothing is served through DRA the folder may have any name."""
    folder = PurePosixPath(f"/{tail}")
    config = msgspec.convert({"kubeletDir": str(folder), "resources": [SERVED]}, Config)
    service = plugin_sockets(Path(folder), "nodeagent.dev").service
    assert (not any("for DRA" in one for one in wrong(config))) == (not wrong_with_endpoint(str(service)))
    alone = msgspec.structs.replace(config, resources=[])
    assert not any("for DRA" in one for one in wrong(alone))


def test_a_folder_from_which_dra_cannot_be_served_is_refused_with_its_line_and_at_the_start(folder: Path) -> None:
    """Of the configuration and of the command line, which comes first."""
    text = 'resources: [{name: gpu, kind: gpu, serve: dra}]\nkubeletDir: "/var/lib/kubelet%2d1"\n'
    with pytest.raises(ConfigError) as caught:
        parse(text, source="here.yaml")
    assert str(caught.value).startswith(
        "cannot use here.yaml: '/var/lib/kubelet%2d1' at $.kubeletDir cannot be used for DRA: "
        "kubelet reads it as a URL: expected a path without '%' (line 2, column 13"
    )
    config = parse(text.partition("\n")[0] + f"\nstateDir: {folder}\nruntimeDir: {folder}\n", source="here.yaml")
    where = paths_of(config, config_file=None, root="/", kubelet_dir="/var/lib/a#b")
    with pytest.raises(
        ConfigError, match=r"cannot serve DRA from kubelet's folder /var/lib/a#b: kubelet reads it as a "
    ):
        checked(config, where)
    checked(parse(f"stateDir: {folder}\nruntimeDir: {folder}\n", source="here.yaml"), where)


async def answer(request: HttpRequest) -> HttpAnswer:
    return HttpAnswer(200, b"")


@pytest.mark.parametrize("spare", [-1, 0, 1])
async def test_a_folder_that_is_taken_for_the_status_socket_can_have_one(spare: int, folder: Path) -> None:
    """The kernel binds it, also while it has its longer name and the process id has seven digits; one byte more is
    refused."""
    most = 107 - len(f".{STATUS_SOCKET}.4194304") - 1
    deep = folder / ("d" * (most - len(os.fsencode(folder)) - 1 + spare))
    assert is_taken("runtimeDir", str(deep)) == (spare <= 0)
    if spare <= 0:
        server = UnixHttpServer(deep / STATUS_SOCKET, answer)
        with contextlib.suppress(HostError):
            server.start()
        assert not server.lost
        await server.stop()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"kubeletDir: /{'k' * 55}\n",
            "56 bytes at $.kubeletDir, expected at most 55: a socket's whole path has room for 107 "
            f"(line 1, column 13: kubeletDir: /{'k' * 55})",
        ),
        (
            f"pinning:\n  nriSocket: /{'n' * 107}\n",
            "108 bytes at $.pinning.nriSocket, expected at most 107: a socket's whole path has room for 107 "
            f"(line 2, column 14: nriSocket: /{'n' * 107}",
        ),
        (
            'runtimeDir: "/run/\\ud800"\n',
            "'/run/\\ud800' at $.runtimeDir, expected characters that UTF-8 can encode "
            '(line 1, column 13: runtimeDir: "/run/\\ud800")',
        ),
        (
            "kubeletDir: var/lib/kubelet\n",
            "Expected `str` matching regex '^/[^\\\\0]*$' - at `$.kubeletDir`, found 'var/lib/kubelet', "
            "expected an absolute path (line 1, column 13: kubeletDir: var/lib/kubelet)",
        ),
        (
            "dra: {kubeconfig: kubelet.conf}\n",
            "Expected `str` matching regex '^(/[^\\\\0]*)?$' - at `$.dra.kubeconfig`, found 'kubelet.conf', "
            "expected an absolute path (line 1, column 19: dra: {kubeconfig: kubelet.conf})",
        ),
    ],
    ids=["long", "long-nri", "no-utf-8", "relative", "relative-kubeconfig"],
)
def test_a_path_that_cannot_be_used_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, source="here.yaml")
    assert str(caught.value).startswith(f"cannot use here.yaml: {said}")
