"""How findings are shown: one line each, what to do below those that are not well."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from nodeagent.cli.node.doctor.model import Check, Finding, State

SIGNS = {State.OK: "✔", State.WARNING: "⚠", State.FAILURE: "✖", State.UNKNOWN: "?", State.SKIPPED: "–"}
PLAIN_SIGNS = {
    State.OK: "[ok]",
    State.WARNING: "[warn]",
    State.FAILURE: "[FAIL]",
    State.UNKNOWN: "[?]",
    State.SKIPPED: "[-]",
}
PLAIN_TERMINALS = ("dumb", "linux", "vt100", "vt220")
"""Terminals that show ASCII alone, or have no such signs in their font."""
NARROWEST, WIDEST = 40, 160
Found = Iterable[tuple[Check, Finding]]


def signs_for(stream: TextIO) -> dict[State, str]:
    """Return the signs that a stream can show."""
    if stream.isatty() and os.environ.get("TERM", "dumb") in PLAIN_TERMINALS:
        return PLAIN_SIGNS
    try:
        "".join(SIGNS.values()).encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_SIGNS
    return SIGNS


def print_findings(found: Found, *, everything: bool) -> None:
    """Print the findings, each as soon as it is known. everything: also those that do not apply."""
    signs, counts, subject = signs_for(sys.stdout), Counter[State](), ""
    wide = max(map(len, signs.values()))
    for check, finding in found:
        counts[finding.state] += 1
        if finding.state is State.SKIPPED and not everything:
            continue
        if check.subject != subject:
            subject = check.subject
            print(_printable(subject))
        for line in _lines(check, finding, signs[finding.state].ljust(wide)):
            print(_printable(line))
        sys.stdout.flush()
    print()
    print(_summary(counts))


def _printable(line: str) -> str:
    """Return a line in the characters that standard output has; control characters never reach the terminal."""
    shown = "".join(one if one.isprintable() else "?" for one in line)
    return shown.encode(sys.stdout.encoding or "ascii", "replace").decode(sys.stdout.encoding or "ascii")


def _lines(check: Check, finding: Finding, sign: str) -> Iterator[str]:
    width = min(max(shutil.get_terminal_size((WIDEST, 0)).columns, NARROWEST), WIDEST)
    name = check.name.partition(".")[2]
    head, indent = f"  {sign} {name}: ", " " * (len(sign) + 3)
    yield from textwrap.wrap(f"{head}{finding.seen}", width, subsequent_indent=indent, break_on_hyphens=False)
    if finding.fix:
        text = f"{finding.fix} (docs/{check.anchor})"
        yield from textwrap.wrap(
            text, width, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ", break_on_hyphens=False
        )


def _summary(counts: Counter[State]) -> str:
    bad = [(State.FAILURE, "failed"), (State.WARNING, "warnings"), (State.UNKNOWN, "unknown")]
    parts = [f"{counts[state]} {word}" for state, word in bad if counts[state]]
    whole = counts.total() - counts[State.SKIPPED]
    return f"{whole} checks: {', '.join(parts) or 'all well'}; {counts[State.SKIPPED]} do not apply here"


def print_commands(found: Found) -> None:
    """Print the commands that would correct what was found, to be read and copied. Runs nothing."""
    for check, finding in found:
        if finding.commands:
            print(_printable(f"# {check.name}: {finding.seen}"))
            for command in finding.commands:
                print(_printable(command))
            print()


def document(found: Found) -> dict[str, Any]:
    """Return the findings in plain types."""
    checks = [
        {
            "name": check.name,
            "state": str(finding.state),
            "seen": finding.seen,
            "fix": finding.fix,
            "commands": list(finding.commands),
            "docs": f"docs/{check.anchor}",
        }
        for check, finding in found
    ]
    return {"checks": checks, "counts": dict(Counter(one["state"] for one in checks))}


def print_json(found: Found) -> None:
    """Print the findings as JSON."""
    print(json.dumps(document(found), indent=1))
