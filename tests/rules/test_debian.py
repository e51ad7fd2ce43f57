"""The Debian package: what is in it, and that it installs, upgrades and is removed as admins expect.

It is built from the wheel without network. Building it is part of every run; installing it takes NODEAGENT_DEB=1 and
root. It is installed in a copy of this machine (an overlay in a mount namespace), where dpkg and the scripts run for
real.
"""

from __future__ import annotations

import functools
import gzip
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.cli import VERBS, parser
from nodeagent.cli.help.parser import leaves
from nodeagent.config.schema import schema
from tests.support.paths import CHECKOUT
from tests.support.shells import completed

BUILD = CHECKOUT / "packaging" / "debian" / "build.py"
CONFIG = "/etc/nodeagent/config.yaml"
NEWER = "0.1.1"
SHIPPED = {
    CONFIG,
    "/usr/bin/nodeagent",
    "/usr/lib/nodeagent/bin/python3",
    "/usr/lib/nodeagent/pyvenv.cfg",
    "/usr/lib/systemd/system/nodeagent.service",
    "/usr/share/bash-completion/completions/nodeagent",
    "/usr/share/zsh/vendor-completions/_nodeagent",
    "/usr/share/fish/vendor_completions.d/nodeagent.fish",
    "/usr/share/doc/nodeagent/changelog.Debian.gz",
    "/usr/share/doc/nodeagent/copyright",
    "/usr/share/doc/nodeagent/operations.md",
    "/usr/share/man/man5/nodeagent.yaml.5.gz",
    "/usr/share/man/man8/nodeagent.8.gz",
    *(f"/usr/share/doc/nodeagent/examples/{one.name}" for one in CHECKOUT.glob("systemd/*.conf")),
}


def _distribution_python() -> str:
    """The minor version of the distribution's Python, "" if there is none."""
    command = ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except OSError:
        return ""


