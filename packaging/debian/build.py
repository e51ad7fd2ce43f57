"""Builds the Debian package from the wheel: a tree, and `dpkg-deb --build`. Run it with the Python of the environment
whose libraries are to be shipped; that has to be the minor version of the distribution's python3.

The same inputs and SOURCE_DATE_EPOCH give the same bytes. docs/decisions/0012-debian-package.md has the reasons.
"""

from __future__ import annotations

import argparse
import calendar
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from email.message import Message
from importlib.metadata import Distribution
from pathlib import Path

import dependencies
import program

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
MAINTAINER = "The nodeagent authors <maintainers@nodeagent.dev>"
REVISION = "1"
SCRIPTS = ("postinst", "prerm", "postrm")
CONFIG = "etc/nodeagent/config.yaml"
DOC = "usr/share/doc/nodeagent"
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/nodeagent",
    "zsh": "usr/share/zsh/vendor-completions/_nodeagent",
    "fish": "usr/share/fish/vendor_completions.d/nodeagent.fish",
}
DESCRIPTION = """\
Description: assigns exclusive CPUs, hugepages and devices of a Kubernetes node
 One daemon per Kubernetes node that assigns exclusive CPUs, hugepages, GPUs,
 NICs and other devices to containers, placed close to each other and recorded
 in one durable ledger, through the device plugin API and through Dynamic
 Resource Allocation.
 .
 Installing the package does not start the daemon: check the configuration
 first.
"""


def main() -> None:
    """Build the package that the command line asks for, and print its path."""
    args = _arguments()
    epoch_s = int(os.environ.get("SOURCE_DATE_EPOCH") or _newest(args.wheel))
    with tempfile.TemporaryDirectory(prefix="nodeagent-deb-") as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        version = args.version or args.wheel.name.split("-")[1]
        libraries = program.write(tree, args.wheel)
        _files(tree)
        _generated(tree, version, epoch_s)
        _documents(tree, libraries, version, epoch_s)
        architecture = _said("dpkg", "--print-architecture")
        _control(tree, version, architecture)
        _uniform(tree, epoch_s)
        target = args.out / f"nodeagent_{version}-{REVISION}_{architecture}.deb"
        args.out.mkdir(parents=True, exist_ok=True)
        _pack(tree, target, args.level, epoch_s)
    print(target)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="build", description="Build the Debian package of nodeagent from its wheel.")
    parser.add_argument("wheel", type=Path, metavar="WHEEL")
    parser.add_argument("--out", type=Path, default=Path("dist"), metavar="DIR", help="where to put the package (dist)")
    parser.add_argument("--version", metavar="VERSION", help="the package's version (default: the wheel's)")
    parser.add_argument("--level", type=int, default=6, metavar="N", help="how much to compress, 0 to 9 (6)")
    return parser.parse_args()


def _newest(wheel: Path) -> float:
    """Return the time of the wheel's newest file in seconds since the epoch."""
    with zipfile.ZipFile(wheel) as packed:
        return max(calendar.timegm((*one.date_time, 0, 0, 0)) for one in packed.infolist())


def _files(tree: Path) -> None:
    """Copy what is shipped as it is: the unit, the configuration, examples and documentation."""
    _copy("systemd/nodeagent.service", tree / "usr/lib/systemd/system/nodeagent.service")
    _copy("systemd/config.example.yaml", tree / CONFIG)
    for path in (*sorted(CHECKOUT.glob("systemd/*.conf")), *sorted(CHECKOUT.glob("docs/examples/*.yaml"))):
        _copy(str(path.relative_to(CHECKOUT)), tree / DOC / "examples" / path.name)
    for path in sorted(CHECKOUT.glob("deploy/*.yaml")):
        _copy(str(path.relative_to(CHECKOUT)), tree / DOC / "examples" / "deploy" / path.name)
    _copy("packaging/debian/lintian-overrides", tree / "usr/share/lintian/overrides/nodeagent")
    for path in sorted(CHECKOUT.glob("docs/*.md")):
        _copy(str(path.relative_to(CHECKOUT)), tree / DOC / path.name)


