"""What the command line says about itself is complete, and its examples are commands that it understands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest

from nodeagent.cli import VERBS, parser
from nodeagent.cli.help.parser import Parser, leaves, subparsers

SHELL = (">", "|", "<", "&&")


def every_parser() -> Iterator[Parser]:
    """The program's, every verb's, and those of the verbs below them."""
    due = [parser()]
    while due:
        yield (one := due.pop())
        due += subparsers(one).values()


def examples() -> Iterator[str]:
    yield from sorted({command for one in every_parser() for command, _ in one.about.examples})


@pytest.mark.parametrize("one", list(leaves(parser())), ids=lambda one: str(one.prog))
def test_every_verb_has_a_sentence_and_an_example(one: Parser) -> None:
    assert one.description, f"{one.prog}: give add_parser a help text"
    assert one.about.examples, f"{one.prog}: its module needs EXAMPLES with a command that begins with {one.prog!r}"
    assert all(text and not text.endswith(".") for _, text in one.about.examples)


@pytest.mark.parametrize("one", list(every_parser()), ids=lambda one: str(one.prog))
def test_the_help_of_every_verb_has_examples_exit_codes_and_environment(one: Parser) -> None:
    text = one.format_help()
    assert [title for title in ("examples:", "exit codes:", "environment:") if f"\n{title}\n" not in text] == []
    assert text.startswith("usage: nodeagent") and "-h, --help" in text


@pytest.mark.parametrize("command", list(examples()))
def test_every_example_is_understood(command: str) -> None:
    """What follows a redirection is the shell's."""
    words = shlex.split(command)
    first = next((words.index(one) for one in words if one in SHELL), len(words))
    assert words[0] == "nodeagent"
    found = parser([words[1]]).parse_args(words[1:first])
    assert found.verb in VERBS


@pytest.mark.parametrize("one", list(every_parser()), ids=lambda one: str(one.prog))
def test_every_option_is_explained(one: Parser) -> None:
    assert not [action.option_strings for action in one._actions if action.option_strings and not action.help]


def test_every_option_means_the_same_everywhere() -> None:
    """-o is the form, or the file, of what is written; -n a namespace, -w a watch; of top, a count as in top."""
    meanings: dict[str, set[str]] = {}
    for one in every_parser():
        for action in one._actions:
            for flag in action.option_strings if one.prog != "nodeagent top" else ():
                meanings.setdefault(flag, set()).add(action.dest)
    assert {flag: dests for flag, dests in meanings.items() if len(flag) == 2 and len(dests) > 1} == {}
