"""The command line: `nodeagent VERB`. One file per verb, in the folder of its subject; this one
finds the verb and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 bad input or configuration, 3 refused.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

from nodeagent.errors import ConfigError, InputError, LedgerTooNewError, NodeagentError
from nodeagent.version import VERSION


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
    "grants": Verb("agent.grants", "show who holds what"),
    "explain": Verb("agent.explain.verb", "say why: a request, a pod, a claim, a CPU or a device"),
    "advise": Verb("agent.planning.advise", "say which pods to move so that a request lies close together"),
    "forecast": Verb("agent.planning.forecast", "say how many more of a pod or claim fit"),
    "template": Verb("agent.planning.template", "print the node's shape as ResourceSlices without a node"),
    "metrics": Verb("agent.metrics", "print the metrics of a running agent, or write them for node_exporter"),
    "health": Verb("agent.health", "show what is known against devices, or clear it"),
    "config": Verb("node.config", "check a configuration or print its schema"),
    "ledger": Verb("node.ledger", "show the audit; export the ledger to a file, or import it from one"),
    "import": Verb("node.kubelet_state.verb", "take over what kubelet's own managers gave away"),
    "uninstall": Verb("node.uninstall", "undo on this host what the agent has left there"),
}
DONE, FAILED, BAD_INPUT, REFUSED = 0, 1, 2, 3


class Parser(argparse.ArgumentParser):
    """Reports errors in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Return the exit code."""
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    # Import only the verb that is called: `place` needs no gRPC.
    top = parser(words[:1])
    args = top.parse_args(words)
    if args.version:
        print(version_line())
        return DONE
    if args.verb is None:
        top.print_help()
        return BAD_INPUT
    return int(_module(args.verb).run(args))


def parser(known: Collection[str] = VERBS) -> Parser:
    """Return the parser of the command line. Only verbs in `known` have their options, as only they are imported."""
    top = Parser(prog="nodeagent", description="Who gets which part of this machine.")
    top.add_argument("--version", action="store_true", help="show the version and whether the compiled core runs")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, (_, text) in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text, add_help=name in known)
        if name in known:
            _module(name).add_arguments(verb)
    return top


def _module(verb: str) -> Any:
    return importlib.import_module(f"nodeagent.cli.{VERBS[verb].module}")


def version_line() -> str:
    """Return the version and whether the core is compiled, as the core itself reports it."""
    import nodeagent._fastpath as core

    kind = "compiled" if core.COMPILED and not str(core.__file__).endswith((".py", ".pyc")) else "NOT compiled"
    return f"nodeagent {VERSION} (core: {kind}, {core.__file__})"


def _fail(message: str, code: int) -> int:
    print(f"nodeagent: {message}", file=sys.stderr)
    return code
