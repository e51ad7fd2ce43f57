"""Completion as a shell does it: a line is typed, and what it could become comes back."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.paths import CHECKOUT


def program(folder: Path) -> dict[str, str]:
    """An environment in which `nodeagent` is the program that is tested."""
    shim = folder / "bin" / "nodeagent"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nodeagent "$@"\n')
    shim.chmod(0o755)
    path = f"{shim.parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(CHECKOUT),
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
    }


def completed(line: str, script: Path, folder: Path) -> set[str]:
    """What bash offers for the last word of a line, without what precedes the last colon or equals sign."""
    text = f"""source {shlex.quote(str(script))}
        COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDBREAKS=$' \\t\\n"><=;|&(:'
        _nodeagent; printf '%s\\n' "${{COMPREPLY[@]}}" """
    return _said(["bash", "-c", text], program(folder))


def completed_by_fish(line: str, script: Path, folder: Path) -> set[str]:
    """What fish offers for the last word of a line, whole."""
    text = f"source {shlex.quote(str(script))}; complete -C {shlex.quote(line)}"
    return {one.partition("\t")[0] for one in _said(["fish", "--no-config", "-c", text], program(folder))}


def completed_by_zsh(line: str, script: Path, folder: Path) -> set[str]:
    """What the script gives to zsh's completion system, which needs a terminal and is a double here."""
    words = line.split(" ")
    text = f"""compdef() {{ : }}
        _files() {{ : }}
        _describe() {{ print -rl -- "${{(@P)2}}" }}
        source {shlex.quote(str(script))}
        words=({" ".join(map(shlex.quote, words))}) CURRENT={len(words)}
        _nodeagent"""
    lines = _said(["zsh", "-f", "-c", text], program(folder))
    return {one.replace("\\:", "\0").partition(":")[0].replace("\0", ":") for one in lines}


def _said(command: list[str], environ: Mapping[str, str]) -> set[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environ)
    assert done.stderr == "", done
    return {one for one in done.stdout.splitlines() if one}
