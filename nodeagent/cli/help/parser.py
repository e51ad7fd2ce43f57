"""The parser of the command line: errors in one line, with what was probably meant, and help with examples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

from nodeagent.cli.help.about import BAD_INPUT, About


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and end the program with BAD_INPUT."""

    about: About = About()

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(BAD_INPUT)

    def format_help(self) -> str:
        """Return the help with examples, exit codes and environment."""
        from nodeagent.cli.help.text import sections

        return super().format_help() + sections(self.about)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the options; an unknown one is an error with the nearest that is known."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            leaf = self._leaf(args)
            hint = did_you_mean(unknown[0].partition("=")[0], leaf._option_string_actions)
            leaf.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(one) for one in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            what = f"there is no {'verb' if action.metavar == 'VERB' else action.metavar} {value!r}"
            raise argparse.ArgumentError(
                None, f"{what}{did_you_mean(str(value), known) or f'; {self.prog} -h lists them'}"
            )
        raise argparse.ArgumentError(action, f"unknown {value!r}: expected one of {', '.join(known)}")

    def _leaf(self, words: Sequence[str]) -> Parser:
        """Return the parser of the last verb among some words."""
        leaf = self
        for word in words:
            leaf = subparsers(leaf).get(word, leaf)
        return leaf


def subparsers(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """Return the parsers of a parser's verbs, by name."""
    found: dict[str, Parser] = {}
    for one in parser._actions:
        if isinstance(one, argparse._SubParsersAction):
            found |= one.choices
    return found


def explain(parser: Parser, about: About) -> None:
    """Give a verb, and the verbs below it, what their help says besides the options, and the options of every verb."""
    parser.about = about._replace(examples=[one for one in about.examples if is_of(one[0], parser.prog)])
    for name, one in subparsers(parser).items():
        one.description = one.description or help_of(parser, name)
        explain(one, about)
    if not subparsers(parser):
        add_color(parser)


def help_of(parser: argparse.ArgumentParser, name: str) -> str:
    """Return what a parser says of one of its verbs."""
    every = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    return next((str(choice.help or "") for one in every for choice in one._choices_actions if choice.dest == name), "")


def is_of(command: str, prog: str) -> bool:
    """Return whether a command calls a verb, or one below it."""
    return f"{command} ".startswith(f"{prog} ")


def add_color(parser: argparse.ArgumentParser) -> None:
    """Add --color, unless the verb has its own."""
    if "--color" not in parser._option_string_actions:
        parser.add_argument(
            "--color", choices=("auto", "always", "never"), default=argparse.SUPPRESS, help="when to use colour (auto)"
        )


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return the question whether the nearest of the known words was meant, or "" if none is near."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def leaves(parser: Parser) -> Iterator[Parser]:
    """Yield the parsers of all verbs that take no further verb."""
    below = subparsers(parser)
    if not below:
        yield parser
    for one in below.values():
        yield from leaves(one)
