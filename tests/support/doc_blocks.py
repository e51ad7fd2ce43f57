"""Commands and their output in a page of docs/: read, run, compared, and written again.

A block is run if its fence says so:

    ```console            commands with `--root machines/NAME`: NAME is a machine of tests/builders/machines.py
    ```console agent      commands of a running agent, one after another through the page

A line of the output that is "..." stands for any lines. What differs each time (ids, times, versions, paths) and the
width of columns is not compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_BLOCK = re.compile(r"^```console( agent)?\n(.*?)^```$", re.M | re.S)
_PROMPT = "$ "
_MASKS = (
    (r"g-[0-9a-f]{10}\b", "GRANT"),
    (r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "UID"),
    (r"\b\d+(?:\.\d+)? ?(?:s|m|h)\b", "TIME"),
    (r"\b\d+\.\d+\.\d+[\w.+-]*", "VERSION"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "DATE"),
    (r"/\S*_fastpath\S*", "CORE"),
    (r"\"?(?:uptime_s|granted_at|started_at|listed_at)\"?: [\d.]+", "MOMENT"),
    (r"process \d+", "PROCESS"),
    (r"[ \t]+", " "),
)


class Step(NamedTuple):
    """One command of a page, what the page says that it prints, and its line there."""

    command: str
    output: str
    line: int
    of_agent: bool


def steps(page: str) -> Iterator[Step]:
    """Yield the commands of a page that can be run, in order."""
    for block in _BLOCK.finditer(page):
        first = page.count("\n", 0, block.start(2)) + 1
        of_agent = block[1] is not None
        for step in _commands(block[2], first, of_agent):
            if of_agent or "--root machines/" in step.command:
                yield step


def _commands(text: str, first: int, of_agent: bool) -> Iterator[Step]:
    command, output, line = "", [], first
    for number, one in enumerate((*text.splitlines(), _PROMPT), start=first):
        if not one.startswith(_PROMPT):
            output.append(one)
            continue
        if command:
            yield Step(command, "\n".join(output).rstrip(), line, of_agent)
        command, output, line = one.removeprefix(_PROMPT), [], number


def matches(expected: str, found: str) -> bool:
    """Return whether a command printed what a page says."""
    parts = [re.escape(_masked(one)) for one in re.split(r"^\.\.\.$", expected, flags=re.M)]
    return re.fullmatch(r"(?:.*\n)*?.*?".join(parts), _masked(found)) is not None


def _masked(text: str) -> str:
    for pattern, mask in _MASKS:
        text = re.sub(pattern, mask, text)
    return "\n".join(line.strip() for line in text.splitlines()).strip("\n")


def rewritten(page: str, printed: Callable[[Step], str]) -> str:
    """Return a page with what its commands print now; output with "..." stays if it is still true."""

    def block(found: re.Match[str]) -> str:
        of_agent = found[1] is not None
        lines = []
        for step in _commands(found[2], 0, of_agent):
            runs = of_agent or "--root machines/" in step.command
            now = printed(step) if runs else step.output
            kept = not runs or ("..." in step.output.splitlines() and matches(step.output, now))
            lines.append(f"{_PROMPT}{step.command}\n{step.output if kept else now.rstrip()}".rstrip())
        return f"```console{found[1] or ''}\n" + "\n".join(lines) + "\n```"

    return _BLOCK.sub(block, page)
