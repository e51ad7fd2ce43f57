"""A capture without names of pods, namespaces, nodes, claims and containers, without UUIDs, MAC and IP addresses, and
without serial numbers.

The same thing is replaced by the same everywhere: in file names, in pages, in kubelet's files, inside of the ledger.
What kind of machine it is, what is held and where stays as it was.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nodeagent.cli.node.capture import named_texts
from nodeagent.cli.node.capture.archive import Members
from nodeagent.cli.node.capture.named_texts import Named
from nodeagent.cli.node.capture.pseudonyms import Pseudonyms
from nodeagent.cli.shared.capture_format import DEVICES, LOG, STATE, TREE
from nodeagent.state.store import FILE as LEDGER

KINDS = {
    **dict.fromkeys(("namespace", "podnamespace", "claimnamespace"), "namespace"),
    **dict.fromkeys(("pod", "podname"), "pod"),
    **dict.fromkeys(("container", "containername"), "container"),
    **dict.fromkeys(("claim", "claimname"), "claim"),
    "podclaim": "podclaim",
    **dict.fromkeys(("node", "nodename", "hostname", "hostnameoverride", "pool"), "node"),
}
"""What the value of a key names, by the key in lower case without "_" and "-"."""
SERIALS = frozenset(
    {
        *("serial", "serialnumber", "vpdpg80", "vpdpg83", "wwid", "nguid", "eui", "uuid", "uniqueid", "physswitchid"),
        *("physportid", "nodeguid", "sysimageguid", "boardserial", "productserial", "chassisserial", "productuuid"),
        *("permaddr", "hwaddr", "wwn", "guid"),
    }
)
"""Files and attributes with what identifies one device, written in the same way."""
NAMED_IN_TREE = ("mounts", "mountinfo", "cmdline", "hostname", "swaps")
"""Files of the kernel that may name pods or nodes."""
_REFUSED = re.compile(r"claim ([^/ ]+)/([^/ ]+)(?: of (.*))?$")
_WORD = re.compile(r"[a-z][a-z0-9_]*")
_TEXTS = (
    *(("audit_reasons", "why"), ("refusals", "holder"), ("refusals", "want"), ("refusals", "why")),
    *(("happenings", "what"), ("happenings", "why")),
)
"""Tables and columns of the ledger's file with sentences."""
KERNELS = tuple(f"{TREE}/{folder}/" for folder in ("sys", "proc", "dev"))
"""What of the tree is the kernel's; the rest are files that programs read."""
DROPPED = frozenset({"allocresp"})
"""Keys of kubelet's checkpoint whose values are left out: what plugins answered, as protobuf in base64."""


def anonymized(members: Members, host: str) -> tuple[Members, Pseudonyms]:
    """Return a capture without names, and the replacements. host: the name of this host."""
    names = Pseudonyms()
    for one in dict.fromkeys((host, host.partition(".")[0])):
        names.add("node", one)
    documents = {name: found for name in members.files if (found := _json(name, members.files[name])) is not None}
    for name, document in documents.items():
        _collect(names, document)
        if not name.startswith("kubelet/"):
            names.protect(_keys(document))
    _collect_texts(names, members)
    _collect_serials(names, members)
    ledger = members.files.get(f"{STATE}/{LEDGER}")
    if ledger is not None:
        with _opened(ledger) as (db, _):
            _collect_ledger(names, db)
    return _replaced(names, members, documents), names


def _json(name: str, content: bytes) -> Any:
    """Return a member as plain types if it is JSON, or YAML; the tree has neither."""
    if name.startswith(f"{TREE}/") or name == DEVICES or content.lstrip()[:1] not in (b"{", b"["):
        return None
    with contextlib.suppress(ValueError):
        return json.loads(content)
    return None


def _key(text: str) -> str:
    return text.lower().replace("_", "").replace("-", "")


# ---------------------------------------------------------------- collecting


