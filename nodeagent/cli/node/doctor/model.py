"""What a check is, and what it finds.

A check is a function from what is known of a node to one finding. It decides nothing about how it is shown, and raises
HostError, InputError or another NodeagentError where something cannot be read: that is the finding "unknown".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from enum import StrEnum

import msgspec

from nodeagent.cli.node.doctor.node import Node, NotCapturedError
from nodeagent.errors import NodeagentError, cause_of


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"
    UNKNOWN = "unknown"
    """What would have to be read cannot be read."""
    SKIPPED = "skipped"
    """The question does not arise here, or a capture cannot answer it."""


class Finding(msgspec.Struct, frozen=True):
    """What one check found."""

    state: State
    seen: str
    fix: str = ""
    """What to do, in words; empty if there is nothing to do."""
    commands: tuple[str, ...] = ()
    """The same as commands to copy, if there are any."""


def ok(seen: str) -> Finding:
    """Return that all is well."""
    return Finding(State.OK, seen)


def warning(seen: str, fix: str, *commands: str) -> Finding:
    """Return that something works less well than it could."""
    return Finding(State.WARNING, seen, fix, commands)


def failure(seen: str, fix: str, *commands: str) -> Finding:
    """Return that something does not work."""
    return Finding(State.FAILURE, seen, fix, commands)


def unknown(why: str) -> Finding:
    """Return that a question cannot be answered. why: completes "unknown, because"."""
    return Finding(State.UNKNOWN, f"unknown, because {why}")


def skipped(why: str) -> Finding:
    """Return that a question does not arise."""
    return Finding(State.SKIPPED, why)


class Check(msgspec.Struct, frozen=True):
    """One question about a node."""

    name: str
    """SUBJECT.QUESTION, such as kubelet.cpu-manager."""
    anchor: str
    """Where the documents explain it, below docs/."""
    judge: Callable[[Node], Finding]
    live: bool = False
    """Whether only the running machine can answer it, and no captured tree."""
    agent: bool = False
    """Whether it looks at the status of the agent, so that it does not arise while none answers."""
    configuration: bool = False
    """Whether it compares the configuration with the machine: `nodeagent config check --here` asks it too."""

    @property
    def subject(self) -> str:
        """Return the part of the name that groups checks."""
        return self.name.partition(".")[0]


DENIED = os.strerror(errno.EACCES)
"""How messages of the operating system end where rights are missing."""
NOT_IN_A_CAPTURE = skipped("not in a capture")
AWAY = skipped("the agent does not answer")


def examine(check: Check, node: Node) -> Finding:
    """Return what a check finds, with paths as they are on the node. Raises nothing: what cannot be read is unknown,
    and so is what the check itself trips over."""
    if check.live and not node.live:
        return NOT_IN_A_CAPTURE
    try:
        found = AWAY if check.agent and node.agent_error else check.judge(node)
    except NotCapturedError:
        found = NOT_IN_A_CAPTURE
    except (NodeagentError, OSError) as error:
        found = unknown(_reason(error))
    except Exception as error:
        found = unknown(f"the check itself failed: {type(error).__name__}: {error}")
    return _placed(found, node.files.root)


def _placed(found: Finding, root: str) -> Finding:
    """Return a finding of a tree as it is on the node: a capture gives the same answer wherever it lies."""
    seen, fix, *commands = (text.replace(root, "/") for text in (found.seen, found.fix, *found.commands))
    return Finding(found.state, seen, fix, tuple(commands))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read: {cause_of(error)}"
    return str(error)
