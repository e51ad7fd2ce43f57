"""The man pages nodeagent(8) and nodeagent.yaml(5), generated from the command line's parser, from the configuration's
schema and from the tables of docs/configuration.md. A key of the schema that the tables lack ends the build, so the
pages are complete.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from roff import bold, entry, escaped, from_markdown, section

from nodeagent.cli.help.parser import Parser, leaves

CONFIG = "/etc/nodeagent/config.yaml"
MANUAL = "System Administration"


class StaleError(Exception):
    """The documentation lacks something that the program has."""


def program(parser: Parser, version: str, epoch_s: int) -> str:
    """Return nodeagent(8)."""
    return "".join(
        (
            _title("NODEAGENT", 8, version, epoch_s),
            section("NAME", "nodeagent \\- assign CPUs, hugepages and devices of a Kubernetes node"),
            section(
                "SYNOPSIS", f"{bold('nodeagent')} [{bold('--version')}] {_italic('VERB')} [{_italic('OPTION')}...]"
            ),
            section("DESCRIPTION", *_about()),
            ".SH VERBS\n",
            *map(_verb, leaves(parser)),
            section("EXIT STATUS", *(entry(bold(code), text) for code, text in _exit_codes(parser))),
            section("ENVIRONMENT", *(entry(bold(name), escaped(text)) for name, text in _environment(parser))),
            section("FILES", *(entry(_italic(path), escaped(text)) for path, text in _files())),
            section("SEE ALSO", f"{bold('nodeagent.yaml')}(5), {_italic('/usr/share/doc/nodeagent/')}"),
        )
    )


def configuration(schema: Mapping[str, Any], tables: str, version: str, epoch_s: int) -> str:
    """Return nodeagent.yaml(5). schema: the JSON schema of the configuration. tables: the text of
    docs/configuration.md. Raise StaleError if a key of the schema is in none of the tables."""
    whole, resource, pool = (list(_rows(tables, title)) for title in ("Configuration", "A resource", "Hugepages"))
    lacking = sorted(_keys(schema) - _named(whole + resource + pool))
    if lacking:
        raise StaleError(f"cannot generate nodeagent.yaml(5): docs/configuration.md lacks {', '.join(lacking)}")
    return "".join(
        (
            _title("NODEAGENT.YAML", 5, version, epoch_s),
            section("NAME", "nodeagent.yaml \\- configuration of nodeagent"),
            section("SYNOPSIS", _italic(CONFIG)),
            section("DESCRIPTION", *_about_configuration()),
            section("KEYS", *map(_row, whole)),
            section("KEYS OF A RESOURCE", f"In the list {bold('resources')}:", *map(_row, resource)),
            section("KEYS OF A HUGEPAGE POOL", f"In the list {bold('hugepages')}:", *map(_row, pool)),
            section("SEE ALSO", f"{bold('nodeagent')}(8), {_italic('/usr/share/doc/nodeagent/configuration.md')}"),
        )
    )


# ---------------------------------------------------------------- the program


def _about() -> Iterator[str]:
    yield escaped(
        "One daemon per Kubernetes node that assigns exclusive CPUs, hugepages, GPUs, NICs and other devices to "
        "containers, placed close to each other and recorded in one durable ledger. It serves them through the device "
        "plugin API and through Dynamic Resource Allocation."
    )
    yield (
        f"The package does not start it: check {_italic(CONFIG)}, then run {bold('systemctl enable --now nodeagent')}."
    )


def _verb(parser: Parser) -> str:
    text = parser.description
    shown = [one for one in _arguments(parser) if one.help != argparse.SUPPRESS]
    words = " ".join(_usage(one) for one in shown if not one.option_strings)
    head = f".SS {bold(parser.prog)}{' ' + words if words else ''}\n"
    examples = "".join(_example(*one) for one in parser.about.examples)
    return head + (f"{escaped(text)}\n" if text else "") + "".join(map(_argument, shown)) + examples


def _argument(one: argparse.Action) -> str:
    choices = f"one of {', '.join(map(str, one.choices))}" if one.choices else ""
    said = "; ".join(part for part in (one.help or "", choices) if part)
    if not one.option_strings:
        return entry(_usage(one), escaped(said)) if said else ""
    value = "" if one.nargs == 0 else f" {_italic(_value(one))}"
    return entry(", ".join(bold(flag) + value for flag in one.option_strings), escaped(said))


def _usage(one: argparse.Action) -> str:
    name = _italic(_value(one))
    return f"[{name}]" if one.nargs == "?" else name


def _value(one: argparse.Action) -> str:
    return str(one.metavar or one.dest.upper())


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    skipped = (argparse._HelpAction, argparse._SubParsersAction)
    return [one for one in parser._actions if not isinstance(one, skipped)]


def _example(command: str, text: str) -> str:
    return f".PP\n.nf\n.RS\n{escaped(command)}\n.RE\n.fi\n.RS\n{escaped(text)}.\n.RE\n"


def _exit_codes(parser: Parser) -> Iterator[tuple[str, str]]:
    """Yield the exit codes of all verbs, and those of some verbs with their names."""
    for code, text in parser.about.exit_codes.items():
        yield str(code), escaped(text)
    for leaf in leaves(parser):
        for code, text in leaf.about.exit_codes.items():
            if parser.about.exit_codes.get(code) != text:
                yield f"{code} ({leaf.prog})", escaped(text)


def _environment(parser: Parser) -> Iterator[tuple[str, str]]:
    yield from {name: text for one in leaves(parser) for name, text in one.about.environment.items()}.items()


def _files() -> Iterator[tuple[str, str]]:
    yield CONFIG, "the configuration"
    yield "/var/lib/nodeagent", "the ledger: who holds what"
    yield "/run/nodeagent/status.sock", "the status socket"
    yield "/usr/share/doc/nodeagent/examples", "drop-ins of the unit for DRA, partitions and interrupts"


# ---------------------------------------------------------------- the configuration


def _about_configuration() -> Iterator[str]:
    yield escaped(
        "A YAML file. Every key is optional. Unknown keys and wrong values are refused with their place and what is "
        "expected. A running agent reads a changed file within seconds, and keeps the old configuration if the new one "
        "is refused."
    )
    yield f"{bold('nodeagent config check')} {_italic('FILE')} reports what is wrong, or what would be served."
    yield "Keys marked \\(S1 are read at the start only."


def _row(cells: list[str]) -> str:
    """Return a row: the key, between it and the meaning its default and what it is for."""
    key, default, *middle, meaning = cells
    notes = [f"default {default}" if default else "", *(f"for {one}" for one in middle)]
    note = "; ".join(one for one in notes if one)
    text = from_markdown(meaning.replace("¹", "")) + (f" ({from_markdown(note)})" if note else "")
    return entry(from_markdown(key).replace("¹", "\\(S1"), text)


def _rows(text: str, title: str) -> Iterator[list[str]]:
    """Yield the rows of the first table below a heading."""
    (below,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    lines = [line for line in below.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _named(rows: list[list[str]]) -> set[str]:
    """Return the last parts of the keys that rows are about, and the words in code in what they say."""
    return {part for cells in rows for one in re.findall(r"`([^`]+)`", " ".join(cells)) for part in one.split(".")}


def _keys(schema: Mapping[str, Any]) -> set[str]:
    return {key for one in schema["$defs"].values() for key in one.get("properties", {})}


def _title(name: str, part: int, version: str, epoch_s: int) -> str:
    date = time.strftime("%Y-%m-%d", time.gmtime(epoch_s))
    return f'.TH {name} {part} {date} "nodeagent {version}" "{MANUAL}"\n'


def _italic(text: str) -> str:
    return f"\\fI{escaped(text)}\\fR"


def tables(docs: Path) -> str:
    """Return the text that has the tables of keys."""
    return (docs / "configuration.md").read_text()
