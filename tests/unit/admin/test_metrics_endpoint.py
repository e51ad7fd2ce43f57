"""The metrics over TCP, on real sockets: what scrapers get, who gets it, and what hinders it is said and passes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from nodeagent.admin import http as http_of
from nodeagent.admin import listener as listener_of
from nodeagent.admin import metrics_endpoint as endpoint_of
from nodeagent.admin.metrics_endpoint import MetricsEndpoint
from nodeagent.config.schema import Config
from tests.builders.certificates import AUTHORITY, SERVER, Office, Signed
from tests.support.scraping import certificate, free_port, refused, scrape
from tests.support.until import until

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
CLIENT = {"extendedKeyUsage": "clientAuth"}
TOKEN = "s3cret-token"


class Page:
    """Stands for the agent's page."""

    async def text(self, *, max_age_s: float = 0.0) -> bytes:
        return b"nodeagent_ready 1.0\n"


class Endpoint:
    """An endpoint that leads from its first configuration on, until the test ends."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.manager = MetricsEndpoint(Page(), lambda: self.reasons)  # type: ignore[arg-type]
        self._leading: asyncio.Task[None] | None = None

    async def apply(self, **metrics: Any) -> None:
        self._leading = self._leading or asyncio.create_task(self.manager.lead())
        await self.manager.apply(msgspec.convert({"metrics": metrics}, Config))

    async def up(self, port: int, **options: Any) -> None:
        """Return once something answers at a port."""

        async def look() -> bool:
            with contextlib.suppress(OSError):
                return bool(await scrape(port, "/healthz", **options))
            return False

        await until(look, otherwise=lambda: f"no answer; notes: {self.manager.notes()}")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_of, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(endpoint_of, "LAST_RETRY_S", 0.05)
    monkeypatch.setattr(endpoint_of, "LOOK_S", 0.02)


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


async def serving(endpoint: Endpoint, **more: Any) -> int:
    """The port where it serves."""
    port = free_port()
    await endpoint.apply(listen=f"127.0.0.1:{port}", **more)
    await endpoint.up(port)
    return port


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/metrics", 200),
        ("GET", "/metrics?x=1", 200),
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("HEAD", "/metrics", 405),
        ("POST", "/metrics", 405),
        ("DELETE", "/healthz", 405),
        ("GET", "/v1/status", 404),
        ("GET", "/v1/grants", 404),
        ("DELETE", "/v1/grants/g-1", 404),
        ("POST", "/v1/reload", 404),
        ("GET", "/", 404),
        ("GET", "/metrics/", 404),
    ],
)
async def test_there_are_three_pages_to_read_and_nothing_else(
    endpoint: Endpoint, method: str, path: str, status: int
) -> None:
    port = await serving(endpoint)
    assert (await scrape(port, path, method))[0] == status


async def test_readyz_says_no_without_the_names_of_pods(endpoint: Endpoint) -> None:
    """The reasons name pods, and are for the status socket."""
    port = await serving(endpoint)
    endpoint.reasons = ["CPUs 4-7 of shop/till are not exclusive"]
    status, _, body = await scrape(port, "/readyz")
    assert (status, body) == (503, "not ready: 1 reasons, see nodeagent status\n")


async def test_nothing_listens_unless_an_address_is_configured(endpoint: Endpoint) -> None:
    port = await serving(endpoint)
    await endpoint.apply()
    await until(lambda: refused(port))
    assert endpoint.manager.notes() == []


async def test_another_address_is_served_as_soon_as_it_is_configured(endpoint: Endpoint) -> None:
    before, after = await serving(endpoint), await serving(endpoint)
    assert await refused(before)
    assert (await scrape(after))[2] == "nodeagent_ready 1.0\n"


async def test_all_addresses_take_both_protocols(endpoint: Endpoint) -> None:
    port = free_port()
    await endpoint.apply(listen=f"[::]:{port}")
    await endpoint.up(port)
    assert (await scrape(port, host="::1"))[0] == 200


# ---------------------------------------------------------------- what hinders it


async def test_a_port_in_use_is_said_and_taken_once_it_is_free(endpoint: Endpoint) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with capture_logs() as said:
            await endpoint.apply(listen=f"127.0.0.1:{port}")
            note = f"cannot serve metrics.listen 127.0.0.1:{port}: Address already in use"
            await until(lambda: endpoint.manager.notes() == [note])
        assert [(one["event"], one["error"]) for one in said] == [("metrics-not-served", note)]
    await endpoint.up(port)
    assert endpoint.manager.notes() == []
    assert endpoint.manager.not_ready() == []


async def test_an_address_that_the_host_does_not_have_yet_is_said(endpoint: Endpoint) -> None:
    await endpoint.apply(listen="192.0.2.1:9464")
    note = "cannot serve metrics.listen 192.0.2.1:9464: Cannot assign requested address"
    await until(lambda: endpoint.manager.notes() == [note])
    assert endpoint.manager.not_ready() == []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "cannot read metrics.tokenFile {path}: No such file or directory"),
        (lambda path: path.write_text(" \n"), "cannot use metrics.tokenFile {path}: it is empty"),
        (lambda path: path.write_text("two words"), "cannot use metrics.tokenFile {path}: expected one word"),
        (lambda path: path.write_text("x" * 10_000), "cannot use metrics.tokenFile {path}: it has more than 8192"),
        (os.mkfifo, "cannot read metrics.tokenFile {path}: it is no regular file"),
        (lambda path: path.mkdir(), "cannot read metrics.tokenFile {path}: it is no regular file"),
    ],
    ids=["missing", "empty", "words", "large", "pipe", "folder"],
)
async def test_nothing_is_served_without_the_token_that_is_demanded(
    endpoint: Endpoint, tmp_path: Path, make: Callable[[Path], object], why: str
) -> None:
    """It is served as soon as there is one."""
    path, port = tmp_path / "token", free_port()
    make(path)
    await endpoint.apply(listen=f"127.0.0.1:{port}", tokenFile=str(path))
    said = f"cannot serve metrics.listen 127.0.0.1:{port}: {why.format(path=path)}"
    await until(lambda: [one for one in endpoint.manager.notes() if one.startswith(said)])
    assert await refused(port)
    replace(path, TOKEN)
    await endpoint.up(port)
    assert endpoint.manager.notes() == []


# ---------------------------------------------------------------- the token


def replace(path: Path, text: str, mode: int = 0o600) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.chmod(mode)
    if path.is_dir():
        path.rmdir()
    draft.rename(path)


def bearer(token: str, scheme: str = "Bearer") -> list[str]:
    return [f"Authorization: {scheme} {token}"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 401),
        (bearer("wrong"), 401),
        (bearer(TOKEN[:-1]), 401),
        (bearer(TOKEN + "x"), 401),
        (bearer(""), 401),
        (bearer("\xfc" * len(TOKEN)), 401),
        (bearer(TOKEN, "Basic"), 401),
        ([f"Authorization: {TOKEN}"], 401),
        (bearer(TOKEN) * 2, 401),
        (bearer(TOKEN), 200),
        (bearer(TOKEN, "bearer"), 200),
    ],
)
async def test_only_a_scraper_with_the_token_reads_the_metrics(
    endpoint: Endpoint, tmp_path: Path, headers: list[str], status: int
) -> None:
    """Probes of kubelet have none and need none."""
    replace(tmp_path / "token", f"{TOKEN}\n")
    port = await serving(endpoint, tokenFile=str(tmp_path / "token"))
    found, head, body = await scrape(port, headers=headers)
    assert found == status
    assert ("www-authenticate: Bearer" in head) == (status == 401) == ("nodeagent_ready" not in body)
    assert (await scrape(port, "/readyz"))[0] == (await scrape(port, "/healthz"))[0] == 200


async def test_a_token_that_is_replaced_counts_at_once_and_an_empty_one_never(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    replace(path, TOKEN)
    port = await serving(endpoint, tokenFile=str(path))
    replace(path, "another")
    assert [(await scrape(port, headers=bearer(one)))[0] for one in (TOKEN, "another")] == [401, 200]
    replace(path, "")
    assert [(await scrape(port, headers=bearer(one)))[0] for one in ("", "another")] == [401, 200]
    note = f"cannot use metrics.tokenFile {path}: it is empty; what it contained before stays in force"
    assert endpoint.manager.notes() == [note]


async def test_a_token_that_every_user_can_read_is_used_and_said(endpoint: Endpoint, tmp_path: Path) -> None:
    """A Secret that is mounted without a mode is such a file."""
    path = tmp_path / "token"
    replace(path, TOKEN, 0o644)
    port = await serving(endpoint, tokenFile=str(path))
    note = f"metrics.tokenFile {path} can be read by every user of the host (mode 0644)"
    assert endpoint.manager.notes() == [note]
    path.chmod(0o640)
    assert (await scrape(port, headers=bearer(TOKEN)))[0] == 200
    assert endpoint.manager.notes() == []


# ---------------------------------------------------------------- TLS


class Volume:
    """A folder of files that are replaced together, as kubelet does it for cert-manager: a link is swapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._turn = 0

    def fill(self, **files: Path) -> None:
        self._turn += 1
        (data := self.folder / f"..{self._turn}").mkdir(parents=True)
        for name, source in files.items():
            shutil.copy(source, data / name)
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        draft = self.folder / "..data_tmp"
        draft.symlink_to(data.name)
        draft.rename(self.folder / "..data")


