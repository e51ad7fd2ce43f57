"""The guest's image and the wheel for it, kept below .cache/vm.

Owns that folder: `images/HASH` is made once for a recipe (build-image.sh, the packages, the wheels), `archives` and
`wheels` are downloads, `wheel` the product as built by the compiler and Python of the guest's own distribution,
`older-wheel` an older version of it, `programs` what tests run.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
CACHE = Path(os.environ.get("NODEAGENT_VM_CACHE", CHECKOUT / ".cache" / "vm"))
PYTHON = "3.13"
"""Of the guest's distribution."""
PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "kmod", "linux-image-amd64", "containerd", "runc", "busybox-static"),
    *("python3", "python3-venv", "python3-dev", "gcc", "libc6-dev"),
    *("iproute2", "pciutils", "pci.ids", "numactl", "procps", "nvme-cli"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
SOURCES = ("nodeagent", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
PROGRAMS = ("qemu-system-x86_64", "mmdebstrap", "mke2fs", "zstd", "cpio", "modprobe", "apt-get")
BUILD_S = 600


@contextlib.contextmanager
def unshared() -> Iterator[None]:
    """Wait for other processes to be done with the cache, and keep them waiting."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def missing() -> str | None:
    """Why no guest can be built and booted here; None where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no guest: {', '.join(absent)} not installed"
    return None if os.geteuid() == 0 else "no guest: building its image needs root"


def image() -> Path:
    """The folder with vmlinux, initrd.img, root.img and root; built where the recipe has no image yet."""
    downloads = _wheels()
    made = CACHE / "images" / _recipe(downloads)
    if not (made / "root.img").exists():
        _build(made, downloads)
    return made


@functools.cache
def wheel(tree: Path, fill: Callable[[Path], None] | None = None, name: str = "wheel") -> Path:
    """The product's wheel for the guest, built with what is in the guest's tree: from the checkout, once for all guests
    of a run, or from the sources that `fill` puts into a folder. name: of the folder that keeps it."""
    source, out = tree / "src", CACHE / name
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    (fill or _copy_sources)(source)
    pip = "/opt/nodeagent/bin/pip wheel -q --no-build-isolation --no-deps --no-index -w dist ."
    _run(["chroot", str(tree), "sh", "-c", f"cd /src && {pip}"])
    shutil.move(source / "dist", out)
    shutil.rmtree(source)
    (built,) = out.glob("nodeagent-*.whl")
    return built


@functools.cache
def installed(tree: Path, wheel: Path) -> Path:
    """What pip installs of a wheel, with the bytecode, as an archive for the guest's root: pip in the guest takes a
    minute."""
    folder, out = tree / "src", CACHE / "wheel" / "installed.tar"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(wheel, folder)
    pip = "/opt/nodeagent/bin/pip install -q --no-warn-script-location --no-index --no-deps --root root ./*.whl"
    _run(["chroot", str(tree), "sh", "-c", f"cd /src && {pip} && tar -C root -cf installed.tar ."])
    shutil.move(folder / out.name, out)
    shutil.rmtree(folder)
    return out


def program(tree: Path, source: Path) -> Path:
    """A static program for the guest, made of one file of C with the compiler in the guest's tree: there it would take
    a minute and a half."""
    folder = tree / "src"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(source, folder)
    cc = f"gcc -static -O1 -Wall -Werror -o {source.stem} {source.name}"
    _run(["chroot", str(tree), "sh", "-c", f"cd /src && {cc}"])
    out = CACHE / "programs"
    out.mkdir(exist_ok=True)
    shutil.copy(folder / source.stem, out)
    shutil.rmtree(folder)
    return out / source.stem


def _requirements() -> list[str]:
    """What building and running the product takes, and what the double of kubelet takes."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    doubles = [one for one in project["dependency-groups"]["dev"] if one.startswith("grpcio>")]
    return [*project["build-system"]["requires"], *project["project"]["dependencies"], *doubles, "wheel"]


def _wheels() -> Path:
    """Downloaded once for a list of requirements, so that the image stays the same until that changes."""
    wanted = _requirements()
    folder = CACHE / "wheels" / hashlib.sha256("\n".join([PYTHON, *wanted]).encode()).hexdigest()[:16]
    if not folder.exists():
        draft = folder.with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        platforms = [word for one in PLATFORMS for word in ("--platform", one)]
        pip = (sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--python-version", PYTHON)
        _run([*pip, "--implementation", "cp", *platforms, "-d", str(draft), *wanted])
        draft.rename(folder)
    return folder


def _recipe(downloads: Path) -> str:
    parts = [(HERE / "build-image.sh").read_text(), *PACKAGES, *sorted(path.name for path in downloads.iterdir())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(made: Path, downloads: Path) -> None:
    """Only the newest recipe's image is kept: one takes about 1.5 GB."""
    shutil.rmtree(made.parent, ignore_errors=True)
    draft = made.with_suffix(".new")
    draft.mkdir(parents=True)
    archives = CACHE / "archives"
    archives.mkdir(exist_ok=True)
    (draft / "archives").symlink_to(archives)
    _run([str(HERE / "build-image.sh"), str(draft), str(downloads), ",".join(PACKAGES)])
    draft.rename(made)


def _copy_sources(target: Path) -> None:
    target.mkdir()
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(path, target / name)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, text=True, stdout=sys.stderr, check=False, timeout=BUILD_S)
    if done.returncode:
        raise RuntimeError(f"cannot make the guest: {' '.join(command)[:200]} ended with {done.returncode}")