def _collect(names: Pseudonyms, value: Any) -> None:
    """Collect the names in a document; what it holds of other documents as text is read too."""
    if isinstance(value, list):
        for one in value:
            _collect(names, one)
    elif isinstance(value, str):
        if (inner := _inner(value)) is not None:
            _collect(names, inner)
        else:
            _add_all(names, named_texts.in_text(value))
    elif isinstance(value, dict):
        _collect_pair(names, value)
        _collect_assigned(names, value.get("entries"))
        for key, one in value.items():
            kind = KINDS.get(_key(str(key)))
            if _key(str(key)) == "providerid" and isinstance(one, str):
                _add_all(names, [named_texts.Named(provider=one)])
            elif kind and isinstance(one, str):
                names.add(kind, one)
            elif _key(str(key)) in SERIALS and isinstance(one, str):
                names.add_serial(one)
            _collect(names, one)


def _collect_pair(names: Pseudonyms, value: dict[str, Any]) -> None:
    """Collect a name together with its namespace: as NS/NAME it is replaced also where NAME alone is a common word."""
    known = {_key(str(key)): one for key, one in value.items() if isinstance(one, str) and one}
    if known.get("claim"):
        names.add_claim(known["claim"], known.get("podclaim", ""))
    for kind in ("pod", "claim"):
        if known.get(kind) and known.get("namespace"):
            _pair(names, known["namespace"], kind, known[kind])


def _pair(names: Pseudonyms, namespace: str, kind: str, name: str) -> None:
    names._names[f"{namespace}/{name}"] = f"{names.add('namespace', namespace)}/{names.add(kind, name)}"


def _collect_assigned(names: Pseudonyms, entries: Any) -> None:
    """Collect the containers of kubelet's CPU and memory managers: {pod UID: {container: what it has}}."""
    for containers in entries.values() if isinstance(entries, dict) else ():
        for name in containers if isinstance(containers, dict) else ():
            names.add("container", str(name))


def _add_all(names: Pseudonyms, found: Iterable[Named]) -> None:
    """Add names that stand together, alone and as they are joined by slashes."""
    for one in (one for one in found if not named_texts.is_cgroup(one.namespace)):
        for kind in ("namespace", "pod", "container", "claim", "node"):
            if text := getattr(one, kind):
                names.add(kind, text)
        if one.provider:
            names.add("provider", one.provider)
            names.add("provider", one.provider.rpartition("/")[2])
        for kind in ("pod", "claim"):
            if one.namespace and getattr(one, kind):
                _pair(names, one.namespace, kind, getattr(one, kind))
        if one.namespace and one.pod and one.container:
            joined = f"{one.namespace}/{one.pod}/{one.container}"
            names._names[joined] = (
                f"{names._names[f'{one.namespace}/{one.pod}']}/{names.add('container', one.container)}"
            )


def _collect_texts(names: Pseudonyms, members: Members) -> None:
    """Collect the names in the log, in configurations and in command lines."""
    for name, content in members.files.items():
        text = content.decode("utf-8", "replace")
        if name == LOG:
            _add_all(names, named_texts.in_log(text))
        elif name.startswith(KERNELS):
            if name.rpartition("/")[2] == "cmdline":
                _add_all(names, named_texts.in_text(text))
        elif name.startswith(f"{TREE}/") or name.endswith(".yaml"):
            _collect(names, _yaml(text))


def _yaml(text: str) -> Any:
    import yaml

    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        return yaml.safe_load(text)
    return None


def _inner(text: str) -> Any:
    """Return a document that is written as text inside another one, or None."""
    if text[:1] in "{[" and text[-1:] in "}]" and text:
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return None


def _keys(value: Any) -> Iterator[str]:
    """Yield the keys of a document that look like identifiers, and the values of those that are enumerations."""
    if isinstance(value, dict):
        for key, one in value.items():
            if _WORD.fullmatch(str(key)):
                yield str(key)
            if key in ("api", "kind", "state", "type", "action") and isinstance(one, str):
                yield one
            yield from _keys(one)
    elif isinstance(value, list):
        for one in value:
            yield from _keys(one)


def _collect_serials(names: Pseudonyms, members: Members) -> None:
    for path, content in members.files.items():
        if path.startswith(f"{TREE}/") and _key(path.rpartition("/")[2]) in SERIALS:
            text = content.decode("latin-1")
            names.add_serial("".join(one for one in text if one.isprintable()))
            names.add_serial(text)


