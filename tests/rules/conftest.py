"""What is built once for all tests of what is shipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".cache", ".*_cache", "*.egg-info", "build", "dist", "__pycache__")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it. They are built from a copy: setuptools also takes what an
    earlier build has listed in the checkout (egg-info)."""
    out = tmp_path_factory.mktemp("dist")
    copy = shutil.copytree(CHECKOUT, tmp_path_factory.mktemp("copy") / "checkout", ignore=NOT_COPIED, symlinks=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out