pytestmark = [
    pytest.mark.skipif(not BUILD.exists(), reason="the package is built from a checkout"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("dpkg-deb", "strip", "readelf"))), reason="dpkg-deb or binutils is not installed"
    ),
]
installs = [
    pytest.mark.skipif(os.environ.get("NODEAGENT_DEB") != "1", reason="NODEAGENT_DEB=1 installs the package"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a copy of the machine to install it in"),
    pytest.mark.skipif(
        _distribution_python() != "{}.{}".format(*sys.version_info[:2]),
        reason="the package is for the distribution's Python, and this is another one",
    ),
]


def build(wheel: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, str(BUILD), str(wheel), "--out", str(out), "--level", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="session")
def deb(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(wheel, tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="session")
def tree(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it unpacks to."""
    tree = tmp_path_factory.mktemp("tree")
    subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
    return tree


# ---------------------------------------------------------------- what is in it


def test_it_has_the_program_the_unit_and_the_manuals_and_belongs_to_root(deb: Path) -> None:
    listed = subprocess.run(["dpkg-deb", "-c", deb], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.split(maxsplit=5)[5].partition(" -> ")[0].lstrip(".") for line in listed}
    assert not SHIPPED - names
    assert {line.split()[1] for line in listed} == {"root/root"}
    assert {line.split()[0] for line in listed} == {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x", "lrwxrwxrwx"}
    assert not [one for one in names if "__pycache__" in one or "/tests/" in one]


def test_it_depends_on_the_python_that_it_is_compiled_for(tree: Path) -> None:
    control = (tree / "DEBIAN/control").read_text()
    major, minor = sys.version_info[:2]
    assert f"python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1})" in control
    assert re.search(r"^Depends: libc6 \(>= 2\.\d+\), .*libudev1", control, re.M)
    assert (tree / "DEBIAN/conffiles").read_text() == f"{CONFIG}\n"
    assert (tree / "usr/lib/nodeagent/bin/python3").readlink() == Path(f"../../../bin/python{major}.{minor}")


def test_its_sums_are_those_of_its_files(tree: Path) -> None:
    done = subprocess.run(["md5sum", "--check", "--quiet", "DEBIAN/md5sums"], cwd=tree, check=False)
    assert done.returncode == 0


def test_the_installed_configuration_is_the_example(tree: Path) -> None:
    """Which serves what an agent without a configuration serves (tests/unit/config/test_config.py)."""
    assert (tree / CONFIG[1:]).read_bytes() == (CHECKOUT / "systemd/config.example.yaml").read_bytes()


def test_its_scripts_are_valid_for_the_shell(tree: Path) -> None:
    for name in ("postinst", "prerm", "postrm"):
        assert subprocess.run(["sh", "-n", tree / "DEBIAN" / name], check=False).returncode == 0


# ---------------------------------------------------------------- manuals and completion


def page(tree: Path, name: str) -> str:
    (path,) = tree.glob(f"usr/share/man/*/{name}.gz")
    return gzip.decompress(path.read_bytes()).decode()


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("name", ["nodeagent.8", "nodeagent.yaml.5"])
def test_the_manuals_are_correct_roff(name: str, tree: Path) -> None:
    command = ["groff", "-ww", "-mandoc", "-Tutf8"]
    done = subprocess.run(command, input=page(tree, name), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_manuals_have_every_verb_and_every_key(tree: Path) -> None:
    verbs, keys = page(tree, "nodeagent.8"), re.sub(r"\\f[BIR]", " ", page(tree, "nodeagent.yaml.5"))
    assert not [name for name in VERBS if f".SS \\fBnodeagent {name}" not in verbs]
    shown = verbs.replace("\\-", "-").replace("\\e", "\\")
    assert not [command for leaf in leaves(parser()) for command, _ in leaf.about.examples if command not in shown]
    every = {key for one in schema()["$defs"].values() for key in one.get("properties", {})}
    assert not [key for key in every if not re.search(rf"\b{key}\b", keys)]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nodeagent le", "ledger"),
        ("nodeagent ledger ", "export import"),
        ("nodeagent history -o ", "table json jsonl"),
        ("nodeagent history --l", "--last"),
        ("nodeagent health c", "clear"),
        ("nodeagent run --config /et", ""),
    ],
)
def test_bash_completes_verbs_options_and_choices(line: str, words: str, tree: Path, tmp_path: Path) -> None:
    """The installed script, with this program."""
    assert completed(line, tree / "usr/share/bash-completion/completions/nodeagent", tmp_path) == set(words.split())


# ---------------------------------------------------------------- installed in a copy of this machine


def installed(folder: Path, script: str, **files: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as root of a copy of this machine, from which nothing reaches the machine itself. files: what is
    put into the copy's /tmp, by name."""
    copies = "".join(f"cp {path} $root/tmp/{name}.deb\n" for name, path in files.items())
    whole = f"""set -e
        mount -t tmpfs tmpfs {folder}
        root={folder}/root
        mkdir -p {folder}/upper {folder}/work $root
        mount -t overlay -o lowerdir=/,upperdir={folder}/upper,workdir={folder}/work overlay $root
        mount -t proc proc $root/proc
        mount --bind /dev $root/dev
        # Without what is mounted below /sys: nothing in the copy may reach control groups.
        mount --bind /sys $root/sys
        mount -o remount,bind,ro $root/sys
        rm -rf $root/etc/nodeagent $root/var/lib/nodeagent $root/run/nodeagent
        mkdir -p $root/tmp
        {copies}
        exec chroot $root sh -ec '{script}'"""
    command = ["unshare", "--mount", "sh", "-c", whole]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})


@pytest.fixture
def copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """What `installed` does, skipped where the kernel does not let it."""
    folder = tmp_path_factory.mktemp("copy")
    made = functools.partial(installed, folder)
    if (done := made("true")).returncode != 0:
        pytest.skip(f"cannot make a copy of the machine: {done.stderr.strip()}")
    return made


class TestInstalled:
    pytestmark = installs

    def test_an_installed_package_runs_and_keeps_a_changed_configuration_on_upgrade(
        self, wheel: Path, deb: Path, tmp_path: Path, copy: Callable[..., subprocess.CompletedProcess[str]]
    ) -> None:
        """Also through a downgrade. Nothing is enabled by it, and a purge leaves nothing behind."""
        newer = build(wheel, tmp_path, "--version", NEWER)
        script = f"""
            dpkg -i /tmp/old.deb
            nodeagent --version
            nodeagent config check
            test ! -e /etc/systemd/system/multi-user.target.wants/nodeagent.service
            test -n "$(find /usr/lib/nodeagent -name "*.pyc" -print -quit)"
            echo "domain: example.com" > {CONFIG}
            dpkg -i /tmp/newer.deb
            grep example.com {CONFIG}
            dpkg -i /tmp/old.deb
            nodeagent config check
            dpkg -r nodeagent
            test ! -e /usr/lib/nodeagent
            grep example.com {CONFIG}
            mkdir -p /var/lib/nodeagent
            dpkg -P nodeagent
            test ! -e /etc/nodeagent
            test ! -e /var/lib/nodeagent
            echo purged"""
        done = copy(script, old=deb, newer=newer)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "/usr/lib/nodeagent/lib/python" in done.stdout
        assert f"{CONFIG}: good" in done.stdout and "example.com/cpu" in done.stdout
        assert done.stdout.splitlines()[-1] == "purged"

    def test_a_purge_keeps_a_ledger_with_grants(
        self, deb: Path, copy: Callable[..., subprocess.CompletedProcess[str]]
    ) -> None:
        script = """
            dpkg -i /tmp/it.deb
            mkdir -p /var/lib/nodeagent
            python3 -c "import sqlite3
with sqlite3.connect(\\"/var/lib/nodeagent/ledger.db\\") as ledger:
    ledger.execute(\\"CREATE TABLE grants (id TEXT)\\")
    ledger.execute(\\"INSERT INTO grants VALUES (1)\\")"
            dpkg -P nodeagent
            test -e /var/lib/nodeagent/ledger.db"""
        done = copy(script, it=deb)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "/var/lib/nodeagent is kept: its ledger has grants" in done.stderr

    def test_the_same_wheel_gives_the_same_package(self, wheel: Path, deb: Path, tmp_path: Path) -> None:
        assert build(wheel, tmp_path).read_bytes() == deb.read_bytes()

    @pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian is not installed")
    def test_lintian_finds_nothing(self, deb: Path) -> None:
        """Except where the Python of the build looks for its libraries: the distribution's looks nowhere else."""
        command = ["lintian", "--allow-root", "--suppress-tags", "custom-library-search-path", str(deb)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")
