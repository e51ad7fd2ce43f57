"""The product layer: the wheel, built from the checkout, and its locked dependencies, as a virtual environment."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from email.parser import HeaderParser
from pathlib import Path

from image.errors import ImageError
from image.programs import run
from image.pyc import compile_tree
from image.recipe import CHECKOUT, ENTRYPOINT, PREFIX, PYTHON, SITE

LOCK = Path(__file__).with_name("requirements.txt")
SOURCES = ("nodeagent", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so")
_PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input")
_OF_THIS_BUILD = tuple(f"*.dist-info/{name}" for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"))
"""What pip writes about the installation; it names folders of the machine that builds."""
_UNUSED = ("zstandard/_cffi.*.so", "zstandard/backend_cffi.py")
"""What CPython never imports of libraries: an implementation for PyPy, a fifth of the whole."""
_LAUNCHER = f"""#!/{PREFIX}/bin/python
import sys

from nodeagent.cli import main

sys.exit(main())
"""


def make_product(tree: Path, scratch: Path) -> None:
    """Install the product below a tree that has the base."""
    site = tree / SITE
    wheel = _wheel(scratch)
    run([*_PIP, "install", "--no-compile", "--only-binary=:all:", "--require-hashes", "-r", LOCK, "--target", site])
    run([*_PIP, "install", "--no-compile", "--no-index", "--no-deps", "--target", site, wheel])
    shutil.rmtree(site / "bin", ignore_errors=True)
    for path in (one for name in (*_OF_THIS_BUILD, *_UNUSED) for one in site.glob(name)):
        path.unlink()
    _make_environment(tree / PREFIX)
    compile_tree(tree, SITE)


def _wheel(scratch: Path) -> Path:
    """Build the wheel from a copy: setuptools also takes what an earlier build left in the checkout. Debugging
    information, which names the folder of the build, and the path to this interpreter's libraries are left out."""
    copy = scratch / "source"
    copy.mkdir()
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=_NOT_COPIED)
        else:
            shutil.copy(path, copy / name)
    link = f"{os.environ.get('CC', sysconfig.get_config_var('CC'))} -shared"
    settings = {"LDSHARED": link, "LDFLAGS": "-Wl,--strip-debug", "NODEAGENT_DEBUG": ""}
    run([*_PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", scratch / "wheel", copy], env=settings)
    wheels = sorted((scratch / "wheel").glob("nodeagent-*.whl"))
    if len(wheels) != 1:
        raise ImageError(f"pip built {len(wheels)} wheels of nodeagent instead of one")
    return wheels[0]


def _make_environment(prefix: Path) -> None:
    programs = prefix / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(f"/usr/bin/{PYTHON}")
    version = PYTHON.removeprefix("python")
    (prefix / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {version}\n")
    launcher = programs / ENTRYPOINT[0]
    launcher.write_text(_LAUNCHER)
    launcher.chmod(0o755)


def distributions(tree: Path) -> tuple[dict[str, str], ...]:
    """Return name, version and licence ("" if it is not stated) of each installed distribution, by name."""
    found = []
    for path in (tree / SITE).glob("*.dist-info/METADATA"):
        head = HeaderParser().parsestr(path.read_text())
        licence = head.get("License-Expression") or ""
        found.append({"name": head["Name"], "version": head["Version"], "licence": licence})
    return tuple(sorted(found, key=lambda one: one["name"].lower()))