def _collect_ledger(names: Pseudonyms, db: sqlite3.Connection) -> None:
    for table in ("grants", "audit"):
        for (body,) in db.execute(f"SELECT DISTINCT body FROM {table} WHERE body != ''"):  # noqa: S608 - our own names
            _collect(names, _inner(body))
    for table, column in _TEXTS:
        for (text,) in _rows(db, f"SELECT DISTINCT {column} FROM {table}"):  # noqa: S608 - our own names
            _add_all(names, named_texts.in_text(text))
    for (holder,) in _rows(db, "SELECT DISTINCT holder FROM refusals"):
        if found := _REFUSED.match(holder):
            for pod in filter(None, (found[3] or "").split(", ")):
                _pair(names, found[1], "pod", pod)
            _pair(names, found[1], "claim", found[2])


def _rows(db: sqlite3.Connection, query: str) -> Iterable[tuple[Any, ...]]:
    try:
        return db.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []  # a file of an older build has no such table


# ---------------------------------------------------------------- replacing


def _replaced(names: Pseudonyms, members: Members, documents: dict[str, Any]) -> Members:
    after = Members()
    for name, content in members.files.items():
        after.files[_path(names, name)] = _content(names, name, content, documents)
    after.folders = {_path(names, one) for one in members.folders}
    after.links = {_path(names, name): names.serials(target) for name, target in members.links.items()}
    return after


def _path(names: Pseudonyms, path: str) -> str:
    return names.serials(path) if path.startswith(f"{TREE}/") else path


def _content(names: Pseudonyms, name: str, content: bytes, documents: dict[str, Any]) -> bytes:
    if name == f"{STATE}/{LEDGER}":
        return _ledger(names, content)
    if name in documents:
        return json.dumps(_document(names, documents[name])).encode() + b"\n"
    text = content.decode("utf-8", "surrogateescape")
    if not name.startswith(KERNELS) or name.rpartition("/")[2] in NAMED_IN_TREE:
        return names.text(text).encode("utf-8", "surrogateescape")
    return names.serials(text).encode("utf-8", "surrogateescape")


def _document(names: Pseudonyms, value: Any) -> Any:
    if isinstance(value, dict):
        return {names.text(str(key)): _value(names, str(key), one) for key, one in value.items()}
    if isinstance(value, list):
        return [_document(names, one) for one in value]
    if not isinstance(value, str):
        return value
    inner = _inner(value)
    return names.text(value) if inner is None else _written(_document(names, inner))


def _value(names: Pseudonyms, key: str, value: Any) -> Any:
    kind = KINDS.get(_key(key))
    if _key(key) in DROPPED:
        return ""
    return names.name(kind, value) if kind and isinstance(value, str) else _document(names, value)


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _ledger(names: Pseudonyms, content: bytes) -> bytes:
    """Return a ledger with every text in it replaced; what is left of the old texts in the file is overwritten."""
    with _opened(content) as (db, path):
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        db.create_function("replaced", 1, lambda text: _text(names, text), deterministic=True)
        db.create_function("named", 2, names.name, deterministic=True)
        db.create_function("crc", 1, lambda text: zlib.crc32(text.encode()), deterministic=True)
        db.execute("PRAGMA secure_delete = ON")
        db.execute("BEGIN")
        for table in tables:
            db.execute(f"UPDATE {table} SET {', '.join(_updates(db, table))}")  # noqa: S608 - names of the layout
        db.execute("UPDATE grants SET body_crc32 = crc(body)")
        db.execute("COMMIT")
        db.execute("VACUUM")
        db.close()
        return path.read_bytes()


def _updates(db: sqlite3.Connection, table: str) -> Iterator[str]:
    """Yield how each column with text is replaced."""
    for _, column, type_, *_ in db.execute(f"PRAGMA table_info({table})"):
        if table == "grants" and column in ("namespace", "pod", "container"):
            yield f"{column} = named('{column}', {column})"
        elif type_ == "TEXT" and not (table == "ways_back" or column in ("action", "op", "resource", "cpus")):
            yield f"{column} = replaced({column})"
        elif type_ != "TEXT":
            yield f"{column} = {column}"


def _text(names: Pseudonyms, text: str) -> str:
    inner = _inner(text)
    return names.text(text) if inner is None else _written(_document(names, inner))


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[tuple[sqlite3.Connection, Path]]:
    """Open a copy of a ledger in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="nodeagent-") as folder:
        path = Path(folder) / LEDGER
        path.write_bytes(content)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            yield db, path