@pytest.fixture
def office(tmp_path: Path) -> Office:
    (tmp_path / "office").mkdir()
    return Office(tmp_path / "office")


def trusting(authority: Signed, own: Signed | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.certificate)
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context


async def secured(endpoint: Endpoint, volume: Volume, tls: ssl.SSLContext, *names: str) -> int:
    port = free_port()
    files = {f"{name}File": str(volume.folder / name) for name in ("cert", "key", *names)}
    await endpoint.apply(listen=f"127.0.0.1:{port}", tls=files)
    await endpoint.up(port, tls=tls)
    return port


@needs_openssl
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_tls_from_1_2_on_and_nothing_else(endpoint: Endpoint, tmp_path: Path, office: Office) -> None:
    authority = office.sign("ca", AUTHORITY)
    server, volume = office.sign("server", SERVER, authority), Volume(tmp_path / "tls")
    volume.fill(cert=server.certificate, key=server.key)
    port = await secured(endpoint, volume, trusting(authority))
    assert (await scrape(port, tls=trusting(authority)))[2] == "nodeagent_ready 1.0\n"
    assert await refused(port)
    old = trusting(authority)
    old.minimum_version = ssl.TLSVersion.TLSv1_1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError, match=r"(?i)ssl|reset"):
        await scrape(port, tls=old)


