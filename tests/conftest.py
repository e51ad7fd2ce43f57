"""What every test may use: coroutines as tests, and the recorded data that lies next to the checkout."""

from __future__ import annotations

import asyncio
import inspect
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.paths import SHARED

TEST_DEADLINE_S = 180
"""A safety net: no test waits for it."""


# A busy machine is no reason to fail; where a change has to pass, the same examples are tried each time.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("gate", settings.get_profile("house"), derandomize=True)
settings.load_profile("gate" if os.environ.get("CI") else "house")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests on a fresh loop, with a deadline."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), TEST_DEADLINE_S))
    return True


def shared_path(name: str) -> Path:
    """A file or folder of the recorded data; the test is skipped, saying so, where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no recorded data at {path}")
    return path


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="na-", ignore_cleanup_errors=True) as path:
        yield Path(path)
