"""The text of help: the sections after the options, and the page of the program itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nodeagent.cli.help.about import About

GROUPS = {
    "agent": "ask a running agent",
    "machine": "the machine, and where requests fit on it",
    "node": "run, configure and repair",
    "completion": "run, configure and repair",
}
"""What the verbs in each folder are about."""
OTHERS = "more"


def sections(about: About) -> str:
    """Return what follows the options: examples, exit codes, environment."""
    examples = [f"  {command}\n      {what}" for command, what in about.examples]
    codes = [f"  {code}  {what}" for code, what in sorted(about.exit_codes.items())]
    return "".join(
        _section(title, lines)
        for title, lines in (
            ("examples", examples),
            ("exit codes", codes),
            ("environment", [*_listed(about.environment)]),
        )
    )


def overview(usage: str, description: str, verbs: Mapping[str, tuple[str, str]], options: Mapping[str, str]) -> str:
    """Return the page of the program. verbs: the module and the text of each."""
    groups: dict[str, dict[str, str]] = {}
    for name, (module, text) in verbs.items():
        groups.setdefault(GROUPS.get(module.partition(".")[0], OTHERS), {})[name] = text
    ordered = [one for one in dict.fromkeys((*GROUPS.values(), OTHERS)) if one in groups]
    width = max(map(len, (*verbs, *options)))
    parts = [_section(title, [*_listed(groups[title], width)]) for title in ordered]
    parts.append(_section("options", [*_listed(options, width)]))
    return f"{usage}\n{description}\n{''.join(parts)}"


def _section(title: str, lines: Sequence[str]) -> str:
    return f"\n{title}:\n" + "\n".join(lines) + "\n" if lines else ""


def _listed(texts: Mapping[str, str], width: int = 0) -> Iterator[str]:
    width = width or max(map(len, texts), default=0)
    return (f"  {name.ljust(width)}  {text}" for name, text in texts.items())
