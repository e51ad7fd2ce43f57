"""Bash completion, generated from the command line's parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

from nodeagent.cli.help.parser import subparsers

_HEAD = """\
# bash completion for nodeagent, generated from its parser
_nodeagent() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} verb= word
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case "$verb $word" in
"""
_VALUES = """\
        esac
    done
    case "$verb $previous" in
"""
_WORDS = """\
    esac
    case "$verb" in
"""
_TAIL = """\
    esac
}
complete -o default -F _nodeagent nodeagent
"""


def bash(parser: argparse.ArgumentParser) -> str:
    """Return the script. What a verb does not complete, such as a file, the shell does."""
    every = list(_walk(parser, ""))
    moves = [_case(f"{path} {name}", f'verb="{path} {name}"', 12) for path, one in every for name in subparsers(one)]
    values = [line for path, one in every for line in _values(path, one)]
    words = [_case(path, _reply(_words(one)), 8) for path, one in every]
    return "".join((_HEAD, *moves, _VALUES, *values, _WORDS, *words, _TAIL))


def _case(pattern: str, action: str, indent: int) -> str:
    return f'{" " * indent}"{pattern}") {action} ;;\n'


def _reply(words: Iterable[str]) -> str:
    return f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$current"))'


def _walk(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every parser with the verbs that lead to it, each after a space."""
    yield path, parser
    for name, one in subparsers(parser).items():
        yield from _walk(one, f"{path} {name}")


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from subparsers(parser)
    for one in parser._actions:
        yield from one.option_strings
        if not one.option_strings and one.choices and not isinstance(one, argparse._SubParsersAction):
            yield from map(str, one.choices)


def _values(path: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield what follows an option that takes a value: one of its choices, or whatever the shell completes."""
    for one in parser._actions:
        if one.option_strings and one.nargs != 0:
            flags = "|".join(f'"{path} {flag}"' for flag in one.option_strings)
            reply = f"{_reply(map(str, one.choices))}; " if one.choices else ""
            yield f"        {flags}) {reply}return ;;\n"