@needs_openssl
async def test_a_renewed_certificate_is_shown_without_a_restart(
    endpoint: Endpoint, tmp_path: Path, office: Office
) -> None:
    """A pair that does not fit leaves the old one in force, which is said."""
    authority = office.sign("ca", AUTHORITY)
    one, two = (office.sign(name, SERVER, authority) for name in ("one", "two"))
    volume, tls = Volume(tmp_path / "tls"), trusting(authority)
    volume.fill(cert=one.certificate, key=one.key)
    port = await secured(endpoint, volume, tls)
    before = await certificate(port, tls)
    volume.fill(cert=two.certificate, key=two.key)
    after = await certificate(port, tls)
    assert before != after
    volume.fill(cert=one.certificate, key=two.key)
    assert await certificate(port, tls) == after
    (note,) = endpoint.manager.notes()
    assert note.startswith(f"cannot use metrics.tls.certFile {volume.folder}/cert, metrics.tls.keyFile ")
    assert "KEY_VALUES_MISMATCH" in note and note.endswith("stays in force")
    volume.fill(cert=one.certificate, key=one.key)
    assert await certificate(port, tls) == before
    await until(lambda: endpoint.manager.notes() == [])


@needs_openssl
async def test_only_clients_with_a_certificate_of_the_authority_are_served(
    endpoint: Endpoint, tmp_path: Path, office: Office
) -> None:
    """An authority that is replaced is no longer trusted."""
    authority, stranger = office.sign("ca", AUTHORITY), office.sign("stranger", AUTHORITY)
    server, volume = office.sign("server", SERVER, authority), Volume(tmp_path / "tls")
    ours, theirs = office.sign("ours", CLIENT, authority), office.sign("theirs", CLIENT, stranger)
    volume.fill(cert=server.certificate, key=server.key, clientCa=authority.certificate)
    port = await secured(endpoint, volume, trusting(authority, ours), "clientCa")
    assert await served(port, trusting(authority, ours))
    assert not await served(port, trusting(authority, theirs))
    assert not await served(port, trusting(authority))
    volume.fill(cert=server.certificate, key=server.key, clientCa=stranger.certificate)
    assert await served(port, trusting(authority, theirs))
    assert not await served(port, trusting(authority, ours))


