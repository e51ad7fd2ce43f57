"""The files of the page, read from the package when they are asked for, and its picture of the machine."""

from __future__ import annotations

import json
from pathlib import Path

from nodeagent.admin.http import HttpAnswer
from nodeagent.admin.web.headers import STRICT
from nodeagent.core.picture.document import to_document
from nodeagent.core.picture.draw import draw
from nodeagent.state.agent import Agent

_ASSETS = Path(__file__).parent / "assets"
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def asset(path: str) -> HttpAnswer:
    """Return a file of the page by the path at which it is served."""
    name, content_type = _FILES[path]
    return HttpAnswer(200, (_ASSETS / name).read_bytes(), content_type, STRICT)


def picture(agent: Agent) -> HttpAnswer:
    """Return the picture of the machine as JSON, what other device plugins gave out included."""
    ours = sorted(agent.ledger.grants.values(), key=lambda grant: (grant.granted_at, grant.id))
    others = sorted(agent.ledger.foreign.values(), key=lambda grant: grant.id)
    drawn = draw(agent.inventory, (*ours, *others), reserved=agent.settings.reserved, health=agent.health)
    return HttpAnswer(200, json.dumps(to_document(drawn)).encode() + b"\n", headers=STRICT)