def _generated(tree: Path, version: str, epoch_s: int) -> None:
    """Write the man pages and the completion, made by the program that is shipped."""
    sys.path.insert(0, str(program.site_packages(tree)))
    sys.dont_write_bytecode = True
    import manual

    from nodeagent.cli import parser
    from nodeagent.cli.completion.scripts import SCRIPTS
    from nodeagent.config.schema import schema

    pages = {
        "man8/nodeagent.8": manual.program(parser(), version, epoch_s),
        "man5/nodeagent.yaml.5": manual.configuration(schema(), manual.tables(CHECKOUT / "docs"), version, epoch_s),
    }
    for name, text in pages.items():
        _compressed(tree / "usr/share/man" / f"{name}.gz", text)
    for shell, path in COMPLETIONS.items():
        _put(tree / path, SCRIPTS[shell])


def _documents(tree: Path, libraries: list[Distribution], version: str, epoch_s: int) -> None:
    """Write the copyright, with the licences of the libraries, and both changelogs."""
    _put(tree / DOC / "copyright", _copyright(libraries))
    _compressed(tree / DOC / "changelog.gz", (CHECKOUT / "CHANGELOG.md").read_text())
    date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(epoch_s))
    entry = f"nodeagent ({version}-{REVISION}) unstable; urgency=medium\n\n  * See changelog.gz.\n"
    _compressed(tree / DOC / "changelog.Debian.gz", f"{entry}\n -- {MAINTAINER}  {date}\n")


def _copyright(libraries: list[Distribution]) -> str:
    head = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: nodeagent\n"
    apache = f"Files: *\nCopyright: 2026 {MAINTAINER.partition(' <')[0]}\nLicense: Apache-2.0\n"
    text = "License: Apache-2.0\n On Debian systems its text is in /usr/share/common-licenses/Apache-2.0.\n"
    return "\n".join((head, apache, *map(_library, libraries), text))


def _library(one: Distribution) -> str:
    about: Message = one.metadata  # type: ignore[assignment]
    licence = about["License-Expression"] or about["License"] or "unknown"
    where = f"{program.HOME}/lib/{program.PYTHON}/site-packages/{about['Name'].replace('-', '_')}*"
    name = " ".join(licence.split())[:60]
    owner = f"the authors of {about['Name']} {one.version}"
    return f"Files: {where}\nCopyright: {owner}\nLicense: {name}\n As in its dist-info.\n"


def _control(tree: Path, version: str, architecture: str) -> None:
    """Write DEBIAN: control, conffiles, the scripts and the sums of all files."""
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    size_kib = sum(-(-path.stat().st_size // 1024) for path in files)
    fields = {
        "Package": "nodeagent",
        "Version": f"{version}-{REVISION}",
        "Architecture": architecture,
        "Maintainer": MAINTAINER,
        "Installed-Size": str(size_kib),
        "Depends": dependencies.depends(program.compiled(tree)),
        "Section": "admin",
        "Priority": "optional",
    }
    _put(tree / "DEBIAN/control", "".join(f"{key}: {value}\n" for key, value in fields.items()) + DESCRIPTION)
    _put(tree / "DEBIAN/conffiles", f"/{CONFIG}\n")
    sums = (f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(tree)}\n" for path in files)
    _put(tree / "DEBIAN/md5sums", "".join(sums))
    for name in SCRIPTS:
        _copy(f"packaging/debian/{name}", tree / "DEBIAN" / name)
        (tree / "DEBIAN" / name).chmod(0o755)


def _uniform(tree: Path, epoch_s: int) -> None:
    """Give everything one time and the modes that Debian expects."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            executable = path.is_dir() or (path.stat().st_mode & 0o100 and path.suffix != ".so")
            path.chmod(0o755 if executable else 0o644)
        os.utime(path, (epoch_s, epoch_s), follow_symlinks=False)


def _pack(tree: Path, target: Path, level: int, epoch_s: int) -> None:
    command = ["dpkg-deb", "--root-owner-group", "-Zxz", f"-z{level}", "--build", str(tree), str(target)]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch_s)}
    )


def _copy(source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CHECKOUT / source, target)


def _put(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def _compressed(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
