"""The forms of -o, and writing a document or a list in one of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nodeagent.cli.output.columns import Column, in_order
from nodeagent.cli.shared.tables import print_document, print_table
from nodeagent.errors import InputError

TABLE, WIDE, JSON, YAML, NAME, JSONPATH = "table", "wide", "json", "yaml", "name", "jsonpath"
LIST_FORMS = (TABLE, WIDE, JSON, YAML, NAME, JSONPATH)
ANSWER_FORMS = (TABLE, JSON, YAML, JSONPATH)
DOCUMENT_FORMS = (TABLE, WIDE, JSON, YAML, JSONPATH)
_SHOWN = {JSONPATH: "jsonpath=TEMPLATE"}


class Form(NamedTuple):
    """A value of -o. parts: of a jsonpath template."""

    kind: str
    parts: Sequence[Any] = ()

    @property
    def is_table(self) -> bool:
        """Return whether it is for people to read."""
        return self.kind in (TABLE, WIDE)


def add_output(parser: argparse.ArgumentParser, forms: Sequence[str] = LIST_FORMS) -> None:
    """Add the options that say how an answer is written. forms: those that make sense for the verb."""
    known = ", ".join(_SHOWN.get(one, one) for one in forms)
    parser.add_argument(
        "-o", "--output", metavar="FORM", type=_Reader(forms), default=Form(TABLE), help=f"{known} (table)"
    )
    parser.add_argument("--no-trunc", action="store_true", help="do not cut tables to the width of the terminal")


class _Reader:
    """Reads a value of -o for argparse. words: for completion."""

    def __init__(self, forms: Sequence[str]) -> None:
        self._forms = forms
        self.words = [one if one != JSONPATH else f"{one}=" for one in forms]

    def __call__(self, text: str) -> Form:
        """Return the form. Raise ArgumentTypeError with what is wrong, and where."""
        kind, equals, template = text.partition("=")
        if kind not in self._forms or bool(equals) != (kind == JSONPATH):
            known = ", ".join(_SHOWN.get(one, one) for one in self._forms)
            raise argparse.ArgumentTypeError(f"unknown form {text[:40]!r}: expected one of {known}")
        return Form(kind, _parts(template)) if kind == JSONPATH else Form(kind)


def _parts(template: str) -> Sequence[Any]:
    from nodeagent.cli.output.jsonpath_syntax import parse

    try:
        return parse(template)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def write(args: argparse.Namespace, document: Any, show: Callable[[Any], None]) -> None:
    """Write a document in the form that was asked for. show: prints it as tables."""
    form: Form = args.output
    if form.is_table:
        show(document)
    elif form.kind == JSONPATH:
        from nodeagent.cli.output.jsonpath import printed

        sys.stdout.write(printed(form.parts, json.loads(json.dumps(document))))  # with keys as -o json has them
    elif form.kind == YAML:
        print_document(document, YAML)
    else:
        print(json.dumps(document, indent=1))


def write_list(
    args: argparse.Namespace, items: Sequence[Any], columns: Sequence[Column], name: Callable[[Any], str] = str
) -> None:
    """Write a list in the form that was asked for, sorted if that was asked for. name: what identifies an item."""
    sort_by = getattr(args, "sort_by", None)
    ordered = in_order(items, columns, sort_by) if sort_by else items
    if args.output.kind == NAME:
        for one in dict.fromkeys(map(name, ordered)):
            print(one)
        return
    write(args, ordered, lambda rows: print_columns(args, rows, columns))


def print_columns(args: argparse.Namespace, items: Sequence[Any], columns: Sequence[Column]) -> None:
    """Print a table with one row for each item."""
    shown = [one for one in columns if args.output.kind == WIDE or not one.wide]
    print_table(
        [one.heading for one in shown], ([one.cell(item) for one in shown] for item in items), whole=args.no_trunc
    )
