"""The command line: `nodeagent VERB`. One file per verb, in the folder of its subject; this one
finds the verb and turns errors into exit codes.

A verb is a module with `add_arguments` and `run`, EXAMPLES, and where they differ from the usual ones EXIT_CODES and
ENVIRONMENT (help/about.py).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from nodeagent.cli.help.about import EXIT_CODES, About
from nodeagent.cli.help.parser import Parser, add_color, explain
from nodeagent.errors import ConfigError, InputError, LedgerTooNewError, NodeagentError


class Verb(NamedTuple):
    """Where a verb is, below this package, and what it does, for the help."""

    module: str
    text: str


VERBS = {
    "run": Verb("node.run", "run the agent"),
    "inventory": Verb("machine.inventory", "show what the machine has"),
    "place": Verb("machine.place", "compute where a request would go"),
    "status": Verb("agent.status", "show how a running agent stands"),
    "devices": Verb("agent.devices", "show what a running agent advertises"),
    "map": Verb("agent.map", "draw the machine with who holds which part of it"),
    "grants": Verb("agent.grants", "show who holds what"),
    "explain": Verb("agent.explain.verb", "say why: a request, a pod, a claim, a CPU or a device"),
    "advise": Verb("agent.planning.advise", "say which pods to move so that a request lies close together"),
    "web": Verb("agent.web", "show the map and the state of a running agent in a browser"),
    "top": Verb("agent.top.verb", "show what is used of what is held"),
    "forecast": Verb("agent.planning.forecast", "say how many more of a pod or claim fit"),
    "template": Verb("agent.planning.template", "print the node's shape as ResourceSlices without a node"),
    "metrics": Verb("agent.metrics", "print the metrics of a running agent, or write them for node_exporter"),
    "health": Verb("agent.health", "show what is known against devices, or clear it"),
    "doctor": Verb("node.doctor.verb", "check what on this node hinders the agent, and what to do"),
    "bench": Verb("node.bench.verb", "measure what a placement is worth on this machine"),
    "config": Verb("node.config", "check a configuration or print its schema"),
    "ledger": Verb("node.ledger", "export the ledger to a file, or import it from one"),
    "history": Verb("node.history", "show what was granted, refused and released, and who held what at a moment"),
    "release": Verb("node.release", "take a grant back by hand"),
    "reload": Verb("node.reload", "have the running agent read its configuration again"),
    "wait": Verb("node.wait", "wait until the agent is ready, its ledger whole, or all of it registered"),
    "version": Verb("node.version", "show the version of this program and of the running agent"),
    "capture": Verb("node.capture.verb", "write one node into one file, to look at elsewhere"),
    "replay": Verb("node.replay.verb", "run another command on a captured node"),
    "completion": Verb("completion.verb", "print the script that makes a shell complete these words"),
    "import": Verb("node.imports", "take over from kubelet's own managers and other plugins"),
    "uninstall": Verb("node.uninstall", "undo on this host what the agent has left there"),
}
COMPLETE = "__complete"
"""The verb that the scripts of completion call (completion/scripts.py)."""
DONE, FAILED, BAD_INPUT, REFUSED = 0, 1, 2, 3
EXAMPLES = (
    ("nodeagent status", "whether the agent of this node is ready, and what it serves"),
    ("nodeagent grants", "who holds what"),
    ("nodeagent place --cpus 8 --devices gpu=2", "where a request would go on this machine"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Return the exit code."""
    _replace_closed_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()  # here, so that a closed pipe is noticed
        return code
    except (InputError, ConfigError, LedgerTooNewError) as error:
        return _fail(str(error), BAD_INPUT)
    except NodeagentError as error:
        return _fail(str(error), FAILED)
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`): not an error, and nothing more may be written.
        _abandon_output()
        return DONE
    except OSError as error:
        _abandon_output()
        what = f"use {error.filename}" if error.filename else "write the output"
        return _fail(f"cannot {what}: {error.strerror or error}", FAILED)
    except KeyboardInterrupt:
        return 130


def _abandon_output() -> None:
    """Have what is left of the output go nowhere: the interpreter would try to write it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replace_closed_streams() -> None:
    """Have /dev/null stand in for standard streams that the caller has closed. Otherwise the next file that is opened,
    such as the ledger, would have the stream's number, and what libraries print would be written into it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  as the lowest free number


def _run(words: list[str]) -> int:
    if words[:1] == [COMPLETE]:
        from nodeagent.cli.completion.complete import run

        return run(words[1:], parser, VERBS)
    # Import only the verb that is called: `place` needs no gRPC.
    top = parser([one for one in words if one in VERBS][:1])
    args = top.parse_args(words)
    if hasattr(args, "color"):
        from nodeagent.cli.output.colour import choose

        choose(args.color, os.environ)
    if args.version:
        from nodeagent.cli.node.version import client, line

        print(line(client()))
        return DONE
    if args.verb is None:
        top.print_help()
        return BAD_INPUT
    return int(_module(args.verb).run(args))


class _Program(Parser):
    """The parser of the program itself; its help groups the verbs."""

    def format_help(self) -> str:
        from nodeagent.cli.help.text import overview, sections

        options = {", ".join(one.option_strings): one.help or "" for one in self._actions if one.option_strings}
        usage = "usage: nodeagent VERB [OPTION]...      nodeagent VERB -h explains a verb"
        return overview(usage, self.description or "", VERBS, options) + sections(self.about)


def parser(known: Collection[str] = VERBS) -> Parser:
    """Return the parser of the command line. Only verbs in `known` have their options, as only they are imported."""
    top = _Program(prog="nodeagent", description="Who gets which part of this machine.")
    top.about = About(EXAMPLES, EXIT_CODES | {REFUSED: "refused: the request does not fit"})
    top.add_argument("--version", action="store_true", help="show the version and whether the compiled core runs")
    add_color(top)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, (_, text) in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text, add_help=name in known)
        if name in known:
            module = _module(name)
            module.add_arguments(verb)
            explain(verb, About.of(module))
    return top


def _module(verb: str) -> Any:
    return importlib.import_module(f"nodeagent.cli.{VERBS[verb].module}")


def _fail(message: str, code: int) -> int:
    """Say what is wrong, without what would move a terminal's cursor."""
    safe = "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in message)
    print(f"nodeagent: {safe}", file=sys.stderr)
    return code
