"""What the last of some words could become: verbs, options, choices, and what the agent knows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from nodeagent.cli.completion.values import values
from nodeagent.cli.help.parser import Parser, help_of, subparsers
from nodeagent.cli.shared.ask import SOCKET

FILES = frozenset({"FILE", "DIR", "PATH", "CAPTURE"})
"""Arguments that the shell completes, by their names in the help."""
SHELL_COMPLETES = 1
"""Exit code: the word is the name of a file."""
_REPEATABLE = (argparse._AppendAction,)


class _Typed(NamedTuple):
    """The words before the last one. parser: of the last verb. awaited: the option whose value the last word is."""

    parser: Parser
    positionals: Sequence[str]
    options: Mapping[str, str]
    awaited: argparse.Action | None


def run(words: Sequence[str], parser: Callable[[Collection[str]], Parser], verbs: Collection[str]) -> int:
    """Print what the last word could become. Return SHELL_COMPLETES if it is the name of a file.

    words: what stands after the program's name. parser: returns the parser with the options of some verbs.
    """
    *before, current = words or [""]
    typed = _typed(parser([one for one in before if one in verbs][:1]), before)
    found = _candidates(typed, current)
    if found is None:
        return SHELL_COMPLETES
    for word, text in found.items():
        if word.startswith(current):
            sys.stdout.write(f"{word}\t{text}\n")
    return 0


def _typed(parser: Parser, words: Sequence[str]) -> _Typed:
    positionals: list[str] = []
    options: dict[str, str] = {}
    awaited: argparse.Action | None = None
    for word in words:
        flag, equals, value = word.partition("=")
        if awaited is not None:
            options[awaited.option_strings[-1]] = word
            awaited = None
        elif word in subparsers(parser):
            parser, positionals = subparsers(parser)[word], []
        elif word.startswith("-"):
            action = parser._option_string_actions.get(flag)
            options.update(dict.fromkeys(action.option_strings if action else [flag], value))
            awaited = action if action is not None and action.nargs != 0 and not equals else None
        else:
            positionals.append(word)
    return _Typed(parser, positionals, options, awaited)


def _candidates(typed: _Typed, current: str) -> dict[str, str] | None:
    """Return what a word could be, with what each means, or None for names of files."""
    if typed.awaited is not None:
        return _values(typed.awaited, typed)
    flag, equals, _ = current.partition("=")
    if equals and (action := typed.parser._option_string_actions.get(flag)) is not None:
        found = _values(action, typed)
        return None if found is None else {f"{flag}={one}": text for one, text in found.items()}
    if current.startswith("-"):
        return dict(_options(typed))
    below = {one: help_of(typed.parser, one) for one in subparsers(typed.parser)}
    if below:
        return below
    action = _positional(typed)
    return dict(_options(typed)) if action is None else _values(action, typed)


def _positional(typed: _Typed) -> argparse.Action | None:
    """Return the argument that comes next, or None if there is none."""
    every = [one for one in typed.parser._actions if not one.option_strings]
    place = len(typed.positionals)
    if place < len(every):
        return every[place]
    return every[-1] if every and every[-1].nargs in ("+", "*") else None


def _values(action: argparse.Action, typed: _Typed) -> dict[str, str] | None:
    """Return what an argument can be, or None for names of files."""
    known = action.choices or getattr(action.type, "words", None)
    if known:
        return {str(one): "" for one in known}
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return None if metavar in FILES else values(metavar, typed.options.get("--socket", SOCKET))


def _options(typed: _Typed) -> Iterator[tuple[str, str]]:
    """Yield the options that are not given yet."""
    for action in typed.parser._actions:
        if action.help != argparse.SUPPRESS and (
            isinstance(action, _REPEATABLE) or not set(action.option_strings) & set(typed.options)
        ):
            yield from ((flag, " ".join((action.help or "").split())) for flag in action.option_strings)
