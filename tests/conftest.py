"""What every test may use: coroutines as tests, recorded machines, and the captures that lie next to the checkout."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
import tempfile
from collections.abc import Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests.builders import tables
from tests.support.paths import SHARED

TEST_DEADLINE_S, END_S = 180, 20
"""A safety net: no test waits for it."""

ONE_AT_A_TIME = ("tests/e2e/", "tests/image/", "tests/vm/")
LONGEST_TEMPORARY_FOLDER_BYTES = 28
"""A socket's path has room for 107 bytes, of which what a node has below its root takes up to 79."""


# A busy machine is no reason to fail; where a change has to pass, the same examples are tried each time.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("gate", settings.get_profile("project"), derandomize=True)
settings.load_profile("gate" if os.environ.get("CI") else "project")


def pytest_configure() -> None:
    """Say at once that sockets will not fit, which many tests would say one by one."""
    where = tempfile.gettempdir()
    if len(os.fsencode(where)) > LONGEST_TEMPORARY_FOLDER_BYTES:
        limit = f"has {len(os.fsencode(where))} bytes, paths of sockets leave {LONGEST_TEMPORARY_FOLDER_BYTES}"
        pytest.exit(
            f"cannot test in {where}: the path {limit}: set TMPDIR to a shorter one", pytest.ExitCode.USAGE_ERROR
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFile(config, log)


class _ByFile(LoadScopeScheduling):
    """The tests of a file run one after the other, and so do all that need a whole node or build an image."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return next((folder for folder in ONE_AT_A_TIME if file.startswith(folder)), file)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests on a fresh loop, with a deadline."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    asyncio.run(_in_time(pyfuncitem.obj(**arguments)))
    return True


async def _in_time(test: Coroutine[Any, Any, None]) -> None:
    """A test that does not end within its deadline fails, even if it does not end when it is cancelled either: asyncio
    then cancels each of its tasks. Where they stand is printed."""
    task = asyncio.ensure_future(test)
    await asyncio.wait([task], timeout=TEST_DEADLINE_S)
    if not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=END_S)
        for one in () if task.done() else asyncio.all_tasks():
            one.print_stack()
        state = "after it was cancelled" if task.done() else f"and went on {END_S} s after it was cancelled"
        pytest.fail(f"not ended within {TEST_DEADLINE_S} s, {state}")
    await task


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report a test without collecting garbage meanwhile.

    pytest parses the sources that a traceback shows. In CPython 3.11 `ast.parse` fails where a finalizer runs inside
    it and parses too, as asyncio's do when they log a traceback (gh-106905): the whole run would end there.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Undo what a command that ran in this process did to the log: the next test reads it."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def shared_path(name: str) -> Path:
    """A file or folder of the captures; the test is skipped, saying so, where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no captures at {path}")
    return path


@pytest.fixture(scope="session")
def recorded_tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tree of a recorded machine by name, written once for all tests, which leave it as it is."""

    @functools.cache
    def built(name: str) -> Path:
        return tables.build(tmp_path_factory.mktemp("recorded"), tables.load(name))

    return built


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="na-", ignore_cleanup_errors=True) as path:
        yield Path(path)
