"""The metrics over TCP, for scrapers that cannot reach the status socket: three pages, nothing that changes anything.

What hinders it is a note in the status, logged once and tried again. It is no reason not to be ready: pods get what
they request all the same, and an agent whose port is taken must not look as if it could not serve them.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from nodeagent.admin.endpoint_files import Reloaded, Token, context_of, token_of
from nodeagent.admin.http import TEXT, HttpAnswer, HttpRequest, problem
from nodeagent.admin.listener import HttpListener
from nodeagent.admin.metrics_page import CONTENT_TYPE, MetricsPage
from nodeagent.aio.supervise import race
from nodeagent.config.listen import ListenAddress
from nodeagent.config.operation import MetricsConfig
from nodeagent.config.schema import Config
from nodeagent.errors import HostError
from nodeagent.managers.manager import Manager
from nodeagent.telemetry.once import Once

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
"""Rests between attempts to listen; each is twice as long as the one before."""
LOOK_S = 10.0
"""How often the files are looked at without any connection, so that the status shows what is wrong with them."""
PAGE_S = 1.0
"""How old a page may be: every client that can connect can ask, and no more than one is made in this time for all."""
PATHS = ("/metrics", "/healthz", "/readyz")
_CHALLENGE = ("www-authenticate", 'Bearer realm="nodeagent"')
log = structlog.get_logger()


class MetricsPages:
    """Answers GET of three pages. The token protects /metrics; probes of kubelet have none to present, so /healthz and
    /readyz say no more than yes or no."""

    def __init__(self, page: MetricsPage, not_ready: Callable[[], Sequence[str]]) -> None:
        """not_ready: returns why the agent is not ready."""
        self._page = page
        self._not_ready = not_ready

    async def answer(self, request: HttpRequest, token: bytes | None) -> HttpAnswer:
        """Answer one request. token: that a scraper must present, or None if none is needed."""
        if request.path not in PATHS:
            return problem(404, f"cannot find {request.path}: expected one of {', '.join(PATHS)}")
        if request.method != "GET":
            return problem(405, f"cannot {request.method} {request.path}: it can only be read", ("allow", "GET"))
        if request.path == "/healthz":
            return HttpAnswer(200, b"ok\n", TEXT)
        if request.path == "/readyz":
            return self._readyz()
        if token is not None and not _presents(request, token):
            return problem(401, f"cannot read {request.path}: the token of metrics.tokenFile is needed", _CHALLENGE)
        return HttpAnswer(200, await self._page.text(max_age_s=PAGE_S), CONTENT_TYPE)

    def _readyz(self) -> HttpAnswer:
        count = len(self._not_ready())
        text = f"not ready: {count} reasons, see nodeagent status" if count else "ok"
        return HttpAnswer(503 if count else 200, f"{text}\n".encode(), TEXT)


def _presents(request: HttpRequest, token: bytes) -> bool:
    """Return whether a request carries the token (RFC 6750, section 2.1). The time it takes does not depend on where
    the two differ."""
    scheme, _, given = request.header("authorization").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1"), token)
    return right and scheme.lower() == "bearer"


class MetricsEndpoint(Manager):
    """Serves the pages as configured (`metrics`), while this agent leads. A change applies at once."""

    name = "metrics endpoint"

    def __init__(self, page: MetricsPage, not_ready: Callable[[], Sequence[str]]) -> None:
        """not_ready: returns why the agent is not ready."""
        self._pages = MetricsPages(page, not_ready)
        self._config = MetricsConfig()
        self._changed = asyncio.Event()
        self._serving: _Serving | None = None
        self._fault = Once("metrics-not-served")

    async def apply(self, config: Config) -> None:
        if config.metrics != self._config:
            self._config = config.metrics
            self._changed.set()

    async def lead(self) -> None:
        """Serve until cancelled."""
        while True:
            self._changed.clear()
            self._fault.clear()
            if self._config.listen:
                await race(self._serve(self._config), self._changed.wait())
            else:
                await self._changed.wait()

    def notes(self) -> list[str]:
        """Return why nothing is served, and what is wrong with the files, one sentence each."""
        found = self._serving.notes() if self._serving is not None else []
        return [self._fault.last, *found] if self._fault.last else found

    async def _serve(self, config: MetricsConfig) -> None:
        self._serving = serving = _Serving(config, self._pages)
        try:
            await self._start(serving)
            log.info("metrics-served", listen=config.listen, tls=bool(config.tls.cert_file))
            while True:
                await asyncio.sleep(LOOK_S)
                serving.refresh()
        finally:
            self._serving = None
            await serving.listener.stop()

    async def _start(self, serving: _Serving) -> None:
        """Return once it is served, however often that has to be tried."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                serving.start()
                self._fault.clear()
                return
            except HostError as error:
                self._fault.report(str(error))
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)


class _Serving:
    """One configuration being served."""

    def __init__(self, config: MetricsConfig, pages: MetricsPages) -> None:
        self._address = ListenAddress.parse(config.listen)
        self._pages = pages
        self._token = token_of("metrics.tokenFile", Path(config.token_file)) if config.token_file else None
        self._tls = _tls(config)
        self._files = [one for one in (self._token, self._tls) if one is not None]
        self._unused = Once("metrics-file-unusable")
        self.listener = HttpListener(self._answer, self._secure)

    def start(self) -> None:
        """Begin to listen. Raise HostError if a file cannot be used, as nothing is served without what it demands, or
        if the address cannot be had."""
        for one in self._files:
            one.refresh()
            if one.value is None:
                raise HostError(f"cannot serve metrics.listen {self._address}: {one.fault}")
        self.listener.start(bind(self._address))

    def refresh(self) -> None:
        """Read again what has changed."""
        for one in self._files:
            one.refresh()
        self._unused.report("; ".join(self.notes()))

    def notes(self) -> list[str]:
        """Return what is wrong with files of which an earlier content is in force, and what is unsafe about them."""
        faults = [f"{one.fault}; what it contained before stays in force" for one in self._files if self._outdated(one)]
        unsafe = self._token.value.warning if self._token is not None and self._token.value is not None else ""
        return [*faults, unsafe] if unsafe else faults

    @staticmethod
    def _outdated(one: Reloaded[Token] | Reloaded[ssl.SSLContext]) -> bool:
        return bool(one.fault) and one.value is not None

    def _secure(self) -> ssl.SSLContext | None:
        """Return what the next connection is secured with, from files that are looked at now."""
        self.refresh()
        return self._tls.value if self._tls is not None else None

    async def _answer(self, request: HttpRequest) -> HttpAnswer:
        token = self._token.value.secret if self._token is not None and self._token.value is not None else None
        return await self._pages.answer(request, token)


def _tls(config: MetricsConfig) -> Reloaded[ssl.SSLContext] | None:
    tls = config.tls
    if not tls.cert_file:
        return None
    clients = ("metrics.tls.clientCaFile", Path(tls.client_ca_file)) if tls.client_ca_file else None
    cert, key = ("metrics.tls.certFile", Path(tls.cert_file)), ("metrics.tls.keyFile", Path(tls.key_file))
    return context_of(cert, key, clients)


def bind(address: ListenAddress) -> socket.socket:
    """Return a bound TCP socket; at [::] it also takes IPv4. Raise HostError if the address or the port cannot be
    had."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        bound = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot serve metrics.listen {address}: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind((address.host, address.port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise HostError(f"cannot serve metrics.listen {address}: {error.strerror}") from None
    return bound
