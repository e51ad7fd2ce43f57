"""`nodeagent completion`: the script that makes a shell complete this program's words."""

from __future__ import annotations

import argparse
import sys

from nodeagent.cli.completion.scripts import SCRIPTS

EXAMPLES = (
    ("nodeagent completion bash > /etc/bash_completion.d/nodeagent", "for bash; the Debian package has it"),
    ("nodeagent completion zsh > /usr/local/share/zsh/site-functions/_nodeagent", "for zsh"),
    ("nodeagent completion fish > ~/.config/fish/completions/nodeagent.fish", "for fish"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent completion`."""
    parser.add_argument("shell", choices=list(SCRIPTS), help="the shell that reads the script")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    sys.stdout.write(SCRIPTS[args.shell])
    return 0
