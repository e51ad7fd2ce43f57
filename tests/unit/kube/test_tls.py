"""Which certificates of an API server are accepted: those that kubelet accepts, whatever Python's own defaults are."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nodeagent.kube.apiserver.client import NODES, ApiError, ApiServer
from nodeagent.kube.apiserver.credentials import Access
from tests.builders.certificates import AUTHORITY, IDS, NO_IDS, PAST, SERVER, Office, Signed, bundle
from tests.doubles.api_server import FakeApiServer

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
STRICT = ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
Made = tuple[list[Signed], list[Signed]]
"""What the server shows, its own first; what the client trusts."""


@pytest.fixture(params=["as it comes", "strict"], autouse=True)
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults of this Python, and those of Python 3.13 and later."""
    default = ssl.create_default_context

    def strict(*args: Any, **more: Any) -> ssl.SSLContext:
        context = default(*args, **more)
        context.verify_flags |= STRICT
        return context

    if request.param == "strict":
        monkeypatch.setattr(ssl, "create_default_context", strict)


async def listed(folder: Path, made: Made, host: str = "127.0.0.1", name: str = "") -> None:
    """List something over a connection to a server that shows these certificates. ApiError."""
    shown, trusted = made
    tls = folder / "server"
    tls.mkdir()
    bundle(tls / "tls.crt", *shown)
    shutil.copy(shown[0].key, tls / "tls.key")
    async with FakeApiServer(tls=tls) as server:
        ca = bundle(folder / "ca.crt", *trusted)
        client = ApiServer(Access(source="test", host=host, port=server.port, server_name=name, ca=ca))
        try:
            await client.list(NODES)
        finally:
            await client.close()


# ---------------------------------------------------------------- accepted


def signed_by(**changes: str) -> Callable[[Office], Made]:
    """By an authority that differs from kubeadm's in some extensions; "" leaves one out."""

    def make(office: Office) -> Made:
        authority = office.sign("ca", {**AUTHORITY, **changes})
        ids = {key: changes[key] for key in NO_IDS if key in changes}
        return [office.sign("server", {**SERVER, **ids}, authority)], [authority]

    return make


def by_an_intermediate(office: Office) -> Made:
    """The root is not known to the client."""
    root = office.sign("root", AUTHORITY)
    intermediate = office.sign("intermediate", AUTHORITY, root)
    return [office.sign("server", SERVER, intermediate)], [intermediate]


def by_an_intermediate_that_is_shown(office: Office) -> Made:
    (server,), (intermediate,) = by_an_intermediate(office)
    return [server, intermediate], [intermediate]


def by_a_root_through_an_intermediate(office: Office) -> Made:
    root = office.sign("root", AUTHORITY)
    intermediate = office.sign("intermediate", AUTHORITY, root)
    return [office.sign("server", SERVER, intermediate), intermediate], [root]


def by_nobody_the_client_knows_but_known_itself(office: Office) -> Made:
    """The server's own certificate is what the client trusts; it is no authority."""
    server = office.sign("server", SERVER, office.sign("ca", AUTHORITY))
    return [server], [server]


def for_any_use(office: Office) -> Made:
    authority = office.sign("ca", AUTHORITY)
    return [office.sign("server", {"subjectAltName": "IP:127.0.0.1", **IDS}, authority)], [authority]


@pytest.mark.parametrize(
    "make",
    [
        signed_by(),
        signed_by(keyUsage=""),
        signed_by(**NO_IDS),
        signed_by(keyUsage="", **NO_IDS),
        signed_by(basicConstraints="CA:TRUE"),
        signed_by(keyUsage="keyCertSign"),
        by_an_intermediate,
        by_an_intermediate_that_is_shown,
        by_a_root_through_an_intermediate,
        by_nobody_the_client_knows_but_known_itself,
        for_any_use,
    ],
    ids=[
        "kubeadm",
        "no-key-usage",
        "no-key-identifiers",
        "neither",
        "basic-constraints-not-critical",
        "key-usage-not-critical",
        "only-an-intermediate-trusted",
        "only-an-intermediate-trusted-and-shown",
        "through-an-intermediate",
        "its-own-certificate-trusted",
        "no-extended-key-usage",
    ],
)
async def test_a_server_that_kubelet_accepts_is_accepted(make: Callable[[Office], Made], tmp_path: Path) -> None:
    """Among them authorities that Python 3.13 refuses by default: slices are published in such a cluster too."""
    await listed(tmp_path, make(Office(tmp_path)))


