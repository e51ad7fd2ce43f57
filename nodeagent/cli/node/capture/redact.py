"""Takes secrets out of configurations, command lines and logs. Paths of files with secrets stay: they are none."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "REDACTED"
_KEY = re.compile(r"(?i)passw|secret|token|credential|api.?key|private.?key|key.?data|authorization|cookie")
_ASSIGNED = re.compile(
    r"(?i)(\b[\w.-]*(?:passw\w*|secret|token|credentials?|api.?key|private.?key|authorization)[\"']?\s*[=:]\s*[\"']?"
    r"(?:bearer\s+|basic\s+)?)([^\s\0\"'/,;&}][^\s\0\"',;&}]*)"
)
_FLAG = re.compile(r"(?i)(--[\w-]*(?:passw|secret|token|credential|api-?key)[\w-]*[ \0])([^\s\0/-][^\s\0]*)")
_URL = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)[^/\s@:]+:[^\s@]+@")
_PEM = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?-----END \1-----", re.S)
_BEARER = re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")
"""A JSON Web Token, as service accounts have."""


def document(value: Any, *, secret: bool = False) -> Any:
    """Return plain types with every value hidden that stands below a key which names a secret."""
    if secret and isinstance(value, int | float) and not isinstance(value, bool):
        return HIDDEN
    if isinstance(value, dict):
        named = "value" in value and isinstance(value.get("name"), str) and bool(_KEY.search(value["name"]))
        return {
            key: document(one, secret=secret or bool(_KEY.search(str(key))) or (named and key == "value"))
            for key, one in value.items()
        }
    if isinstance(value, list):
        after_flag = [False, *map(_is_secret_flag, value)]
        return [document(one, secret=secret or after) for after, one in zip(after_flag, value, strict=False)]
    if isinstance(value, str):
        return HIDDEN if secret and value and not value.startswith("/") else text(value)
    return value


def _is_secret_flag(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("-") and "=" not in value and bool(_KEY.search(value))


def text(value: str) -> str:
    """Return free text with secrets hidden: assignments, flags, URLs with a password, private keys, bearer tokens."""
    value = _PEM.sub(HIDDEN, value)
    value = _URL.sub(rf"\1{HIDDEN}@", value)
    value = _BEARER.sub(HIDDEN, value)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", _FLAG.sub(rf"\1{HIDDEN}", value))


def configuration(content: bytes) -> bytes:
    """Return a YAML or JSON file with its secrets hidden; text that is neither as free text."""
    import yaml

    try:
        found = yaml.safe_load(content)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        return text(content.decode("utf-8", "replace")).encode()
    return yaml.safe_dump(document(found), sort_keys=False).encode()
