"""`nodeagent reload`: have the running agent read its configuration again."""

from __future__ import annotations

import argparse
from typing import Any

from nodeagent.cli.output import forms
from nodeagent.cli.shared import ask

EXAMPLES = (
    ("nodeagent reload", "apply a changed configuration, and show what changed"),
    ("nodeagent reload -o json", "the same for scripts"),
)
EXIT_CODES = {2: "bad input, or a configuration that the agent refuses; it keeps the one that it has"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent reload`."""
    ask.add_socket(parser)
    forms.add_output(parser, forms.ANSWER_FORMS)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    forms.write(args, ask.request(args.socket, "POST", "/v1/reload"), _print)
    return 0


def _print(done: Any) -> None:
    for one in done["changed"]:
        print(f"changed: {one}")
    if not done["changed"]:
        print("nothing changed")