async def test_a_server_is_accepted_by_its_dns_name(tmp_path: Path) -> None:
    await listed(tmp_path, signed_by()(Office(tmp_path)), name="localhost")


# ---------------------------------------------------------------- refused


def expired(office: Office) -> Made:
    authority = office.sign("ca", AUTHORITY)
    return [office.sign("server", SERVER, authority, PAST)], [authority]


def of_an_expired_authority(office: Office) -> Made:
    authority = office.sign("ca", AUTHORITY, valid=PAST)
    return [office.sign("server", SERVER, authority)], [authority]


def of_an_expired_intermediate(office: Office) -> Made:
    root = office.sign("root", AUTHORITY)
    intermediate = office.sign("intermediate", AUTHORITY, root, PAST)
    return [office.sign("server", SERVER, intermediate)], [intermediate]


def of_another_authority(office: Office) -> Made:
    return [office.sign("server", SERVER, office.sign("other", AUTHORITY))], [office.sign("ca", AUTHORITY)]


def of_another_authority_of_the_same_name(office: Office) -> Made:
    authority = office.sign("ca", AUTHORITY)
    server = office.sign("server", SERVER, authority)
    return [server], [office.sign("ca", AUTHORITY)]


def for_another_address(office: Office) -> Made:
    authority = office.sign("ca", AUTHORITY)
    return [office.sign("server", {**SERVER, "subjectAltName": "IP:127.0.0.2"}, authority)], [authority]


def for_clients(office: Office) -> Made:
    authority = office.sign("ca", AUTHORITY)
    return [office.sign("server", {**SERVER, "extendedKeyUsage": "clientAuth"}, authority)], [authority]


def of_a_server(office: Office) -> Made:
    """Signed by a certificate that is no authority, which the authority signed."""
    authority = office.sign("ca", AUTHORITY)
    other = office.sign("other", {**SERVER, "basicConstraints": "CA:FALSE"}, authority)
    return [office.sign("server", SERVER, other), other], [authority]


def of_an_authority_that_may_not_sign(office: Office) -> Made:
    authority = office.sign("ca", {**AUTHORITY, "keyUsage": "critical,cRLSign"})
    return [office.sign("server", SERVER, authority)], [authority]


def of_itself(office: Office) -> Made:
    return [office.sign("server", {**SERVER, "authorityKeyIdentifier": "none"})], [office.sign("ca", AUTHORITY)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (expired, "certificate has expired"),
        (of_an_expired_authority, "certificate has expired"),
        (of_an_expired_intermediate, "certificate has expired"),
        (of_another_authority, "unable to get local issuer certificate"),
        (of_another_authority_of_the_same_name, "certificate signature failure|unable to get local issuer"),
        (for_another_address, "IP address mismatch, certificate is not valid for '127.0.0.1'"),
        (for_clients, "unsuitable certificate purpose|unsupported certificate purpose"),
        (of_a_server, "invalid CA certificate"),
        (of_an_authority_that_may_not_sign, "invalid CA certificate|unable to get local issuer"),
        (of_itself, "self.signed certificate"),
    ],
)
async def test_a_server_that_kubelet_refuses_is_refused(
    make: Callable[[Office], Made], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ApiError, match=f"its certificate is not accepted: ({said})"):
        await listed(tmp_path, make(Office(tmp_path)))


async def test_a_name_in_the_subject_alone_is_no_name(tmp_path: Path) -> None:
    """As in Go: what counts is the subject alternative name."""
    office = Office(tmp_path)
    authority = office.sign("ca", AUTHORITY)
    server = office.sign("localhost", {"extendedKeyUsage": "serverAuth", **IDS}, authority)
    with pytest.raises(ApiError, match="its certificate is not accepted: Hostname mismatch"):
        await listed(tmp_path, ([server], [authority]), name="localhost")
