"""The files that `nodeagent import nvidia` reads, translated: each document by what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from nodeagent.cli.shared.manifests import parse_documents, read_documents
from nodeagent.core.imports.findings import Finding, Translation
from nodeagent.core.imports.nvidia import chart, claims, plugin
from nodeagent.errors import InputError

PLUGIN_VALUES = frozenset({"migStrategy", "deviceListStrategy", "deviceIDStrategy", "compatWithCPUManager", "config"})
"""Keys of the values of the chart of NVIDIA's device plugin."""
EXPECTED = (
    "expected a configuration of NVIDIA's device plugin (version: v1), a ConfigMap with one, values of the chart of "
    "NVIDIA's DRA driver, or Kubernetes objects"
)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for besides the files. entry: the one of a ConfigMap, if it has several."""

    profiles: Sequence[str] = ()
    as_written: bool = False
    entry: str = ""


class Taken(msgspec.Struct):
    """All files together."""

    config: dict[str, Any] = msgspec.field(default_factory=dict)
    """Of the agent; empty if no file has any."""
    findings: list[Finding] = msgspec.field(default_factory=list)
    objects: list[Mapping[str, Any]] = msgspec.field(default_factory=list)
    """What the configuration needs in the cluster."""
    manifests: dict[str, list[Mapping[str, Any]]] = msgspec.field(default_factory=dict)
    """The objects of each file that has some, rewritten or as they are."""


def take(files: Sequence[str], asked: Asked) -> Taken:
    """Return what the files become. Raise InputError if one cannot be read or two contradict each other."""
    taken, configured = Taken(), dict[str, str]()
    for file in files:
        documents = read_documents(file, file)
        if not documents:  # what a failed command has left in a pipe is no configuration of which nothing is lost
            raise InputError(f"cannot read {file}: it is empty; {EXPECTED}")
        for number, document in enumerate(documents):
            where = f"{file}: " if len(files) > 1 else ""
            if not isinstance(document, dict):
                raise InputError(f"cannot read document {number + 1} of {file}: {EXPECTED}")
            for one in _objects(document):
                _take(taken, configured, one, where, file, asked)
    return taken


def _take(taken: Taken, configured: dict[str, str], one: dict[str, Any], where: str, file: str, asked: Asked) -> None:
    if isinstance(one.get("kind"), str) and one["kind"] != "ConfigMap":
        if claims.is_for_nvidia(one):
            one, found = claims.rewrite(one, f"{where}{one['kind']} {_name(one)}: ")
            taken.findings += found
        taken.manifests.setdefault(file, []).append(one)
        return
    what, translated = _translated(one, where, file, asked)
    if what in configured:
        raise InputError(f"cannot translate {file}: {configured[what]} has the {what} already")
    configured[what] = file
    taken.findings += translated.findings
    taken.objects += translated.objects
    _merge(taken.config, translated.config, file)


def _objects(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a document, or the items of a list of objects."""
    items = document.get("items")
    if str(document.get("kind", "")).endswith("List") and isinstance(items, list):
        yield from (one for one in items if isinstance(one, dict))
    else:
        yield document


def _translated(one: dict[str, Any], where: str, file: str, asked: Asked) -> tuple[str, Translation]:
    if one.get("kind") == "ConfigMap":
        name, one = _entry(one, file, asked.entry)
        where = f"{where}{name}: "
    if plugin.is_plugin_config(one):
        options = {"profiles": asked.profiles, "as_written": asked.as_written}
        return "configuration of the device plugin", plugin.translate(one, **options, where=where)  # type: ignore[arg-type]
    if one.keys() & PLUGIN_VALUES:
        raise InputError(
            f"cannot read {file}: values of the chart of NVIDIA's device plugin; give the configuration in config.map, "
            "or the ConfigMap that the chart makes"
        )
    if chart.is_chart_values(one):
        return "chart of the DRA driver", chart.translate(one, where)
    raise InputError(f"cannot read {file}: {EXPECTED}")


def _entry(one: Mapping[str, Any], file: str, wanted: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the one configuration of a ConfigMap that is asked for."""
    data = one.get("data")
    entries = data if isinstance(data, dict) else {}
    names = ", ".join(sorted(entries)) or "none"
    if wanted and wanted not in entries:
        raise InputError(f"cannot read entry {wanted} of {file}: it has {names}")
    if not wanted and len(entries) != 1:
        raise InputError(f"cannot choose an entry of {file}: give one with --entry, it has {names}")
    name = wanted or next(iter(entries))
    text, source = entries[name], f"{file}, entry {name}"
    documents = parse_documents(text.encode(), source) if isinstance(text, str) else []
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise InputError(f"cannot read {source}: {EXPECTED}")
    return name, documents[0]


def _merge(config: dict[str, Any], more: Mapping[str, Any], file: str) -> None:
    for key, value in more.items():
        if key == "resources":
            config["resources"] = [*config.get("resources", ()), *value]
        elif key in config and config[key] != value:
            raise InputError(f"cannot translate {file}: its {key} is {value}, another file's {config[key]}")
        else:
            config[key] = value


def _name(one: Mapping[str, Any]) -> str:
    meta = one.get("metadata")
    found = meta if isinstance(meta, dict) else {}
    return "/".join(str(found[key]) for key in ("namespace", "name") if found.get(key)) or "without a name"