async def served(port: int, tls: ssl.SSLContext) -> bool:
    try:
        return (await scrape(port, tls=tls))[0] == 200
    except OSError:
        return False


@needs_openssl
async def test_a_key_with_a_password_is_refused_without_asking_for_one(
    endpoint: Endpoint, tmp_path: Path, office: Office
) -> None:
    server = office.sign("server", SERVER)
    locked, context = tmp_path / "locked", ("openssl", "pkey", "-aes256", "-passout", "pass:secret")
    process = await asyncio.create_subprocess_exec(*context, "-in", str(server.key), "-out", str(locked))
    assert await process.wait() == 0
    files = {"certFile": str(server.certificate), "keyFile": str(locked)}
    await endpoint.apply(listen=f"127.0.0.1:{free_port()}", tls=files)
    await until(lambda: [one for one in endpoint.manager.notes() if f"metrics.tls.keyFile {locked}" in one])


# ---------------------------------------------------------------- clients


async def test_a_thousand_connections_hold_no_more_descriptors_than_there_are_slots(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scraper among them is served as soon as the idle ones have had their time."""
    port = await serving(endpoint)
    monkeypatch.setattr(http_of, "REQUEST_S", 0.2)
    before = len(os.listdir("/proc/self/fd"))
    idle = [socket.socket() for _ in range(1000)]
    try:
        for one in idle:
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(("127.0.0.1", port))
        status, _, _ = await scrape(port)
        held = len(os.listdir("/proc/self/fd")) - before - len(idle)
        assert status == 200
        assert held <= listener_of.MOST_CLIENTS + 8
    finally:
        for one in idle:
            one.close()


@needs_openssl
@pytest.mark.parametrize(
    "data", [b"", b"GET /metrics HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00garbage", b"\x00" * 4096]
)
async def test_what_is_no_tls_costs_its_own_connection(
    endpoint: Endpoint, tmp_path: Path, office: Office, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what never goes on: nothing of it is left."""
    monkeypatch.setattr(listener_of, "REQUEST_S", 0.3)
    server, volume = office.sign("server", SERVER), Volume(tmp_path / "tls")
    volume.fill(cert=server.certificate, key=server.key)
    port = await secured(endpoint, volume, trusting(server))
    assert endpoint.manager._serving is not None
    clients = endpoint.manager._serving.listener.clients
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        await reader.read()
    writer.close()
    await until(lambda: not clients)
    assert (await scrape(port, tls=trusting(server)))[0] == 200
