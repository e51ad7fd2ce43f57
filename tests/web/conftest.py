"""One browser program for all tests, and `nodeagent web` in front of a status socket."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pytest


class Program(NamedTuple):
    """How a browser is started."""

    command: Sequence[str]
    environment: Mapping[str, str]


@pytest.fixture(scope="session")
def chromium() -> Program:
    """Headless Chromium: unpacked from Debian's packages, or the program that NODEAGENT_BROWSER names."""
    wanted = os.environ.get("NODEAGENT_BROWSER", "")
    if not wanted:
        pytest.skip("NODEAGENT_BROWSER=1 is not set: the browser is a download of 110 MB from Debian's archive")
    if wanted != "1":
        return Program([wanted], {})
    from tests.web.chromium import NoBrowserError, command, environment, installed

    try:
        root = installed()
    except NoBrowserError as error:
        pytest.fail(f"NODEAGENT_BROWSER=1 is set, and there is no browser: {error}")
    return Program(command(root), environment(root))
