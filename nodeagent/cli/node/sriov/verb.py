"""`nodeagent import sriov`: the configuration of the SR-IOV network device plugin as one of the agent. A dry run unless
--out is given.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.cli.output import forms
from nodeagent.cli.shared.manifests import parse_documents, parse_json, read_bytes
from nodeagent.cli.shared.tables import print_table
from nodeagent.config.load import parse
from nodeagent.core.imports.findings import INCOMPLETE, Finding, Translation
from nodeagent.core.imports.sriov import translate
from nodeagent.errors import InputError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.sysfs import atomic_file
from nodeagent.resources.offer import offers

EXAMPLES = (
    ("nodeagent import sriov config.json", "what becomes of each key of the SR-IOV plugin's configuration, and why"),
    (
        "kubectl -n kube-system get cm sriovdp-config -o yaml | nodeagent import sriov - --out /tmp/new",
        "write a configuration that serves the same",
    ),
)
DONE, REFUSED = 0, 3
CONFIG = "config.yaml"


def add_verb(verbs: argparse._SubParsersAction[Any]) -> None:
    """Add `sriov` with its options to the verbs of `nodeagent import`."""
    text = "translate the configuration of the SR-IOV network device plugin; a dry run without --out"
    verb = verbs.add_parser("sriov", help=text, description=text)
    verb.add_argument("file", metavar="FILE", help="config.json, or a ConfigMap with it; - for standard input")
    verb.add_argument("--out", metavar="DIR", help=f"write {CONFIG} into this folder")
    verb.add_argument("--entry", metavar="NAME", default="", help="the entry of a ConfigMap that has several")
    verb.add_argument(
        "--resource-prefix", metavar="DOMAIN", default="intel.com", help="as given to the plugin (intel.com)"
    )
    forms.add_output(verb, forms.ANSWER_FORMS)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    found = translate(_configuration(args.file, args.entry), args.resource_prefix)
    text = _text(found)
    offers(parse(text, source=CONFIG), load_kinds())
    path = Path(args.out) / CONFIG if args.out else None
    if path is not None:
        _write(path, text)
    document = {
        "complete": not _incomplete(found),
        "entries": [_row(one) for one in found.findings],
        "configuration": found.config,
        "written": [str(path)] if path is not None else [],
        "next": _next(found, path),
    }
    forms.write(args, document, lambda shown: _print(shown, "" if path else text, whole=args.no_trunc))
    return REFUSED if _incomplete(found) else DONE


def _configuration(file: str, entry: str) -> Any:
    """Return the decoded configuration. Raise InputError if it cannot be read, or it is unclear which is meant."""
    document = _decoded(read_bytes(file, file), file)
    if not isinstance(document, dict) or document.get("kind") != "ConfigMap":
        return document
    data = document.get("data")
    entries = {str(name): text for name, text in data.items()} if isinstance(data, dict) else {}
    names = ", ".join(sorted(entries)) or "none"
    if entry and entry not in entries:
        raise InputError(f"cannot read entry {entry} of {file}: it has {names}")
    if not entry and len(entries) != 1:
        raise InputError(f"cannot choose an entry of {file}: give one with --entry, it has {names}")
    name = entry or next(iter(entries))
    return _decoded(str(entries[name]).encode(), f"{file}, entry {name}")


def _decoded(text: bytes, source: str) -> Any:
    """Return a JSON or YAML document; JSON may have tabs, which YAML does not take."""
    try:
        return parse_json(text, source)
    except InputError:
        raise
    except ValueError as error:
        if text.lstrip().startswith((b"{", b"[")):
            raise InputError(f"cannot read {source}: {error}") from None
    documents = parse_documents(text, source)
    if len(documents) > 1:
        raise InputError(f"cannot read {source}: expected one document, found {len(documents)}")
    return documents[0] if documents else None


def _text(found: Translation) -> str:
    """Return the configuration as YAML, with what an admin has to look at on top."""
    notes = (f"{one.said.state}: {one.place} {one.value}: {one.said.why}" for one in _incomplete(found))
    return "".join(f"# {' '.join(one.split())}\n" for one in notes) + yaml.dump(
        dict(found.config), Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, width=110
    )


def _write(path: Path, text: str) -> None:
    if path.exists():
        raise InputError(f"cannot write {path}: it is there already")
    atomic_file.replace(path, text.encode())


def _incomplete(found: Translation) -> list[Finding]:
    """Return what an admin has to look at."""
    return [one for one in found.findings if one.said.state in INCOMPLETE]


def _row(one: Finding) -> dict[str, str]:
    said = one.said
    return {"state": said.state.value, "place": one.place, "value": one.value, "to": said.to, "why": said.why}


def _print(shown: dict[str, Any], text: str, *, whole: bool) -> None:
    cells = [(row["state"], row["place"], row["value"], row["to"], row["why"]) for row in shown["entries"]]
    print_table(("STATE", "PLACE", "VALUE", "TO", "WHY"), cells, whole=whole)
    if text:
        print(f"\n# {CONFIG}\n{text}", end="")
    print()
    for step in shown["next"]:
        print(f"next: {step}")


def _next(found: Translation, path: Path | None) -> list[str]:
    steps = []
    if left := _incomplete(found):
        steps.append(f"read why {len(left)} values are not, or not wholly, in what is written")
    if path is None:
        return [*steps, "run it again with --out DIR"]
    return [
        *steps,
        f"nodeagent config check {path} --here",
        f"make it {DEFAULT_CONFIG}, or add its keys there: with `resources`, only what is listed is served",
        "remove the SR-IOV plugin from the node, then start the agent or reload its configuration: pods that run keep "
        "what they have",
    ]
