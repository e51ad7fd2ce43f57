"""Who may see the page: the one browser that was given the token, and nothing else that can reach the port.

Other users of the machine reach a port of 127.0.0.1, and so does every page that a browser shows. The token is good for
one request and is answered with a cookie. A page of another origin sends its own `Origin` or `Sec-Fetch-Site`; one that
has pointed its own name at 127.0.0.1 (DNS rebinding) sends that name as `Host`.
"""

from __future__ import annotations

import secrets
from urllib.parse import parse_qs

from nodeagent.admin.http import HttpAnswer, HttpRequest, problem
from nodeagent.admin.web.headers import STRICT

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
_WELCOME = (
    b'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>nodeagent</title>'
    b'<meta http-equiv="refresh" content="0; url=/"><p><a href="/">Continue</a></p></html>\n'
)
"""A page that leads on: from wherever the address was opened, the next request is one of this origin."""


class Gate:
    """The checks of one port, with the token that opens it once."""

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(32)
        """For the address; "" once it has been used."""
        self._cookie = f"nodeagent-{port}", secrets.token_urlsafe(32)
        self._hosts = {f"{name}:{port}" for name in _NAMES}

    @property
    def address_of_page(self) -> str:
        """Return the path and query that open the page once."""
        return f"/?token={self.token}"

    def answer(self, request: HttpRequest) -> HttpAnswer | None:
        """Return the answer to a request that is not passed on, or None if it may be."""
        if request.method not in ("GET", "HEAD"):
            return _refused(405, f"cannot {request.method} {request.path}: it can only be read")
        if why := self._foreign(request):
            return _refused(403, f"cannot show {request.path}: {why}")
        if self._is_known(request):
            return None
        given = parse_qs(request.target.partition("?")[2]).get("token", [""])[-1]
        if request.path == "/" and request.method == "GET" and self._opens(given):
            return self._welcome()
        return _refused(403, self._stranger(given))

    def _foreign(self, request: HttpRequest) -> str:
        """Return why a request does not come from the address bar or from the page itself, or ""."""
        host = request.header("host")
        if host not in self._hosts:
            return f"it was asked for as {host or 'nothing'!r}"
        allowed = {f"http://{one}" for one in self._hosts}
        origins = [value.decode("latin-1") for name, value in request.headers if name == b"origin"]
        if strange := [one for one in origins if one not in allowed]:
            return f"{strange[0]!r} asks for it"
        site = request.header("sec-fetch-site")
        followed = request.path == "/" and request.header("sec-fetch-mode") == "navigate"
        if site not in ("", "same-origin", "none") and not followed:
            return f"a page of another origin asks for it ({site})"
        return ""

    def _is_known(self, request: HttpRequest) -> bool:
        name, value = self._cookie
        given = [one.strip().partition("=") for one in request.header("cookie").split(";")]
        return any(key == name and secrets.compare_digest(got.encode(), value.encode()) for key, _, got in given)

    def _opens(self, given: str) -> bool:
        """Return whether this is the token, which is then used up."""
        if not self.token or not secrets.compare_digest(given.encode(), self.token.encode()):
            return False
        self.token = ""
        return True

    def _welcome(self) -> HttpAnswer:
        name, value = self._cookie
        cookie = ("set-cookie", f"{name}={value}; HttpOnly; SameSite=Strict; Path=/")
        return HttpAnswer(200, _WELCOME, "text/html; charset=utf-8", (*STRICT, cookie))

    def _stranger(self, given: str) -> str:
        what = "the token in the address has been used or is wrong" if given else "the address has no token"
        return f"cannot show the page: {what}; run nodeagent web again for a new one"


def _refused(status: int, why: str) -> HttpAnswer:
    return problem(status, why, *STRICT)
